"""Reports of comparisons become tables on the page."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from synthrep_trainer.api import create_app
from synthrep_trainer.page import comparisons
from synthrep_trainer.page.comparisons import newest_names, read_table
from synthrep_trainer.settings import TrainerSettings


def cell(dataset: str, row: str, mean: float, **verdict: bool) -> dict[str, Any]:
    said = {"best": False, "significant": False} | verdict
    return {"dataset": dataset, "row": row, "mean": mean, "ci95": [mean - 0.1, mean + 0.1]} | said


SUMMARY = [
    cell("digits", "stablerep", 0.7, best=True, significant=True),
    cell("digits", "simclr", 0.5),
    cell("digits", "pixels", 0.4),
    cell("emoji", "stablerep", 0.6, best=True),
    cell("emoji", "simclr", 0.5),
]


class Reports:
    """The folder that `synthrep compare` leaves its reports in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self._age = 0

    def write(self, name: str, **fields: Any) -> Path:
        """Add a report, newer than those before it."""
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps({"id": name, "rows": [], "summary": SUMMARY} | fields))
        self._age += 1
        os.utime(path, (self._age, self._age))
        return path


@pytest.fixture
def reports(tmp_path: Path) -> Reports:
    return Reports(tmp_path / "runs" / "comparisons")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[TestClient]:
    settings = TrainerSettings(root=tmp_path / "data", runs=tmp_path / "runs")
    with TestClient(create_app(settings)) as client:
        yield client


def shown(browser: TestClient, query: str = "") -> str:
    answer = browser.get(f"/page/parts/comparisons{query}")
    assert answer.status_code == 200, answer.text
    return html.unescape(answer.text)


def test_a_service_without_any_names_the_command(browser):
    assert "synthrep compare" in shown(browser)
    assert "<table" not in shown(browser)


def test_only_what_is_significantly_best_is_bold_and_called_so(browser, reports):
    reports.write("tiny", counted={"digits": True, "emoji": False}, statement=["a draw"])
    text = shown(browser)
    assert re.findall("<b>(.*?)</b>", text) == ["70.0 best"]
    assert "60.0–80.0" in text
    assert text.index('digits <span class="note">counts') < text.index("does not count")
    assert "<li>a draw</li>" in text


def test_rows_come_by_their_average_and_gaps_last(reports):
    table = read_table(reports.write("tiny", summary=[*reversed(SUMMARY)]))
    assert [row.name for row in table.rows] == ["stablerep", "simclr", "pixels"]
    assert table.sets == (("emoji", None), ("digits", None))
    assert table.rows[2].cells[0] is None


def test_intervals_of_a_set_share_a_scale_that_they_fill(reports):
    table = read_table(reports.write("tiny"))
    best, rival, pixels = (row.cells[0] for row in table.rows)
    assert (best.right, pixels.left) == (100, 0)
    assert [one.x for one in (pixels, rival, best)] == [20, 40, 80]
    assert (rival.left, rival.right) == (20, 60)


def test_the_newest_is_shown_and_others_are_picked(browser, reports):
    reports.write("old", statement=["said before"])
    reports.write("new", statement=["said now"])
    assert "said now" in shown(browser)
    assert 'href="/?run=r&comparison=old#comparisons"' in shown(browser, "?run=r")
    assert "said before" in shown(browser, "?comparison=old")
    assert browser.get("/?comparison=old").status_code == 200
    assert browser.get("/?comparison=absent").status_code == 404
    assert browser.get("/?comparison=../old").status_code == 422


def test_many_are_picked_from_a_bounded_list(browser, reports):
    for number in range(60):
        reports.write(f"c{number}")
    text = shown(browser, "?comparison=c20")
    assert text.count("<option") == 50
    assert "<option selected>c20</option>" in text
    assert newest_names(reports.folder, 2) == ["c59", "c58"]


def test_a_table_too_large_to_show_says_where_the_rest_is(browser, reports):
    summary = [cell(f"set{i}", f"row{j}", 0.5) for i in range(30) for j in range(30)]
    reports.write("large", summary=summary)
    text = shown(browser)
    assert text.count("<tr>") == 1 + 24
    assert "/v1/comparisons/large" in text


def test_a_replaced_report_is_read_again_and_the_same_one_is_not(reports, monkeypatch):
    path = reports.write("tiny")
    first = read_table(path)
    with monkeypatch.context() as patch:
        patch.setattr(comparisons, "_table", None)
        assert read_table(path) is first
    assert read_table(reports.write("tiny", summary=SUMMARY[:2])).sets == (("digits", None),)


def test_a_damaged_report_takes_no_other_part_away(browser, reports):
    reports.write("tiny").write_text("{")
    assert "cannot be read" in shown(browser)
    assert browser.get("/").status_code == 200


def test_runs_that_failed_are_told(browser, reports):
    reports.write("tiny", failures=["stablerep, seed 1: <out of memory>", "another"])
    text = browser.get("/page/parts/comparisons").text
    assert "2 runs failed; the first: stablerep, seed 1: &lt;out of memory&gt;" in text
