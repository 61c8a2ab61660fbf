"""Every kind of pipeline: loaded from a folder, run in batches, equal to plain calls one by one."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from safetensors.torch import load, load_file, save_file  # noqa: E402
from safetensors.torch import save as save_tensors  # noqa: E402

from synthrep_generator.diffusion import load_synthesizer  # noqa: E402
from synthrep_generator.errors import (  # noqa: E402
    ModelConfigError,
    ModelFilesMissingError,
    PermanentPromptError,
)
from synthrep_generator.model_files import MANIFEST, Manifest, check_recipe  # noqa: E402
from synthrep_generator.pipelines.family import Text  # noqa: E402
from synthrep_generator.pipelines.loading import choose_dtype  # noqa: E402
from synthrep_generator.pipelines.samplers import make_scheduler  # noqa: E402
from synthrep_generator.settings import GeneratorSettings, ModelConfig  # noqa: E402
from synthrep_generator.synthesis import ImageTask, Recipe  # noqa: E402
from tests.generator.tiny_pipelines import BUILDERS, LATENTS, SIDE_PX, WIDTH, save  # noqa: E402

# Kind, sampler and guidance of each; scale 0 or a scale that the network takes: no second pass.
CASES = [
    ("sd15", "ddim", 2.0),
    ("sd15", "lcm", 1.0),
    ("sd21", "ddim", 3.0),
    ("sd21", "dpm++", 3.0),
    ("sdxl", "euler", 5.0),
    ("sdxl", "euler-a", 0.0),
    ("lcm", "lcm", 8.0),
    ("sd3", "flow-match", 4.5),
    ("flux-schnell", "flow-match", 0.0),
    ("flux-dev", "flow-match", 3.5),
    ("pixart", "dpm++", 4.5),
    ("pixart-sigma", "euler", 4.5),
    ("sana", "dpm++", 4.5),
    ("sana", "flow-match", 1.0),
]
DEFAULTS = {kind: sampler for kind, sampler, _ in reversed(CASES)}
TASKS = [ImageTask("a bird", 1), ImageTask("a bird", 2), ImageTask("two red bees", 3)]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a saved pipeline by kind, made when it is first asked for."""
    root = tmp_path_factory.mktemp("pipelines")
    return lambda kind: root / kind if (root / kind).exists() else save(kind, root)


def config(folder: Path, **changes: Any) -> ModelConfig:
    values = {
        "path": folder,
        "generate_px": SIDE_PX,
        "store_px": SIDE_PX,
        "device_batch_images": 4,
        "scheduler": DEFAULTS.get(folder.name, "ddim"),
        "dtype": "fp32",
    }
    return ModelConfig.model_validate(values | changes)


def recipe(sampler: str, scale: float, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "guidance_scale": scale,
        "num_inference_steps": 3,
        "scheduler": sampler,
        "negative_prompt": "",
    }
    return Recipe(**values | changes)


def make(synthesizer: Any, tasks: Sequence[ImageTask], wanted: Recipe) -> list[Any]:
    results: list[Any] = synthesizer.generate(tasks, wanted, lambda: None)
    return results


def plain_pipeline(folder: Path) -> Any:
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipeline = getattr(diffusers, name).from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def by_a_plain_call(pipeline: Any, task: ImageTask, wanted: Recipe, **more: Any) -> Any:
    generator = torch.Generator().manual_seed(task.seed)
    pipeline.scheduler = make_scheduler(
        wanted.scheduler, pipeline.scheduler.config, {}, [generator]
    )
    image = pipeline(
        task.prompt,
        generator=generator,
        guidance_scale=wanted.guidance_scale,
        num_inference_steps=wanted.num_inference_steps,
        height=SIDE_PX,
        width=SIDE_PX,
        output_type="np",
        **more,
    ).images[0]
    return (image * 255).round()


def plain_arguments(kind: str) -> dict[str, Any]:
    if kind in ("pixart", "pixart-sigma", "sana"):
        return {"use_resolution_binning": False, "clean_caption": False}
    return {"max_sequence_length": 256} if kind == "flux-schnell" else {}


