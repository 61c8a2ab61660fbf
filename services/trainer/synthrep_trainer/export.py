"""From a checkpoint to a folder that others can use: written aside, compared, then published.

The folder holds what `export_formats` writes, and `synthrep.json`: where the encoder came from, and
what happens to an image before it. It appears whole under its name or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from synthrep_shared.storage import sync_folder, temporary_path
from synthrep_trainer.checkpoint import Checkpoint, Weights, load_checkpoint, load_newest
from synthrep_trainer.checkpoint_folders import MANIFEST, open_checkpoint
from synthrep_trainer.encoder import Encoder, EncoderConfig, make_encoder
from synthrep_trainer.errors import ExportError, NoCheckpointError
from synthrep_trainer.export_formats import FORMATS, FormatName, preprocessing
from synthrep_trainer.runs import Workplace

DESCRIPTION = "synthrep.json"
TOLERANCE = 1e-4
"""Greatest difference between a feature of the encoder and of its export."""

_TRIAL_IMAGES = 3  # not the number that the ONNX graph is traced with


class Export(NamedTuple):
    """What was published, and how far its features are from those of the encoder."""

    folder: Path
    greatest_difference: float


def find_checkpoint(what: str, place: Workplace) -> Checkpoint:
    """The checkpoint at a path, or of that name or the newest of that run in the folder of runs.

    Raises:
        NoCheckpointError: there is none, or it is not what its manifest says.
    """
    named = place.checkpoint(what)
    path = Path(what) if (Path(what) / MANIFEST).is_file() else named
    if path is not None:
        return load_checkpoint(open_checkpoint(path))
    run = place.run(what)
    if run is None:
        raise NoCheckpointError(f"{what} is neither a checkpoint nor a run in {place.root}")
    newest = load_newest(run.checkpoints)
    if newest is None:
        raise NoCheckpointError(f"run {what} has no checkpoint yet")
    return newest


def export_checkpoint(
    checkpoint: Checkpoint,
    output: Path,
    format_name: FormatName,
    *,
    weights: Weights = "auto",
    replace: bool = False,
) -> Export:
    """Publish a checkpoint's encoder as the folder `output`.

    Args:
        weights: the last ones or averaged ones, see `Checkpoint.encoder`.
        replace: an earlier export that lies there goes; nothing else does.

    Raises:
        ExportError: something lies at `output`, the format cannot hold the encoder, a library is
            missing, or the features differ by more than `TOLERANCE`.
        NoCheckpointError: the checkpoint holds no encoder.
    """
    _check_output(output, replace=replace)
    config, encoder = _encoder_of(checkpoint, weights)
    output.parent.mkdir(parents=True, exist_ok=True)
    written = temporary_path(output.parent, output.name)
    written.mkdir()
    try:
        difference = _write(encoder, config, format_name, written)
        description = {
            "format": format_name,
            "step": checkpoint.step,
            "encoder": checkpoint.state["encoder"],
            "features": encoder.width,
            "preprocessing": preprocessing(config),
            "request": checkpoint.state.get("request"),
        }
        (written / DESCRIPTION).write_text(json.dumps(description, indent=1))
        _flush(written)
        _publish(written, output, replace=replace)
    finally:
        shutil.rmtree(written, ignore_errors=True)
    return Export(output, difference)


def _check_output(output: Path, *, replace: bool) -> None:
    if not (output.exists() or output.is_symlink()):
        return
    if not replace:
        raise ExportError(f"{output} exists already")
    if not (output / DESCRIPTION).is_file():
        raise ExportError(f"{output} is no earlier export and will not be replaced")


def _encoder_of(checkpoint: Checkpoint, weights: Weights) -> tuple[EncoderConfig, Encoder]:
    try:
        config = EncoderConfig(**checkpoint.state["encoder"])
        encoder = make_encoder(config, seed=0)
        encoder.load_state_dict(dict(checkpoint.encoder(weights)))
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise NoCheckpointError(f"{checkpoint.path} holds no encoder: {error}") from error
    return config, encoder.eval()


@torch.no_grad()
def _write(encoder: Encoder, config: EncoderConfig, format_name: FormatName, folder: Path) -> float:
    """Write the encoder, read it as its users will, and say how far their features are apart."""
    side = config.image_size_px
    images = torch.randn(_TRIAL_IMAGES, 3, side, side, generator=torch.Generator().manual_seed(0))
    expected = encoder(images)
    try:
        FORMATS[format_name].write(encoder, config, folder)
        found = FORMATS[format_name].features(folder, images)
    except ImportError as error:
        raise ExportError(
            f"the format {format_name} needs {error.name}: pip install 'synthrep-trainer[export]'"
        ) from error
    return _compare(found, expected)


def _compare(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        raise ExportError(f"features are {tuple(found.shape)}, not {tuple(expected.shape)}")
    difference = float((found - expected).abs().max())
    if not difference <= TOLERANCE:
        raise ExportError(f"features differ by {difference:.1e}, more than {TOLERANCE}")
    return difference


def _flush(folder: Path) -> None:
    mode = (folder / DESCRIPTION).stat().st_mode
    for path in folder.iterdir():
        path.chmod(mode)  # safetensors makes files that only their owner can read
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    sync_folder(folder)


def _publish(written: Path, output: Path, *, replace: bool) -> None:
    """Give the folder its name; an earlier export loses it first, so that no mixture is seen."""
    _check_output(output, replace=replace)
    if output.exists():
        aside = temporary_path(output.parent, output.name)
        output.rename(aside)
        written.rename(output)
        shutil.rmtree(aside)
    else:
        written.rename(output)
    sync_folder(output.parent)
