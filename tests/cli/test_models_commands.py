"""`synthrep models`: what there is, and how it comes here, against a hub on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

pytest.importorskip("huggingface_hub")

from synthrep_cli.main import app
from synthrep_generator.model_catalogue import CATALOGUE
from tests.generator.fake_hub import FakeHub, run_hub

SD15 = CATALOGUE["sd15"]
INDEX = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with run_hub() as hub:
        hub.revision = SD15.revision or ""
        hub.repos[SD15.repo] = {
            "model_index.json": json.dumps(INDEX).encode(),
            "unet/config.json": b"{}",
            "unet/diffusion_pytorch_model.fp16.safetensors": b"weights" * 1000,
        }
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("SYNTHREP_GENERATOR_MODEL_CACHE", str(tmp_path))
        yield hub


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["models", *arguments])


def states() -> dict[str, str]:
    return {row["alias"]: row["state"] for row in json.loads(run("ls", "--json").stdout)}


def test_a_pull_tells_licence_revision_and_place_and_the_next_one_that_all_is_there(
    hub: FakeHub, tmp_path: Path
) -> None:
    first = run("pull", "sd15")
    assert first.exit_code == 0, first.output
    for word in (SD15.licence, SD15.revision, "7000 bytes", f"pulled into {tmp_path / 'sd15'}"):
        assert str(word) in first.stdout
    for options in ([], ["--verify"]):
        again = run("pull", "sd15", *options)
        assert again.exit_code == 0
        assert again.stdout.endswith("up to date\n")


def test_a_malformed_manifest_is_shown_as_damage(hub: FakeHub, tmp_path: Path) -> None:
    run("pull", "sd15")
    assert states()["sd15"] == "here"
    (tmp_path / "sd15" / "manifest.json").write_text("")
    assert states()["sd15"] == "damaged"


def test_a_setting_that_is_no_json_is_told_in_one_sentence(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNTHREP_GENERATOR_API_KEYS", '["planted-secret')
    result = run("ls")
    assert result.exit_code == 2
    assert "api_keys" in result.output
    assert "planted-secret" not in result.output
    assert len(result.output.splitlines()) == 1


def test_programs_get_the_manifest(hub: FakeHub) -> None:
    manifest = json.loads(run("pull", "sd15", "--json").stdout)
    assert (manifest["alias"], manifest["repo"]) == ("sd15", SD15.repo)
    assert manifest["files"][0]["name"] == "model_index.json"


def test_the_list_says_what_is_here(hub: FakeHub, tmp_path: Path) -> None:
    before = states()
    assert before == {"tiny": "here"} | dict.fromkeys(CATALOGUE, "not pulled")
    run("pull", "sd15")
    assert states() == before | {"sd15": "here"}
    (tmp_path / "sd15" / "unet" / "config.json").unlink()
    assert states()["sd15"] == "damaged"
    for_people = run("ls").stdout
    assert "not pulled" in for_people
    assert "flux-schnell" in for_people


def test_an_unknown_alias_is_told_what_there_is(hub: FakeHub) -> None:
    result = run("pull", "no-such-model")
    assert result.exit_code == 1
    assert "sd15" in result.output
    assert "Traceback" not in result.output


def test_a_hub_that_refuses_is_one_sentence(hub: FakeHub) -> None:
    hub.gated.add(SD15.repo)
    result = run("pull", "sd15")
    assert result.exit_code == 1
    assert "HF_TOKEN" in result.output
    assert states()["sd15"] == "not pulled"