@pytest.mark.parametrize(("kind", "sampler", "scale"), CASES)
def test_a_batch_is_what_the_pipeline_makes_one_by_one(
    folders: Any, kind: str, sampler: str, scale: float
) -> None:
    synthesizer = load_synthesizer(config(folders(kind)), device="cpu")
    wanted = recipe(sampler, scale)
    images = make(synthesizer, TASKS, wanted)
    pipeline = plain_pipeline(folders(kind))
    for task, image in zip(TASKS, images, strict=True):
        assert image.shape == (SIDE_PX, SIDE_PX, 3)
        expected = by_a_plain_call(pipeline, task, wanted, **plain_arguments(kind))
        assert np.abs(image - expected).max() <= 1
    # The network is random, so that seeds and captions are all that tell images apart.
    first, other_seed, _ = (image.astype(int) for image in images)
    assert np.abs(first - other_seed).max() > 5


@pytest.mark.parametrize("kind", BUILDERS)
def test_every_sampler_takes_few_steps_or_says_why_not(folders: Any, kind: str) -> None:
    synthesizer = load_synthesizer(config(folders(kind)), device="cpu")
    for sampler in synthesizer._family.kind.samplers:
        for steps in (1, 2):
            wanted = recipe(sampler, 2.0, num_inference_steps=steps)
            (result,) = make(synthesizer, TASKS[:1], wanted)
            assert not isinstance(result, PermanentPromptError) or "at least" in str(result)


@pytest.mark.parametrize("kind", BUILDERS)
def test_an_image_does_not_depend_on_what_is_made_beside_it(folders: Any, kind: str) -> None:
    synthesizer = load_synthesizer(config(folders(kind)), device="cpu")
    # The last of its samplers is the one that adds noise, if any does.
    wanted = recipe(synthesizer._family.kind.samplers[-1], 2.0)
    together = make(synthesizer, TASKS, wanted)
    alone = [make(synthesizer, [task], wanted)[0] for task in reversed(TASKS)][::-1]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1


def test_noise_that_a_flow_sampler_adds_is_of_each_image(folders: Any) -> None:
    options = {"stochastic_sampling": True}
    synthesizer = load_synthesizer(config(folders("sd3"), scheduler_options=options), device="cpu")
    wanted = recipe("flow-match", 1.0)
    together = make(synthesizer, TASKS, wanted)
    (alone,) = make(synthesizer, TASKS[2:], wanted)
    assert np.abs(together[2].astype(int) - alone).max() <= 1


def test_a_tokenizer_may_be_a_sentencepiece_model_alone(folders: Any, tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = tmp_path / "pixart"
    shutil.copytree(folders("pixart"), model)
    shutil.rmtree(model / "tokenizer")
    (model / "tokenizer").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a bird on a tree", "two red bees", "one crow and one gull"] * 20),
        model_prefix=str(model / "tokenizer" / "spiece"),
        vocab_size=26,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>",
        minloglevel=2,
    )  # fmt: skip
    names = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512}
    (model / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(names))
    synthesizer = load_synthesizer(config(model), device="cpu")
    assert 4 < synthesizer.caption_fit("two red bees").tokens < 14
    assert len(make(synthesizer, TASKS, recipe("dpm++", 2.0))) == 3


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "pixart", "sana"])
def test_a_negative_prompt_is_heeded(folders: Any, kind: str) -> None:
    synthesizer = load_synthesizer(config(folders(kind)), device="cpu")
    wanted = recipe(DEFAULTS[kind], 4.0, negative_prompt="a bee")
    (image,) = make(synthesizer, TASKS[:1], wanted)
    more = plain_arguments(kind) | {"negative_prompt": "a bee"}
    expected = by_a_plain_call(plain_pipeline(folders(kind)), TASKS[0], wanted, **more)
    assert np.abs(image - expected).max() <= 1


@pytest.mark.parametrize(
    ("kind", "wanted", "reason"),
    [
        ("flux-schnell", recipe("ddim", 0.0), "ddim does not fit a FluxPipeline; it takes flow-ma"),
        ("sd15", recipe("flow-match", 2.0), "it takes ddim, dpm"),
        ("lcm", recipe("euler", 8.0), "it takes lcm"),
        ("lcm", recipe("lcm", 8.0, num_inference_steps=51), "at most 50 steps"),
        ("flux-dev", recipe("flow-match", 3.5, negative_prompt="a bee"), "no negative prompt"),
        ("pixart", recipe("dpm++", 4.5, num_inference_steps=1), "at least 2 steps"),
    ],
)
def test_what_a_model_cannot_do_fails_with_a_reason(
    folders: Any, kind: str, wanted: Recipe, reason: str
) -> None:
    synthesizer = load_synthesizer(config(folders(kind)), device="cpu")
    results = make(synthesizer, TASKS, wanted)
    assert len(results) == len(TASKS)
    for result in results:
        assert isinstance(result, PermanentPromptError)
        assert reason in str(result)


