"""What the API says of runs and probes, from their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from synthrep_shared.messages import CheckpointView, ProbeView, RunView
from synthrep_trainer.checkpoint_folders import CheckpointFolder
from synthrep_trainer.metrics import last_metrics
from synthrep_trainer.runs import ProbeFolder, RunFolder


def run_view(folder: RunFolder) -> RunView:
    """The run as it stands; `loss` and the rates are those of its newest step."""
    record, status = folder.record, folder.status
    newest = last_metrics(folder.metrics) or {}
    state = folder.state
    return RunView(
        id=folder.id,
        state=state,
        request=record.request.model_dump(mode="json"),
        step=newest.get("step", 0),
        max_steps=record.max_steps,
        images_seen=newest.get("images_seen", 0),
        loss=newest.get("loss"),
        generated_per_trained=newest.get("generated_per_trained"),
        images_per_s=newest.get("images_per_s"),
        shards_quarantined=folder.num_quarantined,
        waiting_for=_waiting_for(folder) if state == "running" else "",
        created_at=record.created_at,
        error=status.error if status and state == "failed" else None,
    )


def _waiting_for(folder: RunFolder) -> str:
    try:
        return folder.waiting.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def probe_view(folder: ProbeFolder) -> ProbeView:
    """The probe as it stands, with its result once there is one."""
    record, status = folder.record, folder.status
    state = folder.state
    result: dict[str, Any] = {}
    if state == "completed":
        result = json.loads(folder.result.read_bytes())
    fields = {
        "id": folder.id,
        "state": state,
        "request": record.request.model_dump(mode="json"),
        "checkpoint": record.request.checkpoint,
        "dataset": record.request.dataset,
        "protocol": record.request.protocol,
        "created_at": record.created_at,
        "error": status.error if status and state == "failed" else None,
    }
    return ProbeView.model_validate(fields | result)


def checkpoint_view(checkpoint: CheckpointFolder, root: Path) -> CheckpointView:
    """The checkpoint, named by its path below `root`, the folder of all runs."""
    return CheckpointView(
        step=checkpoint.step,
        path=str(checkpoint.path.relative_to(root)),
        sha256=checkpoint.sha256,
        created_at=checkpoint.manifest.created_at,
        knn_accuracy=checkpoint.manifest.knn_accuracy,
    )
