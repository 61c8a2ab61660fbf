"""Images that were imported train through the path of generated ones."""

from __future__ import annotations

import numpy as np
import simplejpeg
from typer.testing import CliRunner

from synthrep_cli.main import app
from synthrep_shared.messages import RunRequest
from synthrep_trainer import train
from synthrep_trainer.metrics import read_metrics
from synthrep_trainer.runs import Workplace
from synthrep_trainer.settings import TrainerSettings


def test_a_tree_of_images_is_imported_and_trained_on(tmp_path):
    dice = np.random.default_rng(0)
    for number in range(12):
        file = tmp_path / "tree" / f"bird {number % 4}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = dice.integers(0, 255, (20, 24, 3), dtype=np.uint8)
        file.write_bytes(simplejpeg.encode_jpeg(pixels))
    root = str(tmp_path / "data")
    command = ["dataset", "import", str(tmp_path / "tree"), "--dataset", "birds", "--root", root]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "12 images of 4 captions = 12 imported + 0 refused + 0 decided before" in result.output
    assert CliRunner().invoke(app, ["dataset", "verify", "birds", "--root", root]).exit_code == 0

    settings = TrainerSettings(root=root, runs=tmp_path / "runs", device="cpu", threads=1)
    for objective in ("simclr", "stablerep"):
        request = RunRequest(
            dataset="birds", objective=objective, max_steps=3, captions_per_batch=6, image_size=16,
            images_per_caption=1,
        )  # fmt: skip
        run = Workplace(settings.runs).submit_run(request)
        assert train.run(run, settings, lambda: False)
        lines = read_metrics(run.metrics, after=0, limit=10)
        assert [line["step"] for line in lines] == [1, 2, 3]
        assert lines[-1]["images_committed"] == 12
        assert lines[-1]["loss"] > 0
        assert lines[-1]["shards_quarantined"] == 0
