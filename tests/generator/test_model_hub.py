"""Pulling models from a hub on loopback: what is fetched, checked, refused and gone on with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

pytest.importorskip("huggingface_hub")

from synthrep_generator.errors import ModelConfigError, ModelFilesMissingError, ModelHubError
from synthrep_generator.model_catalogue import CATALOGUE, CatalogueEntry, HubFile
from synthrep_generator.model_files import (
    MANIFEST,
    Manifest,
    check_model_files,
    check_recipe,
    find_model,
    read_manifest,
    usable_models,
)
from synthrep_generator.model_hub import Progress, choose_files, pull_model
from synthrep_generator.settings import GeneratorSettings, ModelConfig
from tests.generator.fake_hub import REVISION, FakeHub, run_hub

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "image_encoder": [None, None],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
}
WEIGHTS = bytes(range(256)) * 4096
FILES = {
    "model_index.json": json.dumps(INDEX).encode(),
    "LICENSE.md": b"you may",
    "README.md": b"a model",
    "v1-5-pruned.ckpt": b"pickle",
    "v1-5-pruned.safetensors": b"all in one",
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.bin": b"pickle",
    "unet/diffusion_pytorch_model.safetensors": WEIGHTS,
    "unet/diffusion_pytorch_model.fp16.safetensors": WEIGHTS[::2],
    "unet/diffusion_pytorch_model.non_ema.safetensors": b"unused",
    "unet/run.py": b"raise SystemExit",
    "tokenizer/vocab.json": b'{"a": 0}',
    "tokenizer/merges.txt": b"#version: 0.2\n",
    "safety_checker/model.safetensors": b"unused",
    "tokenizer/extra/vocab.json": b"{}",
}
NEEDED = {
    "model_index.json",
    "LICENSE.md",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
}
ENTRY = CatalogueEntry(repo="someone/model", revision=REVISION, licence="you may")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with run_hub() as hub:
        hub.repos["someone/model"] = dict(FILES)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_what_a_pipeline_needs_is_fetched_and_nothing_else(hub: FakeHub, tmp_path: Path) -> None:
    manifest, is_new = pull_model("m", ENTRY, tmp_path)
    assert is_new
    assert files_in(tmp_path / "m") == NEEDED | {MANIFEST}
    assert {name for name, _ in hub.requests} == NEEDED
    assert read_manifest(tmp_path / "m") == manifest
    assert (manifest.repo, manifest.revision) == ("someone/model", REVISION)
    for file in manifest.files:
        assert (tmp_path / "m" / file.name).read_bytes() == FILES[file.name]
        assert file.bytes == len(FILES[file.name])
        assert file.sha256 == hashlib.sha256(FILES[file.name]).hexdigest()


def test_a_second_pull_fetches_nothing(hub: FakeHub, tmp_path: Path) -> None:
    first, _ = pull_model("m", ENTRY, tmp_path)
    hub.requests.clear()
    hub.tokens.clear()
    assert pull_model("m", ENTRY, tmp_path) == (first, False)
    assert pull_model("m", ENTRY, tmp_path, verify=True) == (first, False)
    assert (hub.requests, hub.tokens) == ([], [])


def test_verification_finds_a_changed_file_and_brings_it_again(
    hub: FakeHub, tmp_path: Path
) -> None:
    name = "unet/diffusion_pytorch_model.safetensors"
    pull_model("m", ENTRY, tmp_path)
    file = tmp_path / "m" / name
    file.write_bytes(b"x" + WEIGHTS[1:])
    hub.requests.clear()
    assert not pull_model("m", ENTRY, tmp_path)[1], "sizes alone do not tell"
    assert pull_model("m", ENTRY, tmp_path, verify=True)[1]
    assert file.read_bytes() == WEIGHTS
    assert hub.requests == [(name, None)]


@pytest.mark.parametrize(
    "name", ["unet/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json"]
)
def test_a_file_that_is_not_what_the_hub_says_is_refused(
    hub: FakeHub, tmp_path: Path, name: str
) -> None:
    hub.served[name] = b"x" + FILES[name][1:]
    with pytest.raises(ModelHubError, match=name):
        pull_model("m", ENTRY, tmp_path)
    assert not {name, MANIFEST, name + ".part"} & files_in(tmp_path / "m")
    del hub.served[name]
    assert pull_model("m", ENTRY, tmp_path)[1]
    assert files_in(tmp_path / "m") > NEEDED


@pytest.mark.parametrize(
    "name", ["unet/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json"]
)
def test_a_file_that_does_not_end_is_cut_off_at_its_size(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)
    told: list[int] = []
    hub.served[name] = FILES[name] + bytes(8 << 20)
    with pytest.raises(ModelHubError, match="sends more"):
        pull_model("m", ENTRY, tmp_path, progress=Progress(on_bytes=told.append))
    assert not {name, MANIFEST, name + ".part"} & files_in(tmp_path / "m")
    assert sum(told) < 4 << 20


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("model_index.json", 1 << 40),
        ("model_index.json", None),
        ("tokenizer/vocab.json", -1),
        ("tokenizer/vocab.json", None),
        ("unet/diffusion_pytorch_model.safetensors", 1 << 60),
    ],
)
def test_a_size_that_cannot_be_is_refused_before_the_file_comes(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int | None
) -> None:
    listing = hub.listing("someone/model")
    file = next(file for file in listing["siblings"] if file["rfilename"] == name)
    file["size"] = size
    file.pop("lfs", None)
    monkeypatch.setattr(hub, "listing", lambda _: listing)
    with pytest.raises(ModelHubError, match="bytes|how large"):
        pull_model("m", ENTRY, tmp_path)
    assert name not in {path for path, _ in hub.requests}


def test_a_disk_that_fills_up_meanwhile_keeps_its_reserve(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 18)
    name = "unet/diffusion_pytorch_model.safetensors"
    room = 1 << 40

    def fill(count: int) -> None:
        nonlocal room
        if count == 1 << 18:
            room = (1 << 30) + count - 1

    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=room))
    with pytest.raises(ModelHubError, match="kept free"):
        pull_model("m", ENTRY, tmp_path, progress=Progress(on_bytes=fill))
    assert not {name, MANIFEST} & files_in(tmp_path / "m")
    room = 1 << 40
    assert pull_model("m", ENTRY, tmp_path)[1], "the next pull goes on"


def test_a_pull_that_was_cut_off_goes_on_where_it_stopped(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 18)
    name = "unet/diffusion_pytorch_model.safetensors"
    chunks: list[str] = []
    at_hand = ""

    def begin(name: str, size: int) -> None:
        nonlocal at_hand
        at_hand = name

    def cut(count: int) -> None:
        chunks.extend([at_hand] * (count > 0))
        if chunks.count(name) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull_model("m", ENTRY, tmp_path, progress=Progress(begin, cut))
    # Of the third chunk it was told before it was written.
    assert (tmp_path / "m" / (name + ".part")).read_bytes() == WEIGHTS[: 2 << 18]
    assert MANIFEST not in files_in(tmp_path / "m")
    before = [path for path, _ in hub.requests]
    hub.requests.clear()
    told: list[int] = []
    pull_model("m", ENTRY, tmp_path, progress=Progress(on_bytes=told.append))
    assert (name, f"bytes={2 << 18}-") in hub.requests
    assert not set(before) - {name} & {path for path, _ in hub.requests}
    assert (tmp_path / "m" / name).read_bytes() == WEIGHTS
    assert files_in(tmp_path / "m") == NEEDED | {MANIFEST}
    assert sum(told) >= sum(len(FILES[file]) for file in NEEDED)


def test_a_variant_is_fetched_in_place_of_the_plain_weights(hub: FakeHub, tmp_path: Path) -> None:
    entry = replace(ENTRY, settings={"variant": "fp16"})
    pull_model("m", entry, tmp_path)
    assert {f for f in files_in(tmp_path / "m") if f.endswith("safetensors")} == {
        "unet/diffusion_pytorch_model.fp16.safetensors"
    }


def test_weights_that_are_a_pickle_only_are_refused(hub: FakeHub, tmp_path: Path) -> None:
    for name in [name for name in FILES if name.startswith("unet/") and "safetensors" in name]:
        del hub.repos["someone/model"][name]
    with pytest.raises(ModelHubError, match="unet has no safetensors"):
        pull_model("m", ENTRY, tmp_path)
    assert [name for name, _ in hub.requests if name.endswith(".bin")] == []


def test_sharded_weights_and_sentencepiece_models_are_needed() -> None:
    index = {"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T"]}
    names = [
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "tokenizer/spiece.model",
        "model_index.json",
    ]
    plain = choose_files(index, names, None)
    assert sorted(set(names) - set(plain)) == ["text_encoder/model.fp16-00001-of-00002.safetensors"]
    half = choose_files(index, names, "fp16")
    assert [n for n in half if n.endswith("safetensors")] == [names[3]]


def test_names_that_lead_out_of_the_folder_are_not_followed(hub: FakeHub, tmp_path: Path) -> None:
    repo = hub.repos["someone/model"]
    repo["model_index.json"] = json.dumps(INDEX | {"..": ["diffusers", "X"]}).encode()
    for name in ("../evil.json", "LICENSE/../../evil.txt", "unet/../evil.json", "/evil.json"):
        repo[name] = b"{}"
    pull_model("m", ENTRY, tmp_path / "cache")
    assert files_in(tmp_path / "cache" / "m") == NEEDED | {MANIFEST}
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("index", [b"{", b"[]"])
def test_a_repository_that_holds_no_pipeline_is_refused(
    hub: FakeHub, tmp_path: Path, index: bytes
) -> None:
    hub.repos["someone/model"]["model_index.json"] = index
    with pytest.raises(ModelHubError, match="model_index.json"):
        pull_model("m", ENTRY, tmp_path)


def test_another_commit_than_the_pinned_one_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ModelHubError, match="is pinned"):
        pull_model("m", replace(ENTRY, revision="f" * 40), tmp_path)


def test_a_commit_that_is_not_pinned_is_found_and_recorded(hub: FakeHub, tmp_path: Path) -> None:
    manifest, _ = pull_model("m", replace(ENTRY, revision=None), tmp_path)
    assert manifest.revision == REVISION


def test_a_gated_model_tells_what_to_do_and_comes_with_a_token(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated.add("someone/model")
    with pytest.raises(ModelHubError, match="accept its licence .*HF_TOKEN"):
        pull_model("m", ENTRY, tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert pull_model("m", ENTRY, tmp_path)[1]
    assert hub.tokens[-1] == "Bearer hf_secret"


def test_a_hub_without_the_model_is_named_in_one_sentence(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ModelHubError, match="does not give someone/else"):
        pull_model("m", replace(ENTRY, repo="someone/else"), tmp_path)


def test_a_lora_comes_from_its_own_repository(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["other/lora"] = {"style.safetensors": b"weights", "style.bin": b"pickle"}
    entry = replace(ENTRY, loras=(HubFile("other/lora", REVISION, "style.safetensors"),))
    pull_model("m", ENTRY, tmp_path)
    manifest, is_new = pull_model("m", entry, tmp_path)
    assert is_new, "the folder was whole without the LoRA"
    assert "loras/style.safetensors" in {file.name for file in manifest.files}
    assert (tmp_path / "m" / "loras" / "style.safetensors").read_bytes() == b"weights"


def pulled(tmp_path: Path, alias: str = "sd15") -> GeneratorSettings:
    """Settings whose cache holds a model that was pulled under the alias."""
    settings = GeneratorSettings(model_cache=tmp_path)
    with run_hub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        hub.repos["someone/model"] = dict(FILES)
        pull_model(alias, ENTRY, tmp_path)
    return settings


def test_an_alias_of_the_catalogue_is_usable_once_it_was_pulled(tmp_path: Path) -> None:
    settings = GeneratorSettings(model_cache=tmp_path)
    assert list(usable_models(settings)) == ["tiny"]
    with pytest.raises(ModelFilesMissingError, match=r"^run `synthrep models pull sd15`$"):
        find_model(settings, "sd15")
    pulled(tmp_path)
    assert list(usable_models(settings)) == ["tiny", "sd15"]
    model = find_model(settings, "sd15")
    assert (model.path, model.revision) == (tmp_path / "sd15", REVISION)
    assert (model.scheduler, model.num_inference_steps, model.guidance_scale) == ("ddim", 50, 2.0)
    assert (model.generate_px, model.store_px) == (512, 256)
    check_model_files("sd15", model)


def test_a_file_of_another_size_stops_the_load(tmp_path: Path) -> None:
    model = find_model(pulled(tmp_path), "sd15")
    (model.path / "unet" / "config.json").write_text("{} ")
    with pytest.raises(ModelFilesMissingError, match="run `synthrep models pull sd15`"):
        check_model_files("sd15", model)


def test_a_malformed_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "sd15").mkdir()
    (tmp_path / "sd15" / MANIFEST).write_text("{")
    with pytest.raises(ModelFilesMissingError, match="malformed"):
        find_model(GeneratorSettings(model_cache=tmp_path), "sd15")


def test_a_malformed_manifest_takes_no_other_model_along(tmp_path: Path) -> None:
    settings = pulled(tmp_path)
    (tmp_path / "sd15" / MANIFEST).write_text("")
    assert list(usable_models(settings)) == ["tiny"]


def test_a_manifest_that_cannot_be_read_is_a_model_that_is_not_here(tmp_path: Path) -> None:
    settings = GeneratorSettings(model_cache=tmp_path)
    (tmp_path / "sd15" / MANIFEST).mkdir(parents=True)
    assert list(usable_models(settings)) == ["tiny"]
    with pytest.raises(ModelFilesMissingError, match="cannot read"):
        find_model(settings, "sd15")


def test_a_pull_mends_a_malformed_manifest(hub: FakeHub, tmp_path: Path) -> None:
    first, _ = pull_model("m", ENTRY, tmp_path)
    (tmp_path / "m" / MANIFEST).write_text("")
    hub.requests.clear()
    assert pull_model("m", ENTRY, tmp_path) == (first, True)
    assert hub.requests == []  # the files were here, and what the hub says
    assert read_manifest(tmp_path / "m") == first


def test_an_unknown_field_of_a_catalogue_alias_is_named() -> None:
    for field in ("alias", "model_cache", "steps"):
        with pytest.raises(ValidationError, match=field):
            GeneratorSettings.model_validate({"models": {"sd15": {field: "x"}}})


def test_configured_fields_of_a_catalogue_alias_have_priority(tmp_path: Path) -> None:
    given = {"sdxl-lightning": {"store_px": 128}}
    settings = GeneratorSettings(model_cache=tmp_path, models=given)
    model = find_model(settings, "sdxl-lightning")
    assert (model.store_px, model.num_inference_steps, model.scheduler) == (128, 4, "euler")
    assert model.path == tmp_path / "sdxl-lightning"
    assert [str(lora.path) for lora in model.loras] == [
        "loras/sdxl_lightning_4step_lora.safetensors"
    ]
    with pytest.raises(ModelFilesMissingError, match=r"^run `synthrep models pull sdxl-light"):
        check_model_files("sdxl-lightning", model)


@pytest.mark.parametrize("alias", CATALOGUE)
def test_every_entry_of_the_catalogue_is_a_valid_model(alias: str, tmp_path: Path) -> None:
    settings = GeneratorSettings(model_cache=tmp_path, models={alias: {}})
    entry, model = CATALOGUE[alias], settings.models[alias]
    assert model.licence == entry.licence != ""
    assert entry.revision is None or len(entry.revision) == 40
    assert model.device_batch_images == "auto"


def test_the_size_of_a_model_is_that_of_its_files(tmp_path: Path) -> None:
    manifest = read_manifest(pulled(tmp_path).model_cache / "sd15")
    assert isinstance(manifest, Manifest)
    assert manifest.num_bytes == sum(len(FILES[name]) for name in NEEDED)


@pytest.mark.parametrize(
    ("name", "scheduler", "negative_prompt", "reason"),
    [
        ("StableDiffusionPipeline", "flow-match", "", "it takes ddim"),
        ("FluxPipeline", "flow-match", "a bee", "no negative prompt"),
        ("FluxPipeline", "flow-match", "", None),
        ("SomePipeline", "ddim", "", None),
    ],
)
def test_settings_that_do_not_fit_are_known_without_loading(
    tmp_path: Path, name: str, scheduler: str, negative_prompt: str, reason: str | None
) -> None:
    model = ModelConfig(path=tmp_path)
    check_recipe(model, scheduler="anything", negative_prompt="")  # no files, no judgement
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ModelConfigError, match=reason) if reason else contextlib.nullcontext():
        check_recipe(model, scheduler=scheduler, negative_prompt=negative_prompt)


def test_a_device_process_goes_to_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from synthrep_generator import device_process

    def end(*_: object) -> None:
        raise StopIteration

    for name in ("HF_HUB_OFFLINE", "DIFFUSERS_DISABLE_REMOTE_CODE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr("sys.argv", ["device_process", "3", "1"])
    monkeypatch.setattr(device_process, "die_with_parent", lambda _: None)
    monkeypatch.setattr(device_process, "give_way", lambda: None)
    monkeypatch.setattr(device_process.signal, "signal", lambda *_: None)
    monkeypatch.setattr(device_process, "GeneratorSettings", end)
    with pytest.raises(StopIteration):
        device_process.main()
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] == "1"
