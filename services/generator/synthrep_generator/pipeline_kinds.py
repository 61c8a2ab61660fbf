"""What each kind of pipeline takes, known without loading one: pure data and a pure judgement."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PipelineKind:
    """A class of diffusers: the samplers that fit it, and whether it can be steered away."""

    name: str
    samplers: tuple[str, ...]
    takes_negative: bool = True

    def refusal(self, scheduler: str, negative_prompt: str) -> str | None:
        """Why it cannot follow such settings; None if it can."""
        if scheduler not in self.samplers:
            known = ", ".join(self.samplers)
            return f"the scheduler {scheduler} does not fit a {self.name}; it takes {known}"
        if negative_prompt and not self.takes_negative:
            return f"a {self.name} takes no negative prompt"
        return None


_UNET = ("ddim", "dpm++", "euler", "euler-a", "lcm")
_PIXART = ("dpm++", "ddim", "euler")

KINDS = {
    kind.name: kind
    for kind in (
        PipelineKind("StableDiffusionPipeline", _UNET),
        PipelineKind("StableDiffusionXLPipeline", _UNET),
        PipelineKind("LatentConsistencyModelPipeline", ("lcm",), takes_negative=False),
        PipelineKind("StableDiffusion3Pipeline", ("flow-match",)),
        PipelineKind("FluxPipeline", ("flow-match",), takes_negative=False),
        PipelineKind("PixArtAlphaPipeline", _PIXART),
        PipelineKind("PixArtSigmaPipeline", _PIXART),
        PipelineKind("SanaPipeline", ("dpm++", "flow-match")),
    )
}
