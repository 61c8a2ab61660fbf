"""A small comparison with the real processes, killed in between and called again."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from synthrep_cli import comparison
from synthrep_cli.comparison import Places, run_comparison
from synthrep_cli.comparison_config import Comparison
from synthrep_cli.comparison_report import write_reports
from synthrep_cli.comparison_rows import read_rows

pytestmark = [pytest.mark.e2e, pytest.mark.redis, pytest.mark.long, pytest.mark.timeout(300)]

CONFIG = Comparison.model_validate({
    "name": "micro", "seeds": [0], "probe_sets": ["stripes"],
    "rows": ["stablerep", "simclr-real", "random-init", "pixels"],
    "generated": {"num_captions": 8, "images_per_caption": 2},
    "real": {"probe_sets": ["digits"], "max_images": 40},
    "budget": {"views": 48, "views_per_batch": 16, "views_per_caption": 2},
    "training": {"image_size": 16, "checkpoint_every": 2},
})  # fmt: skip
FAKE = {"SYNTHREP_GENERATOR_SYNTHESIZER": "fake"}


def write_probe_set(folder: Path) -> None:
    """Two classes that are told apart by brightness, twelve images of each part."""
    folder.mkdir(parents=True)
    dice = np.random.default_rng(0)
    for split in ("train", "test"):
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            for number in range(12):
                label = number % 2
                pixels = dice.integers(100 * label, 100 * label + 120, (16, 16, 3), dtype=np.uint8)
                stream = io.BytesIO()
                Image.fromarray(pixels).save(stream, "PNG")
                for suffix, data in (("png", stream.getvalue()), ("cls", b"%d" % label)):
                    info = tarfile.TarInfo(f"{number:03}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


class Killed(BaseException):
    """Stands for SIGKILL between two results."""


def test_rows_are_made_once_and_a_killed_comparison_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_probe_set(tmp_path / "labelled" / "probe" / "stripes")
    monkeypatch.setenv("SYNTHREP_PROBE_DATA", str(tmp_path / "labelled"))
    places = Places(tmp_path / "run", tmp_path / "rows.jsonl", tmp_path)
    record = comparison.record

    def record_one(*arguments) -> None:
        record(*arguments)
        raise Killed

    monkeypatch.setattr(comparison, "record", record_one)
    with pytest.raises(Killed):
        run_comparison(CONFIG, places, Console(file=io.StringIO()), FAKE)
    monkeypatch.setattr(comparison, "record", record)
    first = places.rows.read_bytes()
    assert 0 < len(read_rows(places.rows)) < 4

    done = run_comparison(CONFIG, places, Console(file=io.StringIO()), FAKE)
    assert places.rows.read_bytes().startswith(first)
    assert sorted(r.row for r in done.rows) == sorted(CONFIG.rows)
    assert len(places.rows.read_text().splitlines()) == 4
    assert (done.failures, done.world) == ([], "drawings")
    assert {r.cost.views for r in done.rows if r.cost} == {48}
    assert len(list((places.folder / "trainer/runs").iterdir())) == 2

    write_reports([done], places.folder)
    report = json.loads((places.folder / "report.json").read_text())
    assert {r["row"] for r in report["rows"]} == set(CONFIG.rows)
    assert [s["significant"] for s in report["summary"]] == [False] * 4
    page = (places.folder / "report.html").read_text()
    assert page.count("<svg") == 2
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", page)
