"""The judges on tiny random models of the real classes, against plain calls of these."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
checkers = pytest.importorskip("diffusers.pipelines.stable_diffusion.safety_checker")

from safetensors.torch import load_file, save  # noqa: E402

from synthrep_generator.chunks import Place, chunk_from_places  # noqa: E402
from synthrep_generator.errors import JudgeMissingError, ModelFilesMissingError  # noqa: E402
from synthrep_generator.image_judges import ClipScorer, SafetyChecker  # noqa: E402
from synthrep_generator.judge_files import (  # noqa: E402
    SafetyFiles,
    check_judges,
    find_safety_checker,
)
from synthrep_generator.pipe import Finished  # noqa: E402
from synthrep_generator.settings import GeneratorSettings, ModelConfig  # noqa: E402
from synthrep_generator.supervisor import Supervisor  # noqa: E402
from synthrep_generator.synthesis import ImageTask, paint  # noqa: E402
from synthrep_shared.messages import GenerationSettings, QualityGate  # noqa: E402

TOKENS, WIDTH, SIDE_PX = 12, 32, 32
IMAGES = [paint(ImageTask("a bird", seed), 48) for seed in range(5)]


def vision() -> Any:
    return {
        "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": SIDE_PX, "patch_size": 8,
    }  # fmt: skip


def save_processor(folder: Path) -> None:
    size = {"shortest_edge": SIDE_PX}
    transformers.CLIPImageProcessor(size=size, crop_size=SIDE_PX).save_pretrained(folder)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP that reads letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS
    )
    tokenizer.save_pretrained(folder)
    text = {
        "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": len(tokens), "max_position_embeddings": TOKENS,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision(), projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(folder)
    save_processor(folder)
    return folder


@pytest.fixture(scope="session")
def checker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random safety checker that marks images by one concept: about half of them."""
    folder = tmp_path_factory.mktemp("checker")
    torch.manual_seed(0)
    config = transformers.CLIPConfig(vision_config=vision(), projection_dim=16)
    model = checkers.StableDiffusionSafetyChecker(config)
    model.concept_embeds.data.normal_()
    model.special_care_embeds.data.normal_()
    model.special_care_embeds_weights.data.fill_(2.0)  # no cosine is above
    save_processor(folder)
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    pixels = processor(IMAGES, return_tensors="pt").pixel_values
    with torch.no_grad():
        embeds = model.visual_projection(model.vision_model(pixels)[1])
    cosines = checkers.cosine_distance(embeds, model.concept_embeds)[:, 0]
    model.concept_embeds_weights.data.fill_(2.0)
    model.concept_embeds_weights.data[0] = cosines.median()
    model.save_pretrained(folder)
    return folder


def test_scores_are_the_cosines_of_the_model(clip: Path) -> None:
    captions = ["a bird", "bees", "a bird", "an owl", "the longest caption of all these here"]
    scores = ClipScorer(clip, device="cpu").scores(IMAGES, captions)
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip)
    processor = transformers.CLIPImageProcessor.from_pretrained(clip)
    for image, caption, score in zip(IMAGES, captions, scores, strict=True):
        tokens = tokenizer(caption, truncation=True, max_length=TOKENS, return_tensors="pt")
        with torch.no_grad():
            answer = model(
                **tokens, pixel_values=processor(image, return_tensors="pt").pixel_values
            )
        wanted = float((answer.image_embeds * answer.text_embeds).sum())
        assert score == pytest.approx(wanted, abs=1e-5)
    assert len({round(score, 4) for score in scores}) > 1


def test_verdicts_are_those_of_the_checker_and_the_images_stay(checker: Path) -> None:
    images = [image.copy() for image in IMAGES]
    marks = SafetyChecker(SafetyFiles(checker, checker), device="cpu").are_unsafe(images)
    assert sum(marks) == 2
    for image, mark in zip(IMAGES, marks, strict=True):
        (alone,) = SafetyChecker(SafetyFiles(checker, checker), device="cpu").are_unsafe([image])
        assert alone == mark
    assert all(np.array_equal(a, b) for a, b in zip(images, IMAGES, strict=True))


def test_folders_without_models_are_named(tmp_path: Path, clip: Path) -> None:
    with pytest.raises(ModelFilesMissingError, match="absent"):
        ClipScorer(tmp_path / "absent", device="cpu")
    with pytest.raises(ModelFilesMissingError, match="absent"):
        SafetyChecker(SafetyFiles(tmp_path / "absent", clip), device="cpu")


