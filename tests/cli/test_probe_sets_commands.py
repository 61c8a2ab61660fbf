"""Labelled sets on the command line, against the trainer's real API."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette.testclient import TestClient
from typer.testing import CliRunner

from synthrep_cli.main import app
from synthrep_shared.client import SynthRep
from synthrep_trainer.api import create_app
from synthrep_trainer.settings import TrainerSettings


def make_set(folder: Path) -> Path:
    for class_name in ("cat", "dog"):
        (folder / class_name).mkdir(parents=True)
        for k in range(3):
            stream = io.BytesIO()
            Image.new("RGB", (8, 8), (k, 0, 0)).save(stream, "JPEG")
            (folder / class_name / f"{k}.jpg").write_bytes(stream.getvalue())
    return folder


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs `synthrep probe-sets …` before a trainer that allows folders below `tmp_path`."""
    settings = TrainerSettings(
        root=tmp_path / "data", runs=tmp_path / "runs", probe_folder_roots=(tmp_path,)
    )
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as trainer:

        def handler(request: httpx.Request) -> httpx.Response:
            answer = trainer.request(
                request.method, str(request.url.raw_path, "ascii"), content=request.read(),
                headers={"content-type": request.headers.get("content-type", "")},
            )  # fmt: skip
            return httpx.Response(answer.status_code, json=answer.json())

        client = partial(SynthRep, transport=httpx.MockTransport(handler), retries=0)
        monkeypatch.setattr("synthrep_cli.probe_sets_commands.SynthRep", client)

        def run(*arguments: Any):
            return CliRunner().invoke(app, ["probe-sets", *map(str, arguments)])

        yield run


def test_a_folder_becomes_a_set_that_is_listed(run, tmp_path):
    result = run("add", "mine", make_set(tmp_path / "pets"))
    assert result.exit_code == 0
    assert result.stdout == (
        "mine: 2 classes, train and test; judge on it: synthrep probe RUN --dataset mine\n"
    )
    views = {view["name"]: view for view in json.loads(run("ls", "--json").stdout)}
    assert views["mine"]["classes"] == ["cat", "dog"]
    assert "digits" in views
    listed = run("ls").stdout
    assert "mine" in listed
    assert "train, test" in listed


def test_a_folder_of_the_trainer_is_linked(run, tmp_path):
    for split in ("train", "test"):
        make_set(tmp_path / "pets" / split)
    result = run("add", "mine", tmp_path / "pets", "--on-server", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["splits"] == ["train", "test"]


def test_what_the_trainer_refuses_is_status_1_and_one_sentence(run, tmp_path):
    folder = make_set(tmp_path / "pets")
    assert run("add", "mine", folder).exit_code == 0
    for arguments, reason in (
        (("mine", folder), "remove an uploaded one first"),
        (("other", tmp_path / "absent"), "absent"),
    ):
        result = run("add", *arguments)
        assert result.exit_code == 1
        assert reason in result.stderr
        assert result.stderr.count("\n") == 1
        assert result.stdout == ""


def test_a_name_that_is_none_is_wrong_usage(run, tmp_path):
    assert run("add", "no/name", "/data", "--on-server").exit_code == 2
