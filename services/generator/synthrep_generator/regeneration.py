"""Makes one image again from what its JSON says of it, and compares it with the one that is stored.

On the same kind of device, and in a device pass of as many images, the file comes out bit for bit
the same; elsewhere pixels differ by rounding.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from synthrep_generator.device_process import make_synthesizer
from synthrep_generator.errors import ModelConfigError, PermanentPromptError
from synthrep_generator.model_files import find_model
from synthrep_generator.settings import GeneratorSettings, ModelConfig
from synthrep_generator.shard_writer import encode_image
from synthrep_generator.synthesis import ImageTask, Pixels, Recipe
from synthrep_shared.errors import StorageError
from synthrep_shared.samples import SampleMetadata

_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Remade:
    """An image made again, and the device that made it."""

    pixels: Pixels
    device: str
    dtype: str


@dataclass(frozen=True)
class Comparison:
    """How far two images are apart, in 1/255 of the range of a channel."""

    is_equal: bool
    """Whether the files are equal bit for bit."""
    mean_difference: float
    max_difference: int


def remake(
    sample: SampleMetadata, settings: GeneratorSettings, *, batch_images: int | None = None
) -> Remade:
    """The pixels of the image, made in a pass of `batch_images`; None: as many as were recorded.

    Raises UnknownModelError, ModelFilesMissingError, and ModelConfigError if the model of this
    alias is another one here.
    """
    size = batch_images or sample.batch_images
    configured = find_model(settings, sample.model)
    model = configured.model_copy(
        update={
            "store_px": sample.stored_px,
            "device_batch_images": size,
            "dtype": _DTYPES.get(sample.dtype, configured.dtype),
        }
    )
    _check_loras(sample, model)
    synthesizer = make_synthesizer(settings, sample.model, model)
    if synthesizer.revision != sample.model_revision:
        raise ModelConfigError(
            f"the image was made by revision {sample.model_revision} of {sample.model}; "
            f"here is revision {synthesizer.revision}"
        )
    recipe = Recipe(
        guidance_scale=sample.guidance_scale,
        num_inference_steps=sample.num_inference_steps,
        scheduler=sample.scheduler,
        negative_prompt=sample.negative_prompt,
    )
    task = ImageTask(sample.caption, sample.seed)
    image, *_ = synthesizer.generate([task] * size, recipe, lambda: None)
    if isinstance(image, PermanentPromptError):
        raise image
    return Remade(image, synthesizer.device, synthesizer.dtype)


def encode_as_stored(
    pixels: Pixels, stored: bytes, sample: SampleMetadata, settings: GeneratorSettings
) -> bytes:
    """The image in the format of `stored`; where its quality was not recorded, the configured one.

    Raises StorageError if `stored` is no image.
    """
    with _open(stored) as image:
        suffix = _SUFFIXES[str(image.format)]
    quality = sample.image_quality or settings.jpeg_quality
    return encode_image(pixels, image_format=suffix, quality=quality)


def compare(stored: bytes, remade: bytes) -> Comparison:
    """Raises StorageError if one is no image, or they are of different sizes."""
    before, after = _pixels(stored), _pixels(remade)
    if before.shape != after.shape:
        raise StorageError(f"the stored image has shape {before.shape}, the new one {after.shape}")
    differences = np.abs(before.astype(np.int16) - after)
    return Comparison(stored == remade, float(differences.mean()), int(differences.max()))


def _check_loras(sample: SampleMetadata, model: ModelConfig) -> None:
    here = model.lora_names
    if here != sample.loras:
        raise ModelConfigError(
            f"the image was made with LoRA files {list(sample.loras)}; here are {list(here)}"
        )


def _pixels(data: bytes) -> Pixels:
    with _open(data) as image:
        try:
            return np.asarray(image.convert("RGB"))
        except OSError as error:  # its end is missing
            raise StorageError(f"the stored image cannot be decoded: {error}") from error


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=tuple(_SUFFIXES))
    except OSError as error:
        raise StorageError("the stored file is no image") from error
