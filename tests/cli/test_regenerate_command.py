"""`synthrep regenerate` over a service that answers one group, with the fake model."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import Result
from typer.testing import CliRunner

from synthrep_cli.main import app
from synthrep_generator.shard_writer import encode_image
from synthrep_generator.synthesis import ImageTask, paint
from synthrep_shared.client import SynthRep
from synthrep_shared.samples import SampleMetadata

GID = "ab" * 16
SAMPLE = SampleMetadata(
    caption="a bird", caption_id="0", gid=GID, image_index=0, seed=7, model="tiny",
    model_revision="fake", scheduler="ddim", num_inference_steps=3, guidance_scale=2.0,
    negative_prompt="", stored_px=32, generator_version="0", batch_images=6, image_quality=90,
)  # fmt: skip
STORED = encode_image(paint(ImageTask("a bird", 7), 32), image_format="jpg", quality=90)
GROUP = {
    "gid": GID, "dataset": "birds", "batch": "b0", "index": 0, "caption_id": "0",
    "state": "committed", "rejected": False, "seq": 1, "shard": "s.tar", "images": 2,
    "samples": [SAMPLE.model_dump(mode="json"),
                SAMPLE.model_dump(mode="json") | {"image_index": 1, "seed": 8}],
    "failure": None, "created_at": "2026-01-01T00:00:00Z",
}  # fmt: skip


def answer(request: httpx.Request) -> httpx.Response:
    if request.url.path == f"/v1/groups/{GID}":
        return httpx.Response(200, json=GROUP)
    if request.url.path.startswith(f"/v1/groups/{GID}/images/"):
        return httpx.Response(200, content=STORED)  # of image 1 too, whose seed is another
    return httpx.Response(404, json={"title": "Not Found", "detail": "there is no such group"})


@pytest.fixture(autouse=True)
def service(monkeypatch: pytest.MonkeyPatch) -> None:
    client = partial(SynthRep, transport=httpx.MockTransport(answer))
    monkeypatch.setattr("synthrep_cli.regenerate_command.SynthRep", client)
    monkeypatch.setenv("SYNTHREP_GENERATOR_SYNTHESIZER", "fake")


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["regenerate", *map(str, arguments)])


def test_an_equal_image_is_status_0() -> None:
    result = run(GID, 0)
    assert result.exit_code == 0
    assert "image 0" in result.output
    assert "equal bit for bit" in result.output
    assert "a pass of 6" in result.output


def test_json_has_the_differences(tmp_path: Path) -> None:
    result = run(GID, 0, "--json", "--batch-images", 2, "--output", tmp_path / "again.jpg")
    assert json.loads(result.output) == {
        "gid": GID, "image_index": 0, "equal": True, "mean_difference": 0.0, "max_difference": 0,
        "batch_images": 2, "device": "fake", "dtype": "fake",
    }  # fmt: skip
    assert (tmp_path / "again.jpg").read_bytes() == STORED


def test_another_image_is_status_1() -> None:
    result = run(GID, 1)
    assert result.exit_code == 1
    assert "differs by" in result.output


def test_a_sample_s_file_is_compared_with_the_image_beside_it(tmp_path: Path) -> None:
    file = tmp_path / f"{GID}-0.json"
    file.write_text(SAMPLE.model_dump_json())
    alone = run("--sample", file)
    assert alone.exit_code == 1
    assert "no image beside" in alone.stderr
    file.with_suffix(".jpg").write_bytes(STORED)
    assert run("--sample", file).exit_code == 0


@pytest.mark.parametrize("arguments", [(), (GID,), (GID, "-1"), (GID, 0, "--batch-images", 0)])
def test_what_is_no_image_is_a_wrong_usage(arguments: tuple[Any, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_what_is_not_there_is_one_sentence() -> None:
    beyond, unknown = run(GID, 2), run("cd" * 16, 0)
    assert (beyond.exit_code, unknown.exit_code) == (1, 1)
    assert "has 2 images" in beyond.stderr
    assert "no such group" in unknown.stderr


def test_without_the_model_s_libraries_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "synthrep_generator.regeneration", None)
    result = run(GID, 0)
    assert result.exit_code == 1
    assert "synthrep-generator[worker]" in result.stderr
