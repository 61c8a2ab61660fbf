"""Encoders in the formats of others: timm, Hugging Face, ONNX. No file of them needs our code.

Each format writes a folder and reads it again with the library that its users have, so that an
export can be compared with what it was made from. Features are the class token after the final
norm everywhere.

    timm  timm.create_model("local-dir:FOLDER", pretrained=True)
    hf    transformers.AutoModel.from_pretrained(FOLDER)(pixel_values).pooler_output
    onnx  onnxruntime.InferenceSession("FOLDER/model.onnx").run(["features"], {"images": ...})
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import safetensors.torch
import torch
from jaxtyping import Float
from timm.models import create_model
from torch import Tensor

from synthrep_trainer.augment import IMAGENET_MEAN, IMAGENET_STD
from synthrep_trainer.encoder import Encoder, EncoderConfig, timm_arguments
from synthrep_trainer.errors import ExportError

FormatName = Literal["timm", "hf", "onnx"]

_WEIGHTS, _ONNX_FILE = "model.safetensors", "model.onnx"
# An ONNX file is a protobuf message, at most 2 GiB; above this the weights get a file beside it.
_MAX_ONNX_BYTES = 1_800_000_000
# How timm's ViT and that of transformers call the same tensors, but for query, key and value.
_HUGGING_FACE_NAMES = (
    (r"cls_token", "embeddings.cls_token"),
    (r"pos_embed", "embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(weight|bias)", r"embeddings.patch_embeddings.projection.\1"),
    (r"blocks\.(\d+)\.norm1\.(weight|bias)", r"layers.\1.layernorm_before.\2"),
    (r"blocks\.(\d+)\.norm2\.(weight|bias)", r"layers.\1.layernorm_after.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
    (r"blocks\.(\d+)\.mlp\.(fc[12])\.(weight|bias)", r"layers.\1.mlp.\2.\3"),
    (r"norm\.(weight|bias)", r"layernorm.\1"),
)
_QUERY_KEY_VALUE = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)")


class Format(Protocol):
    """A way to hand an encoder on."""

    def write(self, encoder: Encoder, config: EncoderConfig, folder: Path) -> None:
        """Write the encoder, in eval mode and on the CPU, into an empty folder.

        Raises:
            ExportError: the format cannot hold this encoder, or a library is missing.
        """

    def features(
        self, folder: Path, images: Float[Tensor, "batch 3 px px"]
    ) -> Float[Tensor, "batch features"]:
        """What the written encoder says of normalised images, by the library of its users."""


class TimmFolder:
    """A state dict of safetensors, and the `config.json` with which timm builds its model."""

    def write(self, encoder: Encoder, config: EncoderConfig, folder: Path) -> None:
        name, arguments = timm_arguments(config)
        model_arguments = {
            key: value
            for key, value in arguments.items()
            if key not in ("num_classes", "global_pool", "drop_path_rate")
        }
        size = [3, config.image_size_px, config.image_size_px]
        description = {
            "architecture": name,
            "num_classes": 0,
            "num_features": encoder.width,
            "global_pool": "token",
            "model_args": model_arguments,
            "pretrained_cfg": {
                "num_classes": 0,
                "input_size": size,
                "fixed_input_size": True,
                "interpolation": "bicubic",
                "crop_pct": 1.0,
                "crop_mode": "center",
                "mean": IMAGENET_MEAN,
                "std": IMAGENET_STD,
                "first_conv": "patch_embed.proj",
                "classifier": "head",
            },
        }
        (folder / "config.json").write_text(json.dumps(description, indent=1))
        tensors = {key: value.contiguous() for key, value in encoder.backbone.state_dict().items()}
        safetensors.torch.save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})

    def features(
        self, folder: Path, images: Float[Tensor, "batch 3 px px"]
    ) -> Float[Tensor, "batch features"]:
        features: Tensor = create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
        return features


class HuggingFaceFolder:
    """A `ViTModel` whose pooler is the identity, and the image processor that goes with it."""

    def write(self, encoder: Encoder, config: EncoderConfig, folder: Path) -> None:
        from transformers import CLIPImageProcessor, ViTConfig, ViTModel

        backbone = encoder.backbone
        block = backbone.blocks[0]
        model = ViTModel(
            ViTConfig(
                hidden_size=encoder.width,
                num_hidden_layers=len(backbone.blocks),
                num_attention_heads=block.attn.num_heads,
                intermediate_size=block.mlp.fc1.out_features,
                layer_norm_eps=backbone.norm.eps,
                image_size=config.image_size_px,
                patch_size=backbone.patch_embed.patch_size[0],
                qkv_bias=block.attn.qkv.bias is not None,
                pooler_act="linear",
            )
        )
        tensors = hugging_face_tensors(backbone.state_dict())
        tensors["pooler.dense.weight"] = torch.eye(encoder.width)
        tensors["pooler.dense.bias"] = torch.zeros(encoder.width)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ExportError(f"the ViT of transformers is another than {config.model}") from error
        model.save_pretrained(folder)
        side = config.image_size_px
        # Of those in transformers, the processor that resizes the short side and crops the centre.
        CLIPImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=list(IMAGENET_MEAN),
            image_std=list(IMAGENET_STD),
        ).save_pretrained(folder)

    def features(
        self, folder: Path, images: Float[Tensor, "batch 3 px px"]
    ) -> Float[Tensor, "batch features"]:
        from transformers import AutoModel

        model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        features: Tensor = model(images).pooler_output
        return features


class OnnxFile:
    """One graph from `images` (batch, 3, px, px) to `features` (batch, width), batch dynamic."""

    def write(self, encoder: Encoder, config: EncoderConfig, folder: Path) -> None:
        side = config.image_size_px
        num_bytes = sum(p.numel() * p.element_size() for p in encoder.parameters())
        torch.onnx.export(
            encoder,
            (torch.zeros(2, 3, side, side),),
            folder / _ONNX_FILE,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            external_data=num_bytes > _MAX_ONNX_BYTES,
            verbose=False,
        )

    def features(
        self, folder: Path, images: Float[Tensor, "batch 3 px px"]
    ) -> Float[Tensor, "batch features"]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(
            str(folder / _ONNX_FILE), options, providers=["CPUExecutionProvider"]
        )
        (features,) = session.run(["features"], {"images": images.numpy()})
        return torch.from_numpy(features)


FORMATS: Mapping[FormatName, Format] = {
    "timm": TimmFolder(),
    "hf": HuggingFaceFolder(),
    "onnx": OnnxFile(),
}


def preprocessing(config: EncoderConfig) -> dict[str, Any]:
    """How an image becomes the encoder's input, as it was trained and probed."""
    return {
        "resize_short_side_px": config.image_size_px,
        "interpolation": "bicubic",
        "centre_crop_px": config.image_size_px,
        "scale": 1 / 255,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }


def hugging_face_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of timm's ViT under the names of transformers' `ViTModel`, without its pooler.

    Raises:
        ExportError: one of them has no counterpart.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := _QUERY_KEY_VALUE.fullmatch(name):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"layers.{match[1]}.attention.{part}_proj.{match[2]}"] = rows
            continue
        for pattern, replacement in _HUGGING_FACE_NAMES:
            if match := re.fullmatch(pattern, name):
                renamed[match.expand(replacement)] = tensor
                break
        else:
            raise ExportError(
                f"the ViT of transformers has no {name}; export as timm, which transformers reads"
            )
    return renamed
