"""The probe worker: one checkpoint on one labelled set, beside what it has to beat.

    python -m synthrep_trainer.probes --probe PROBE_FOLDER

Features are the frozen class token. The baselines are the most frequent class, raw pixels, and the
same encoder as it was before its first step. Any checkpoint will do, also of a run in progress.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from synthrep_shared.exposition import exposed, make_registry
from synthrep_shared.logs import configure_logging
from synthrep_shared.messages import ProbeRequest
from synthrep_shared.storage import publish_bytes
from synthrep_trainer.augment import normalise
from synthrep_trainer.checkpoint import Checkpoint, Weights, load_checkpoint, load_newest
from synthrep_trainer.checkpoint_folders import open_checkpoint
from synthrep_trainer.child import exit_status_after
from synthrep_trainer.devices import choose_device
from synthrep_trainer.encoder import Encoder, EncoderConfig, make_encoder
from synthrep_trainer.errors import NoCheckpointError
from synthrep_trainer.feature_cache import FeatureCache
from synthrep_trainer.map_drawing import draw_feature_map
from synthrep_trainer.probe_data import ProbeDataError, ProbeDataset, known_datasets
from synthrep_trainer.probe_features import Memory
from synthrep_trainer.probe_fewshot import FewShotProtocol
from synthrep_trainer.probe_protocols import NeighbourProtocol, ProbeProtocol
from synthrep_trainer.probe_sgd import SgdProtocol
from synthrep_trainer.probing import BASELINES, JUDGED, PIXELS_IDENTITY, default_protocol, probe
from synthrep_trainer.records import Failure
from synthrep_trainer.runs import ProbeFolder, Workplace
from synthrep_trainer.settings import TrainerSettings

_log = logging.getLogger(__name__)
_ROWS_PER_PASS = 256
_PERMANENT = (NoCheckpointError, ProbeDataError, ValueError)


class FrozenEncoder:
    """Maps uint8 RGB images (batch, px, px, 3) to class tokens (batch, width), float32."""

    def __init__(self, encoder: Encoder, device: torch.device) -> None:
        self._encoder, self._device = encoder.to(device).eval(), device

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        passes = torch.from_numpy(images).split(_ROWS_PER_PASS)
        features = [self._encoder(normalise(rows.to(self._device))).cpu() for rows in passes]
        return torch.cat(features).float().numpy()


def encoders_of(
    checkpoint: Checkpoint, weights: Weights = "auto"
) -> tuple[EncoderConfig, Encoder, Encoder]:
    """How the encoder is made, the encoder as it was saved, and as it was before the first step.

    See `Checkpoint.encoder` for `weights`, and what is raised.
    """
    config = EncoderConfig(**checkpoint.state["encoder"])
    seed = checkpoint.state["request"]["seed"]
    trained, untrained = make_encoder(config, seed=seed), make_encoder(config, seed=seed)
    trained.load_state_dict(dict(checkpoint.encoder(weights)))
    return config, trained, untrained


def judge(folder: ProbeFolder, place: Workplace, settings: TrainerSettings) -> None:
    """Write the probe's result. Raises NoCheckpointError, ProbeDataError, ValueError."""
    if folder.result.exists():  # an earlier process was killed while it drew the map
        return
    request = folder.record.request
    checkpoint = _find_checkpoint(request, place)
    dataset = known_datasets(settings).get(request.dataset)
    if dataset is None:
        raise ProbeDataError(f"there is no labelled set {request.dataset!r} any more")
    config, trained, untrained = encoders_of(checkpoint, request.weights)
    device = choose_device(settings.probe_device)
    protocol = _protocol(request, dataset, device=str(device))
    encoder = FrozenEncoder(trained, device)
    result = probe(
        dataset,
        encoder,
        image_px=config.image_size_px,
        protocol=protocol,
        baselines={**BASELINES, "random_init": FrozenEncoder(untrained, device)},
        keep_head=lambda head, names: head.save(
            folder.head, names=names, protocol=f"{protocol.name}/{protocol.version}"
        ),
        memory=_memory(settings, place, checkpoint, request.weights, device),
    )
    answer = result.model_dump(mode="json") | {
        "checkpoint": str(checkpoint.path.relative_to(place.root))
    }
    publish_bytes(json.dumps(answer).encode(), folder.result, replace=True)
    _draw_map(checkpoint, encoder, config, place, settings)