def test_a_default_that_does_not_fit_the_model_stops_the_load(folders: Any) -> None:
    with pytest.raises(ModelConfigError, match="euler does not fit a FluxPipeline"):
        load_synthesizer(config(folders("flux-dev"), scheduler="euler"), device="cpu")
    with pytest.raises(ModelConfigError, match="multiple of 4"):
        load_synthesizer(config(folders("sd15"), generate_px=30), device="cpu")


@pytest.mark.parametrize("kind", ["sd3", "flux-schnell", "flux-dev", "pixart", "pixart-sigma"])
def test_a_side_that_a_model_cannot_make_stops_the_load(folders: Any, kind: str) -> None:
    makes: list[int] = []
    for side_px in range(SIDE_PX, 2 * SIDE_PX, 4):
        with contextlib.suppress(ModelConfigError):
            synthesizer = load_synthesizer(config(folders(kind), generate_px=side_px), device="cpu")
            wanted = recipe(DEFAULTS[kind], 2.0, num_inference_steps=2)
            assert make(synthesizer, TASKS[:1], wanted)[0].shape == (SIDE_PX, SIDE_PX, 3)
            makes.append(side_px)
    assert makes
    assert makes[0] == SIDE_PX


@pytest.mark.parametrize(
    ("kind", "sampler", "window", "words"),
    [("sd15", "ddim", 12, 11), ("sdxl", "euler", 12, 11), ("sd3", "flow-match", 256, 128),
     ("flux-schnell", "flow-match", 256, 128), ("flux-dev", "flow-match", 512, 256),
     ("pixart", "dpm++", 120, 60), ("pixart-sigma", "dpm++", 300, 150),
     ("sana", "dpm++", 300, 150)],
)  # fmt: skip
def test_captions_beyond_the_window_are_refused_or_made_of_their_start(
    folders: Any, kind: str, sampler: str, window: int, words: int
) -> None:
    synthesizer = load_synthesizer(config(folders(kind)), device="cpu")
    short, long = "x " * (words // 2), "x " * (words + 5)
    assert not synthesizer.caption_fit(short).is_truncated
    fit = synthesizer.caption_fit(long)
    assert (fit.window, fit.is_truncated) == (window, True)
    tasks = [ImageTask(short, 1), ImageTask(long, 1)]
    refuse = recipe(sampler, 2.0, long_captions="refuse")
    made, refused = make(synthesizer, tasks, refuse)
    assert made.shape == (SIDE_PX, SIDE_PX, 3)
    assert f"has {fit.tokens} tokens" in str(refused)
    assert f"takes {window}" in str(refused)
    _, truncated = make(synthesizer, tasks, recipe(sampler, 2.0))
    assert truncated.shape == (SIDE_PX, SIDE_PX, 3)


@pytest.mark.parametrize(
    ("kind", "unit"),
    [("sd15", "x "), ("sdxl", "x "), ("flux-schnell", "x"), ("pixart", "x"), ("sana", "x")],
)
def test_the_window_is_where_more_tokens_stop_to_matter(folders: Any, kind: str, unit: str) -> None:
    synthesizer = load_synthesizer(config(folders(kind)), device="cpu")
    longest = max(n for n in range(1, 310) if not synthesizer.caption_fit(unit * n).is_truncated)
    texts = [Text(unit * n) for n in (longest - 1, longest, longest + 1, longest + 40)]
    shorter, whole, *cut = (e["prompt_embeds"] for e in synthesizer._family.encode(texts))
    assert not torch.equal(shorter, whole)
    assert all(torch.allclose(whole, each, atol=1e-5) for each in cut)


def lora_of(folder: Path, target: Path) -> Path:
    """A random LoRA of the first attention of the denoiser."""
    torch.manual_seed(1)
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = {
        f"{layer}.lora_A.weight": torch.randn(2, WIDTH),
        f"{layer}.lora_B.weight": torch.randn(WIDTH, 2),
    }
    save_file(weights, target)
    return target


def test_a_lora_changes_the_weights_by_its_scale(folders: Any, tmp_path: Path) -> None:
    folder = folders("sd15")
    file = lora_of(folder, tmp_path / "style.safetensors")
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    plain = load_synthesizer(config(folder), device="cpu")._family.denoiser.state_dict()
    loras = [{"path": str(file), "scale": 0.5}]
    fused = load_synthesizer(config(folder, loras=loras), device="cpu")._family.denoiser
    assert fused.state_dict().keys() == plain.keys()
    down, up = load_file(file).values()
    assert torch.allclose(fused.state_dict()[name], plain[name] + 0.5 * up @ down, atol=1e-5)
    others = [key for key in plain if key != name]
    assert all(torch.equal(fused.state_dict()[key], plain[key]) for key in others)


def test_a_lora_that_does_not_fit_is_refused(folders: Any, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    layer = "unet.no_such_layer"
    halves = {
        f"{layer}.lora_A.weight": torch.ones(2, 3),
        f"{layer}.lora_B.weight": torch.ones(3, 2),
    }
    save_file(halves, file)
    with pytest.raises(ModelConfigError, match="other.safetensors"):
        load_synthesizer(config(folders("sd15"), loras=[{"path": file}]), device="cpu")
    with pytest.raises(ModelConfigError, match="takes no LoRA"):
        load_synthesizer(config(folders("pixart"), loras=[{"path": file}]), device="cpu")
    pickle = tmp_path / "style.bin"
    torch.save({}, pickle)
    with pytest.raises(ModelFilesMissingError, match="style.bin"):
        load_synthesizer(config(folders("sd15"), loras=[{"path": pickle}]), device="cpu")


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_half_a_lora_is_refused(folders: Any, tmp_path: Path, half: str) -> None:
    file = lora_of(folders("sd15"), tmp_path / "style.safetensors")
    weights = {name: value for name, value in load_file(file).items() if half in name}
    save_file(weights, file)
    with pytest.raises(ModelFilesMissingError, match="has no unet.down_blocks"):
        load_synthesizer(config(folders("sd15"), loras=[{"path": str(file)}]), device="cpu")


def test_scheduler_options_are_followed_and_unknown_ones_named(folders: Any) -> None:
    folder, wanted = folders("sdxl"), recipe("euler", 5.0)
    options = {"timestep_spacing": "trailing"}
    first = make(load_synthesizer(config(folder), device="cpu"), TASKS[:1], wanted)[0]
    model = config(folder, scheduler_options=options)
    other = make(load_synthesizer(model, device="cpu"), TASKS[:1], wanted)[0]
    assert np.abs(first.astype(int) - other).max() > 1
    with pytest.raises(ModelConfigError, match="no option shift"):
        load_synthesizer(config(folder, scheduler_options={"shift": 1}), device="cpu")


@pytest.mark.parametrize(
    ("config", "options", "clips"),
    [
        (diffusers.DPMSolverMultistepScheduler().config, {}, False),
        (diffusers.EulerDiscreteScheduler().config, {}, False),
        (diffusers.DDIMScheduler(clip_sample=True).config, {}, True),
        (diffusers.EulerDiscreteScheduler().config, {"clip_sample": True}, True),
    ],
)
def test_ddim_clips_latents_only_where_it_is_told_to(
    config: Any, options: dict[str, bool], clips: bool
) -> None:
    assert make_scheduler("ddim", config, options, []).config.clip_sample is clips


@pytest.mark.parametrize(
    "changes",
    [
        {"channels_last": True},
        {"attention": "math"},
        {"vae_tiling": True},
        pytest.param({"compile": True}, marks=pytest.mark.long),
    ],
)
def test_how_the_work_is_done_does_not_change_the_images(
    folders: Any, changes: dict[str, Any]
) -> None:
    folder, wanted = folders("sd15"), recipe("ddim", 2.0)
    plain = make(load_synthesizer(config(folder), device="cpu"), TASKS, wanted)
    tuned = make(load_synthesizer(config(folder, **changes), device="cpu"), TASKS, wanted)
    for one, other in zip(plain, tuned, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1


def test_half_precision_is_near_and_is_what_samples_record(folders: Any) -> None:
    folder, wanted = folders("sd15"), recipe("ddim", 2.0)
    plain = load_synthesizer(config(folder), device="cpu")
    half = load_synthesizer(config(folder, dtype="bf16"), device="cpu")
    assert (plain.dtype, half.dtype) == ("float32", "bfloat16")
    assert half._pipeline.vae.dtype == torch.float32
    assert half._pipeline.text_encoder.dtype == torch.bfloat16
    one, other = make(plain, TASKS[:1], wanted)[0], make(half, TASKS[:1], wanted)[0]
    assert 0 < np.abs(one.astype(int) - other).mean() < 8


@pytest.mark.parametrize(
    ("can", "has_onednn", "chosen"),
    [
        ({"avx512_bf16": True}, True, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, True, torch.bfloat16),
        ({"avx512_bf16": True}, False, torch.float32),
        ({"avx512_bf16": False, "avx512_f": True}, True, torch.float32),
        ({"neon": True}, True, torch.float32),
    ],
)
def test_a_cpu_that_multiplies_bf16_uses_it(
    can: dict[str, bool], has_onednn: bool, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    cpu, path = torch.device("cpu"), Path("model")
    assert choose_dtype(ModelConfig(path=path), cpu) == chosen
    assert choose_dtype(ModelConfig(path=path, dtype="fp32"), cpu) == torch.float32
    assert choose_dtype(ModelConfig(path=path, dtype="bf16"), cpu) == torch.bfloat16


@pytest.mark.parametrize(("multiplies", "chosen"), [(True, "bfloat16"), (False, "float16")])
def test_a_card_that_only_imitates_bf16_takes_fp16(
    multiplies: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def is_supported(including_emulation: bool = True) -> bool:
        return multiplies or including_emulation

    monkeypatch.setattr(
        torch.cuda, "device", lambda device: contextlib.nullcontext(asked.append(device))
    )
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    card = torch.device("cuda:1")
    assert choose_dtype(ModelConfig(path=Path("model")), card) == getattr(torch, chosen)
    assert asked == [card]  # cards of one machine differ


def test_the_encoder_of_sana_is_spared_fp16(folders: Any) -> None:
    pipeline = load_synthesizer(config(folders("sana"), dtype="fp16"), device="cpu")._pipeline
    assert (pipeline.text_encoder.dtype, pipeline.transformer.dtype) == (
        torch.bfloat16,
        torch.float16,
    )
    others = load_synthesizer(config(folders("pixart"), dtype="fp16"), device="cpu")._pipeline
    assert others.text_encoder.dtype == torch.float16


def test_tiny_in_bf16_makes_the_same_images_within_two_grey_levels() -> None:
    tiny = GeneratorSettings().models["tiny"]
    exact, half = (
        load_synthesizer(tiny.model_copy(update={"dtype": dtype}), device="cpu")
        for dtype in ("fp32", "bf16")
    )
    tasks = [ImageTask("a photo of a horse", seed) for seed in range(2)]
    wanted = recipe(tiny.scheduler, tiny.guidance_scale, num_inference_steps=6)
    images = make(half, tasks, wanted)
    for one, other in zip(make(exact, tasks, wanted), images, strict=True):
        assert 0 < np.abs(one.astype(int) - other).mean() < 2
    alone = make(half, tasks[1:], wanted)[0]
    assert np.abs(alone.astype(int) - images[1]).mean() < 1  # whoever shares the batch


def test_a_variant_of_the_weights_is_taken_where_there_is_one(folders: Any, tmp_path: Path) -> None:
    model = tmp_path / "m"
    shutil.copytree(folders("sd15"), model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    synthesizer = load_synthesizer(config(model, variant="fp16"), device="cpu")
    assert len(make(synthesizer, TASKS, recipe("ddim", 2.0))) == 3
    with pytest.raises(ModelFilesMissingError):
        load_synthesizer(config(model), device="cpu")


def test_the_revision_is_that_of_the_manifest_where_there_is_one(
    folders: Any, tmp_path: Path
) -> None:
    model = tmp_path / "m"
    shutil.copytree(folders("sd15"), model)
    assert load_synthesizer(config(model, revision="mine"), device="cpu").revision == "mine"
    manifest = Manifest(alias="m", repo="a/m", revision="f" * 40, licence="", files=())
    (model / MANIFEST).write_text(manifest.model_dump_json())
    assert load_synthesizer(config(model, revision="mine"), device="cpu").revision == "f" * 40


def broken(folder: Path, target: Path, part: str, change: Any) -> ModelConfig:
    """A copy of a model in which `change` gives the new content of a file, or None to remove it."""
    shutil.copytree(folder, target)
    file = target / part
    if (data := change(file.read_bytes())) is None:
        file.unlink()
    else:
        file.write_bytes(data)
    return config(target, scheduler=DEFAULTS[folder.name])


def without_a_tensor(data: bytes) -> bytes:
    weights = load(data)
    weights.pop(min(weights))
    return bytes(save_tensors(weights))


JSON_FILES = ["model_index.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json",
              "tokenizer/tokenizer.json", "unet/config.json", "vae/config.json"]  # fmt: skip


@pytest.mark.parametrize("part", JSON_FILES)
@pytest.mark.parametrize("data", [b"null", b"5", b"{", b"[" * 100_000, b"\xff"])
def test_a_damaged_description_is_a_model_that_is_not_here(
    folders: Any, tmp_path: Path, part: str, data: bytes
) -> None:
    model = broken(folders("sd15"), tmp_path / "sd15", part, lambda _: data)
    with pytest.raises(ModelFilesMissingError):
        load_synthesizer(model, device="cpu")
    check_recipe(model, scheduler="ddim", negative_prompt="")  # which is for workers to judge


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": ["StableDiffusionPipeline"]},
        {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers"]},
        {"_class_name": "StableDiffusionPipeline", "unet": [["diffusers"], "UNet2DConditionModel"]},
        {"_class_name": "StableDiffusionPipeline", "unet": {"class": "UNet2DConditionModel"}},
        {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "NoSuchModel"]},
    ],
)
def test_a_malformed_index_is_a_model_that_is_not_here(
    folders: Any, tmp_path: Path, index: dict[str, Any]
) -> None:
    text = json.dumps(index).encode()
    model = broken(folders("sd15"), tmp_path / "sd15", "model_index.json", lambda _: text)
    with pytest.raises(ModelFilesMissingError):
        load_synthesizer(model, device="cpu")
    if isinstance(index["_class_name"], list):
        check_recipe(model, scheduler="flow-match", negative_prompt="")


@pytest.mark.parametrize(
    ("kind", "file", "change", "reason"),
    [
        ("sd15", "tokenizer/tokenizer.json", lambda _: None, "tokenizer of .* knows no words"),
        ("sana", "tokenizer/tokenizer.json", lambda _: None, "tokenizer of .* knows no words"),
        ("sd15", "tokenizer/tokenizer_config.json", lambda _: None, "to the 12 tokens"),
        ("sd15", "text_encoder/model.safetensors", without_a_tensor, "encoder has no"),
        ("sd3", "text_encoder_3/model.safetensors", without_a_tensor, "encoder_3 has no"),
        ("sd15", "unet/diffusion_pytorch_model.safetensors", without_a_tensor, "unet of .* has no"),
        ("sana", "vae/diffusion_pytorch_model.safetensors", without_a_tensor, "vae of .* has no"),
    ],
)
def test_what_a_model_lacks_is_not_made_up(
    folders: Any, tmp_path: Path, kind: str, file: str, change: Any, reason: str
) -> None:
    model = broken(folders(kind), tmp_path / kind, file, change)
    with pytest.raises(ModelFilesMissingError, match=reason):
        load_synthesizer(model, device="cpu")


def test_noise_has_the_shape_of_the_latents(folders: Any) -> None:
    synthesizer = load_synthesizer(config(folders("flux-schnell")), device="cpu")
    assert synthesizer._family.noise_shape(SIDE_PX) == (LATENTS, 8, 8)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "sampler", "scale"), CASES)
def test_every_kind_runs_on_cuda(folders: Any, kind: str, sampler: str, scale: float) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = config(folders(kind), device_batch_images="auto", dtype="bf16")
    synthesizer = load_synthesizer(model, device="cuda")
    assert synthesizer.batch_images >= 2
    images = make(synthesizer, TASKS * 20, recipe(sampler, scale))
    exact = load_synthesizer(config(folders(kind)), device="cpu")
    expected = make(exact, TASKS, recipe(sampler, scale))
    for image, other in zip(images, expected, strict=False):
        assert np.abs(image.astype(int) - other).mean() < 12