def without_a_tensor(file: Path) -> bytes:
    weights = load_file(file)
    weights.pop(min(weights))
    return bytes(save(weights))


@pytest.mark.parametrize("judge", ["clip", "checker"])
@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("model.safetensors", without_a_tensor, "has no "),
        ("config.json", lambda _: b"null", "cannot load"),
        ("preprocessor_config.json", lambda _: b"[]", "cannot load"),
    ],
)
def test_judges_that_are_not_whole_do_not_judge(
    judge: str, tmp_path: Path, name: str, spoil: Any, reason: str, request: pytest.FixtureRequest
) -> None:
    """Weights that are missing would be random numbers: nobody would see unsafe images."""
    folder = tmp_path / judge
    shutil.copytree(request.getfixturevalue(judge), folder)
    (folder / name).write_bytes(spoil(folder / name))
    with pytest.raises(ModelFilesMissingError, match=reason):
        load_judge(judge, folder)


def load_judge(judge: str, folder: Path) -> Any:
    if judge == "clip":
        return ClipScorer(folder, device="cpu")
    return SafetyChecker(SafetyFiles(folder, folder), device="cpu")


def test_a_scorer_that_knows_no_words_does_not_judge(clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip, folder)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()
    with pytest.raises(ModelFilesMissingError, match="knows no words"):
        load_judge("clip", folder)


def test_the_configured_checker_goes_before_the_model_s_own(tmp_path: Path, checker: Path) -> None:
    model = ModelConfig(path=tmp_path)
    bare, configured = GeneratorSettings(), GeneratorSettings(safety_checker_path=checker)
    assert find_safety_checker(bare, model) is None
    (tmp_path / "safety_checker").mkdir()
    (tmp_path / "safety_checker" / "config.json").write_text("{}")
    (tmp_path / "feature_extractor").mkdir()
    own = SafetyFiles(tmp_path / "safety_checker", tmp_path / "feature_extractor")
    assert find_safety_checker(bare, model) == own
    assert find_safety_checker(configured, model) == SafetyFiles(checker, checker)


@pytest.mark.parametrize(
    ("gate", "needed"),
    [({"safety": True}, "SAFETY_CHECKER_PATH"), ({"min_clip_score": 0.2}, "CLIP_PATH")],
)
def test_a_gate_that_cannot_be_kept_names_what_to_configure(
    tmp_path: Path, gate: dict[str, Any], needed: str
) -> None:
    asked = GenerationSettings(quality_gate=QualityGate.model_validate(gate))
    model = ModelConfig(path=tmp_path)
    with pytest.raises(JudgeMissingError, match=needed):
        check_judges(asked, GeneratorSettings(), model)
    everything = GeneratorSettings(clip_path=tmp_path, safety_checker_path=tmp_path)
    check_judges(asked, everything, model)
    check_judges(GenerationSettings(quality_gate=QualityGate()), GeneratorSettings(), model)


def test_a_device_process_judges_with_the_configured_models(
    generator_stack: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    clip: Path,
    checker: Path,
) -> None:
    stack = generator_stack(clip_path=str(clip), safety_checker_path=str(checker))
    for name, value in stack.environment().items():
        monkeypatch.setenv(name, value)
    gate = QualityGate(duplicates=False, safety=True, min_clip_score=-0.9, max_attempts=2)
    stack.accept(["a robin", "a wren", "a crow"], images=1, quality_gate=gate)
    impossible = QualityGate(min_clip_score=1.0, max_attempts=2)
    stack.accept(["a gull"], batch="b1", images=1, quality_gate=impossible)
    supervisor = Supervisor(stack.settings)
    try:
        chunk = chunk_from_places("birds", [Place("b0", i) for i in range(3)])
        outcome = supervisor.run(chunk, lambda: None)
        assert isinstance(outcome, Finished)
        assert outcome.committed + outcome.failed == 3
        assert set(outcome.filtered) <= {"safety"}
        poor = supervisor.run(chunk_from_places("birds", [Place("b1", 0)]), lambda: None)
        assert isinstance(poor, Finished)
        assert (poor.failed, poor.filtered) == (1, {"caption": 2})
    finally:
        supervisor.kill()