def _draw_map(
    checkpoint: Checkpoint,
    encoder: FrozenEncoder,
    config: EncoderConfig,
    place: Workplace,
    settings: TrainerSettings,
) -> None:
    """The map of the checkpoint's run, which is no part of the result: without it, that stands."""
    run = place.run(checkpoint.path.parents[1].name)
    if run is None or not settings.map_images:
        return
    try:
        draw_feature_map(
            run,
            open_checkpoint(checkpoint.path),
            encoder,
            image_px=config.image_size_px,
            settings=settings,
        )
    except Exception:
        _log.exception("feature_map_failed", extra={"run": run.id})


def _memory(
    settings: TrainerSettings,
    place: Workplace,
    checkpoint: Checkpoint,
    weights: Weights,
    device: torch.device,
) -> Memory | None:
    """What earlier probes left; None if nothing may be kept."""
    if not settings.probe_cache_bytes:
        return None
    start = {"encoder": checkpoint.state["encoder"], "seed": checkpoint.state["request"]["seed"]}
    identities = {
        "pixels": PIXELS_IDENTITY,
        "random_init": f"random-init/{json.dumps(start, sort_keys=True)}/{device.type}",
        JUDGED: f"{open_checkpoint(checkpoint.path).sha256}/{weights}/{device.type}",
    }
    cache = FeatureCache(place.root / "probe-cache", max_bytes=settings.probe_cache_bytes)
    return Memory(cache, identities)


def _protocol(request: ProbeRequest, dataset: ProbeDataset, *, device: str) -> ProbeProtocol:
    """The protocol that a request asks for; raises ProbeDataError if the set cannot be judged."""
    if request.protocol == "knn":
        return NeighbourProtocol()
    if request.protocol == "fewshot":
        return FewShotProtocol(episodes=request.episodes)
    if request.protocol == "imagenet-linear":
        return SgdProtocol(batch_norm=request.batch_norm, device=device)
    return default_protocol(dataset.metric, device=device)


def _find_checkpoint(request: ProbeRequest, place: Workplace) -> Checkpoint:
    """The checkpoint that a request asks for; raises NoCheckpointError."""
    if request.checkpoint is not None:
        path = place.checkpoint(request.checkpoint)
        if path is None:
            raise NoCheckpointError(f"{request.checkpoint} is no longer kept")
        return load_checkpoint(open_checkpoint(path))
    run = place.run(request.run_id or "")
    newest = load_newest(run.checkpoints) if run else None
    if newest is None:
        raise NoCheckpointError(f"run {request.run_id} has no checkpoint yet")
    return newest


def main() -> None:
    """Judge, and leave last words if that fails."""
    parser = argparse.ArgumentParser(prog="synthrep_trainer.probes")
    parser.add_argument("--probe", type=Path, required=True, help="folder of the probe")
    folder = ProbeFolder(parser.parse_args().probe)
    settings = TrainerSettings()
    configure_logging("trainer-probe", settings.log_level)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        with exposed(make_registry(), settings.host, settings.metrics_ports_of_probes):
            judge(folder, Workplace(settings.runs), settings)
    except Exception as error:
        _log.exception("probe_failed", extra={"probe": folder.id})
        words = f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            folder.write_failure(Failure(error=words, is_permanent=isinstance(error, _PERMANENT)))
        sys.exit(exit_status_after(error))
    _log.info("probe_ended", extra={"probe": folder.id})


if __name__ == "__main__":
    main()
