"""Labelled sets over HTTP."""

from __future__ import annotations

import io
import zipfile

import pytest
from PIL import Image
from starlette.testclient import TestClient

from synthrep_trainer.api import create_app
from synthrep_trainer.settings import TrainerSettings

ZIP = {"content-type": "application/zip"}


def packed(suffix="png", count=3):
    stream, image = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "PNG")
    with zipfile.ZipFile(stream, "w") as archive:
        for k in range(count):
            for name in ("cat", "dog"):
                archive.writestr(f"{name}/{k}.{suffix}", image.getvalue())
    return stream.getvalue()


@pytest.fixture
def api(tmp_path):
    for name in ("train/cat", "train/dog", "test/dog"):
        (tmp_path / "allowed" / "own" / name).mkdir(parents=True)
    settings = TrainerSettings(
        runs=tmp_path / "runs", probe_folder_roots=(tmp_path / "allowed",), probe_upload_bytes=4096
    )
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


def test_an_uploaded_zip_may_be_named_by_probes(api):
    answer = api.post("/v1/probe-datasets?name=mine", content=packed(), headers=ZIP)
    assert answer.status_code == 201
    assert answer.json()["classes"] == ["cat", "dog"]
    assert answer.json()["splits"] == ["train", "test"]
    assert "mine" in [s["name"] for s in api.get("/v1/probe-datasets").json()["items"]]
    probe = api.post("/v1/probes", json={"run_id": "none", "dataset": "mine"})
    assert "no such run" in probe.json()["detail"]


def test_a_folder_under_an_allowed_root_may_be_named(api, tmp_path):
    body = {"name": "own", "folder": str(tmp_path / "allowed" / "own")}
    answer = api.post("/v1/probe-datasets", json=body)
    assert (answer.status_code, answer.json()["splits"]) == (201, ["train", "test"])
    body = {"name": "other", "folder": str(tmp_path)}
    answer = api.post("/v1/probe-datasets", json=body)
    assert (answer.status_code, "no allowed root" in answer.json()["detail"]) == (422, True)


@pytest.mark.parametrize("name", ["digits", "mine"])
def test_a_name_that_is_taken_is_a_conflict(api, name):
    api.post("/v1/probe-datasets?name=mine", content=packed(), headers=ZIP)
    answer = api.post(f"/v1/probe-datasets?name={name}", content=packed(), headers=ZIP)
    assert answer.status_code == 409


@pytest.mark.parametrize(
    ("query", "content", "media_type", "status"),
    [
        ("?name=x", b"no zip", "application/zip", 422),
        ("?name=x", packed("exe"), "application/zip", 422),
        ("?name=../x", packed(), "application/zip", 422),
        ("", packed(), "application/zip", 422),
        ("?name=x", packed(), "text/plain", 415),
        ("?name=x", packed(count=30), "application/zip", 413),
        ("", b"{", "application/json", 422),
        ("", b'{"name": "x", "folder": "' + b"x" * 70_000 + b'"}', "application/json", 413),
    ],
)
def test_a_bad_set_is_refused_and_leaves_nothing(api, tmp_path, query, content, media_type, status):
    headers = {"content-type": media_type}
    answer = api.post(f"/v1/probe-datasets{query}", content=content, headers=headers)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    sets = tmp_path / "runs" / "probe-sets"
    assert not sets.exists() or list(sets.iterdir()) == []


def test_a_body_of_unknown_length_is_measured_as_it_comes(api):
    def chunks():
        for _ in range(8):
            yield bytes(1000)

    answer = api.post("/v1/probe-datasets?name=x", content=chunks(), headers=ZIP)
    assert answer.status_code == 413


def test_uploads_beyond_a_few_at_once_are_put_off(api):
    service = api.app
    while not hasattr(service, "state"):  # behind what is wrapped around it
        service = service._app
    limiter = service.state.probe_uploads
    for other in ("one", "two"):
        api.portal.call(limiter.acquire_on_behalf_of_nowait, other)
    answer = api.post("/v1/probe-datasets?name=mine", content=packed(), headers=ZIP)
    assert answer.status_code == 429
    api.portal.call(limiter.release_on_behalf_of, "one")
    answer = api.post("/v1/probe-datasets?name=mine", content=packed(), headers=ZIP)
    assert answer.status_code == 201
