"""What the demo leaves: figures for programs, and a page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
import json
import re
import tarfile
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from synthrep_cli.probe_table import ProbeRow, probe_table
from synthrep_cli.report import DemoReport, write_report
from synthrep_shared.client import SynthRep
from synthrep_shared.messages import ProbeView

ROW = ProbeRow(
    dataset="digits", protocol="linear", metric="accuracy", n_test=100, trained=0.932,
    ci95=(0.921, 0.943), random_init=0.5, random_init_ci95=(0.45, 0.55), pixels=0.6,
    pixels_ci95=(0.55, 0.65), majority=0.1,
)  # fmt: skip
REPORT = DemoReport(
    images_generated=12, groups_committed=6, train_steps=40, images_trained=1280, wall_s=90.0,
    first_step_at="2026-01-01T00:00:10+00:00", last_shard_committed_at="2026-01-01T00:01:00+00:00",
    steps_before_last_shard=25, probes=[ROW, replace(ROW, dataset="fashion", trained=0.52,
    ci95=(0.48, 0.56))],
    metrics=[{"step": step, "loss": 3.0 - step / 40} for step in range(1, 41)],
)  # fmt: skip


class DataSet:
    """A generator's data set `demo` whose shards hold some groups of two images each."""

    def __init__(self, num_shards: int, groups_per_shard: int, suffix: str = "jpg") -> None:
        self._suffix = suffix
        self.tars = {
            f"{seq:08d}.tar": self._tar(seq, groups_per_shard) for seq in range(1, num_shards + 1)
        }
        self.fetched: list[str] = []

    def _tar(self, seq: int, num_groups: int) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as tar:
            for group in range(num_groups):
                for k in range(2):
                    caption = f"caption {seq}.{group} <b>&"
                    files = {
                        self._suffix: f"image {seq}.{group}.{k}".encode(),
                        "json": json.dumps({"caption": caption}).encode(),
                    }
                    for suffix, data in files.items():
                        info = tarfile.TarInfo(f"{seq:016x}{group:016x}-{k}.{suffix}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
        return stream.getvalue()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        name = request.url.path.rpartition("/")[2]
        if name in self.tars:
            self.fetched.append(name)
            return httpx.Response(200, content=self.tars[name])
        created_at = datetime(2026, 1, 1, tzinfo=UTC).isoformat()
        items = [
            {"seq": int(name[:8]), "name": name, "sha256": "", "bytes": len(data), "groups": 1,
             "images": 2, "created_at": created_at}
            for name, data in self.tars.items()
        ]  # fmt: skip
        return httpx.Response(200, json={"items": items, "next_cursor": None})


class Page(HTMLParser):
    """What a page refers to, and its images."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.images: list[bytes] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action") and value:
                if value.startswith("data:image/"):
                    self.images.append(base64.b64decode(value.partition(",")[2]))
                elif not value.startswith("#"):
                    self.references.append(value)


def write(folder: Path, dataset: DataSet, report: DemoReport = REPORT) -> str:
    with SynthRep(transport=httpx.MockTransport(dataset)) as client:
        write_report(report, client, "demo", folder)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_refers_to_nothing_outside_of_itself(tmp_path):
    text = write(tmp_path, DataSet(2, 3))
    page = Page(text)
    assert page.references == []
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert re.findall(r"@import|url\((?!#)", text) == []


def test_the_page_shows_every_image_beside_its_caption(tmp_path):
    text = write(tmp_path, DataSet(2, 3))
    assert Page(text).images == [
        f"image {seq}.{group}.{k}".encode()
        for seq in (1, 2) for group in range(3) for k in range(2)
    ]  # fmt: skip
    assert text.count("caption 2.1 &lt;b&gt;&amp;") == 1


@pytest.mark.parametrize(("suffix", "kind"), [("jpg", "jpeg"), ("png", "png"), ("webp", "webp")])
def test_images_keep_their_format(tmp_path, suffix, kind):
    text = write(tmp_path, DataSet(1, 1, suffix))
    assert text.count(f"data:image/{kind};base64,") == 2


def test_a_large_data_set_is_shown_in_part_from_shards_all_over(tmp_path):
    dataset = DataSet(100, 3)
    page = Page(write(tmp_path, dataset))
    assert len(page.images) == 24 * 2
    assert len(dataset.fetched) <= 25
    shown = {int(image.split()[1].split(b".")[0]) for image in page.images}
    assert min(shown) == 1
    assert max(shown) > 90


def test_the_page_has_a_table_and_two_charts(tmp_path):
    text = write(tmp_path, DataSet(1, 1))
    page = Page(text)
    assert page.tags.count("svg") == 2
    assert "<td>digits</td><td>100</td><td><b>93.2% [92.1, 94.3]</b></td>" in text
    assert "25 of 40 steps were done before the last shard" in text.replace("\n", " ")


def test_names_from_outside_are_escaped(tmp_path):
    row = replace(ROW, dataset="<script>alert(1)</script>")
    page = Page(write(tmp_path, DataSet(1, 1), replace(REPORT, probes=[row])))
    assert "script" not in page.tags


@pytest.mark.parametrize(
    "changes",
    [
        {"trained": 1.0, "ci95": (0.96, 1.0 - 1e-12)},
        {"pixels": 0.0, "pixels_ci95": (1e-12, 0.04)},
    ],
)
def test_an_interval_may_end_at_its_value_but_for_rounding(tmp_path, changes):
    report = replace(REPORT, probes=[replace(ROW, **changes)])
    assert Page(write(tmp_path, DataSet(1, 1), report)).tags.count("svg") == 2


def test_the_json_has_the_figures_that_programs_read(tmp_path):
    write(tmp_path, DataSet(1, 1))
    found = json.loads((tmp_path / "report.json").read_text())
    assert set(found) == {
        "images_generated", "groups_committed", "train_steps", "images_trained", "wall_s",
        "first_step_at", "last_shard_committed_at", "steps_before_last_shard", "probes",
    }  # fmt: skip
    assert set(found["probes"][0]) == {
        "dataset", "protocol", "metric", "n_test", "trained", "ci95", "random_init",
        "random_init_ci95", "pixels", "pixels_ci95", "majority",
    }  # fmt: skip
    assert found["probes"][0]["ci95"] == [0.921, 0.943]


def test_the_table_says_which_encoder_is_better_beyond_chance():
    console = Console(file=io.StringIO(), width=80)
    console.print(probe_table(REPORT.probes))
    lines = console.file.getvalue().splitlines()
    found = {}
    for name in ("digits", "fashion"):
        (place,) = [i for i, line in enumerate(lines) if name in line]
        found[name] = lines[place : place + 2]
    assert ["93.2%" in found["digits"][0], "92.1–94.3" in found["digits"][1]] == [True, True]
    assert "better" in found["digits"][0]
    assert ["52.0%" in found["fashion"][0], "48.0–56.0" in found["fashion"][1]] == [True, True]
    assert "better" not in found["fashion"][0]
    assert "overlap" in found["fashion"][0]
    assert "linear" in lines[0]


def test_a_completed_probe_becomes_a_row():
    def score(value: float) -> dict[str, object]:
        return {"value": value, "ci95": [value - 0.05, value + 0.05]}

    view = ProbeView.model_validate(
        {
            "id": "p", "state": "completed", "request": {}, "dataset": "digits",
            "protocol": "linear", "metric": "accuracy", "value": 0.9, "ci95": [0.85, 0.95],
            "n_test": 70, "created_at": datetime(2026, 1, 1, tzinfo=UTC),
            "baselines": {"random_init": score(0.5), "pixels": score(0.6), "majority": score(0.1)},
        }
    )  # fmt: skip
    row = ProbeRow.from_view(view)
    assert (row.dataset, row.n_test, row.trained, row.ci95) == ("digits", 70, 0.9, (0.85, 0.95))
    assert (row.random_init, row.pixels, row.majority) == (0.5, 0.6, 0.1)
    assert row.pixels_ci95 == pytest.approx((0.55, 0.65))
