"""Where the models are that judge images, and whether a batch may ask for them; loads none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from synthrep_generator.errors import JudgeMissingError
from synthrep_generator.settings import GeneratorSettings, ModelConfig
from synthrep_shared.messages import GenerationSettings


@dataclass(frozen=True)
class SafetyFiles:
    """The folders of a StableDiffusionSafetyChecker and of the CLIPImageProcessor before it."""

    checker: Path
    processor: Path


def find_safety_checker(settings: GeneratorSettings, model: ModelConfig) -> SafetyFiles | None:
    """The configured checker, else that of the model's own folder; None where neither is."""
    configured = settings.safety_checker_path
    if configured is not None:
        return SafetyFiles(configured, configured)
    own = SafetyFiles(model.path / "safety_checker", model.path / "feature_extractor")
    has_own = (own.checker / "config.json").is_file() and own.processor.is_dir()
    return own if has_own else None


def check_judges(
    asked: GenerationSettings, settings: GeneratorSettings, model: ModelConfig
) -> None:
    """Raises JudgeMissingError if the batch's gate needs a model that is not configured."""
    gate = asked.quality_gate
    if gate is None:
        return
    if gate.safety and find_safety_checker(settings, model) is None:
        raise JudgeMissingError(
            "quality_gate.safety: the model carries no safety checker; "
            "configure SYNTHREP_GENERATOR_SAFETY_CHECKER_PATH"
        )
    if gate.min_clip_score is not None and settings.clip_path is None:
        raise JudgeMissingError(
            "quality_gate.min_clip_score: no CLIP model is here; "
            "configure SYNTHREP_GENERATOR_CLIP_PATH"
        )
