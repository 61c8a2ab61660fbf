"""SynCLR: a student against its own moving average, small crops, and masked modelling.

    L = L_contrast(global views) + L_contrast(crops), mean over the crops of an image + L_masked

The student's embedding (projector, predictor) of a view is drawn to the averaged teacher's
embeddings (projector) of the other images of its caption; its own image is left out for global
views and stays for crops, as published. Half of the images have half of their patches hidden from
the student, who has to name the teacher's assignment of them to prototypes. The teacher sees whole
global views only. Sizes are those of the paper divided for a CPU unless configured.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from synthrep_trainer import distributed
from synthrep_trainer.encoder import Encoder
from synthrep_trainer.objectives.objective import (
    Features,
    Inputs,
    Objective,
    Outcome,
    Targets,
    Towers,
    in_fp32,
)
from synthrep_trainer.randomness import seeded
from synthrep_trainer.schedules import linear
from synthrep_trainer.teacher_losses import (
    masked_token_loss,
    sinkhorn,
    teacher_contrastive_loss,
)

_STUDENT_TEMPERATURE = 0.1  # of the masked modelling
_WEIGHT_STD = 0.02


@dataclass(frozen=True)
class SynclrConfig:
    """Sizes and rates of SynCLR; the paper's are in brackets."""

    crops_per_image: int = 2
    """Small crops of each image [4]."""
    hidden: int = 512
    """Width of the hidden layers of projector and predictor [4096]."""
    dim: int = 128
    """Dimension of the embeddings [256]."""
    patch_hidden: int = 256
    """Width of the hidden layers of the patch head [2048]."""
    bottleneck: int = 64
    """Dimension in which patches meet prototypes [256]."""
    prototypes: int = 512
    """[65536]"""
    masked_images: float = 0.5
    """Share of the images with masked patches [0.5]."""
    masked_patches: float = 0.5
    """Share of the patches that are masked in them [0.5]."""
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    """Of the assignments, at first and in the end."""
    teacher_warmup_steps: int = 4000
    """Steps from the first to the last teacher temperature [4000]."""
    sinkhorn_iterations: int = 3


