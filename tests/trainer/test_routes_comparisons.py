"""The table of a comparison over REST."""

from __future__ import annotations

import json

import pytest
from starlette.testclient import TestClient

from synthrep_trainer.api import create_app
from synthrep_trainer.settings import TrainerSettings

CELL = {"dataset": "digits", "row": "stablerep", "mean": 0.5, "ci95": [0.4, 0.6],
        "best": True, "significant": False}  # fmt: skip


@pytest.fixture
def api(tmp_path):
    settings = TrainerSettings(runs=tmp_path / "runs", root=tmp_path / "data")
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


def test_the_report_of_a_comparison_is_served(api, tmp_path):
    folder = tmp_path / "runs" / "comparisons"
    folder.mkdir()
    report = {"id": "tiny", "rows": [], "summary": [CELL], "statement": ["a draw"]}
    (folder / "tiny.json").write_text(json.dumps(report))
    answer = api.get("/v1/comparisons/tiny")
    assert answer.status_code == 200
    assert answer.json() == {"id": "tiny", "summary": [CELL], "statement": ["a draw"],
                             "counted": {}, "failures": []}  # fmt: skip


def test_one_that_is_not_there_is_404_and_one_that_cannot_be_read_503(api, tmp_path):
    assert api.get("/v1/comparisons/tiny").status_code == 404
    assert api.get("/v1/comparisons/..%2Ftiny").status_code == 404
    assert api.get("/v1/comparisons/TINY").status_code == 422
    (tmp_path / "runs" / "comparisons").mkdir()
    (tmp_path / "runs" / "comparisons" / "tiny.json").write_text("{}")
    assert api.get("/v1/comparisons/tiny").status_code == 503
