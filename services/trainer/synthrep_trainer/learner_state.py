"""A learner as tensors by part, and back: encoder, heads, optimizer, and averages of the first two.

The encoder is a part of its own, under the names of the encoder alone, because it is what probes
and exports read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from synthrep_trainer.checkpoint import Parts
from synthrep_trainer.moving_average import MovingAverage
from synthrep_trainer.parallel import load_whole, sharded_like, whole

_ENCODER, _AVERAGED_ENCODER = "towers.encoder.", "encoder."  # where state dicts have them
_OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")  # of AdamW


def parts_of(
    model: nn.Module, optimizer: Optimizer, average: MovingAverage | None
) -> dict[str, dict[str, Tensor]]:
    """All tensors, whole; those that are not sharded are not copied. All ranks are to call it."""
    parts = {"optimizer": dict(_optimizer_tensors(model, optimizer))}
    parts["encoder"], parts["heads"] = _split(_whole_state(model), _ENCODER)
    if average is not None:
        averaged = _whole_state(average.module)
        parts["ema_encoder"], parts["ema_heads"] = _split(averaged, _AVERAGED_ENCODER)
    return parts


def load_parts(
    parts: Parts, model: nn.Module, optimizer: Optimizer, average: MovingAverage | None
) -> None:
    """Inverse of `parts_of`; raises RuntimeError or KeyError for parts of another model."""
    load_whole(model, _joined(parts["encoder"], parts["heads"], _ENCODER))
    if average is not None:
        averaged = _joined(parts["ema_encoder"], parts["ema_heads"], _AVERAGED_ENCODER)
        load_whole(average.module, averaged)
    tensors = parts["optimizer"]
    for name, parameter in model.named_parameters():
        if f"step.{name}" in tensors:  # else no step was taken before
            # AdamW keeps its step count on the CPU and its moments with the parameter.
            state = {key: tensors[f"{key}.{name}"].clone() for key in _OPTIMIZER_STATE}
            optimizer.state[parameter] = {
                key: tensor if key == "step" else sharded_like(tensor, parameter)
                for key, tensor in state.items()
            }


def _whole_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in module.state_dict().items()}


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        state: Mapping[str, Tensor] = optimizer.state[parameter]
        for key in _OPTIMIZER_STATE if state else ():
            yield f"{key}.{name}", whole(state[key])


def _split(
    tensors: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors below `prefix`, without it, and the others."""
    below = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return below, {name: t for name, t in tensors.items() if not name.startswith(prefix)}


def _joined(
    below: Mapping[str, Tensor], others: Mapping[str, Tensor], prefix: str
) -> dict[str, Tensor]:
    """Inverse of `_split`."""
    return {f"{prefix}{name}": t for name, t in below.items()} | dict(others)