class SynCLR(Objective):
    """See the module."""

    def __init__(
        self,
        config: SynclrConfig,
        encoder: Encoder,
        *,
        temperature: float,
        rows_per_caption: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.config, self.temperature = config, temperature
        self.rows_per_caption, self.num_patches = rows_per_caption, encoder.num_patches
        with seeded(seed):
            self.projector = _mlp(encoder.width, config.hidden, config.dim, num_layers=3)
            self.predictor = _mlp(config.dim, config.hidden, config.dim, num_layers=2)
            self.patch_head = _PatchHead(encoder.width, config)

    def make_towers(self, encoder: Encoder, *, seed: int) -> Towers:
        """See Objective."""
        return Towers(encoder, has_mask_token=True)

    def complete(self, inputs: Inputs, *, seed: int) -> Inputs:
        """Draws which patches of which images are masked, the same on any number of ranks."""
        masks = self._draw_masks(len(inputs.images), seed)
        return inputs._replace(masks=masks.to(inputs.images.device))

    @property
    def teacher_heads(self) -> nn.Module:
        """See Objective."""
        return nn.ModuleDict({"projector": self.projector, "patch_head": self.patch_head})

    @torch.no_grad()
    def targets(self, heads: nn.Module, features: Features, *, step: int) -> Targets:
        """Embeddings, and the assignment of masked patches, by the averaged heads."""
        assert isinstance(heads, nn.ModuleDict)
        assert features.patches is not None
        first, last = self.config.teacher_temperature
        temperature = linear(
            step - 1, start=first, end=last, num_steps=self.config.teacher_warmup_steps
        )
        tokens, prototypes = heads["patch_head"](features.patches)
        assignments = sinkhorn(tokens, prototypes, temperature, self.config.sinkhorn_iterations)
        return Targets(heads["projector"](features.images), assignments)

    def forward(
        self,
        features: Features,
        caption_ids: Int64[Tensor, " batch"],
        targets: Targets | None = None,
    ) -> Outcome:
        """See Objective."""
        assert targets is not None, "the teacher comes before the student"
        assert features.patches is not None
        embeddings = self.predictor(self.projector(features.images))
        terms = {
            "global_loss": self._contrast(
                embeddings, caption_ids, targets, caption_ids, is_same_image=True
            )
        }
        if features.crops is not None:
            crops = self.predictor(self.projector(features.crops))
            crop_ids = caption_ids.repeat_interleave(self.config.crops_per_image)
            terms["crop_loss"] = self._contrast(
                crops, crop_ids, targets, caption_ids, is_same_image=False
            )
        tokens, prototypes = self.patch_head(features.patches)
        terms["masked_loss"] = masked_token_loss(
            tokens, prototypes, targets.assignments, _STUDENT_TEMPERATURE
        )
        loss = torch.stack(list(terms.values())).sum()
        return Outcome(loss, embeddings, {name: term.detach() for name, term in terms.items()})

    def _contrast(
        self,
        anchors: Tensor,
        anchor_ids: Tensor,
        targets: Targets,
        caption_ids: Tensor,
        *,
        is_same_image: bool,
    ) -> Tensor:
        with in_fp32(anchors):
            return teacher_contrastive_loss(
                anchors,
                anchor_ids,
                targets.embeddings,
                caption_ids,
                self.temperature,
                is_same_image=is_same_image,
            )

    def _draw_masks(self, num_images: int, seed: int) -> Bool[Tensor, "batch patches"]:
        """Masks of this rank's images: a share of the images of all ranks, equally many patches."""
        world, random = distributed.world_size(), torch.Generator().manual_seed(seed)
        images = max(1, round(self.config.masked_images * num_images * world))
        patches = max(1, round(self.config.masked_patches * self.num_patches))
        is_masked = torch.zeros(num_images * world, dtype=torch.bool)
        is_masked[torch.randperm(len(is_masked), generator=random)[:images]] = True
        scores = torch.rand(len(is_masked), self.num_patches, generator=random)
        # Rank r has the captions r, r + world, ... of the whole batch, see ShardStream.
        rows = torch.arange(len(is_masked)).view(-1, world, self.rows_per_caption)
        own = rows[:, distributed.rank()].flatten()
        masks = torch.zeros(num_images, self.num_patches, dtype=torch.bool)
        masks.scatter_(1, scores[own].topk(patches, dim=1).indices, True)
        return masks & is_masked[own, None]


class _PatchHead(nn.Module):
    """The head of DINO: an MLP to unit vectors, and unit prototypes that are compared to them."""

    def __init__(self, width: int, config: SynclrConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            _linear(width, config.patch_hidden),
            nn.GELU(),
            _linear(config.patch_hidden, config.patch_hidden),
            nn.GELU(),
            _linear(config.patch_hidden, config.bottleneck),
        )
        self.prototypes = nn.Parameter(torch.randn(config.prototypes, config.bottleneck))

    def forward(
        self, patches: Float[Tensor, "masked features"]
    ) -> tuple[Float[Tensor, "masked bottleneck"], Float[Tensor, "prototypes bottleneck"]]:
        """Unit vectors of the patches, and the prototypes; cosines of the two are logits."""
        unit = F.normalize(self.mlp(patches).float(), dim=1)
        return unit, F.normalize(self.prototypes, dim=1)


def _mlp(width: int, hidden: int, dim: int, *, num_layers: int) -> nn.Sequential:
    """Linear layers with LayerNorm and GELU between them, and a LayerNorm without weights last."""
    widths = [width, *[hidden] * (num_layers - 1), dim]
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(pairwise(widths)):
        is_last = index == num_layers - 1
        layers += [
            _linear(before, after, bias=not is_last),
            nn.LayerNorm(after, elementwise_affine=not is_last),
        ]
        if not is_last:
            layers.append(nn.GELU())
    return nn.Sequential(*layers)


def _linear(before: int, after: int, *, bias: bool = True) -> nn.Linear:
    """As the published code begins: without a bias, which would make all tokens alike at first."""
    layer = nn.Linear(before, after, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=_WEIGHT_STD)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
