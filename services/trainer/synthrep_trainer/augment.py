"""The StableRep augmentation: decoded image and seed in, uint8 training view out; pure and seeded.

`batches` calls `augment` on each decoded image, twice with different seeds for SimCLR, and
`normalise` turns the uint8 batch into floats where it is consumed. Views stay uint8 up to there: a
quarter of the bytes to stack and to move, and the largest single saving of the data path.

Steps, in the published order: random down-sampling, random resized crop, colour jitter, grey,
blur, flip. They follow torchvision's transforms on PIL images, computed with OpenCV in about a
quarter of the time: brightness and contrast are equal but for rounding in one of 20,000 values,
saturation in one of ten, hue turns in the same HSV space (mean difference below 1/255). Crops are
enlarged with a bicubic kernel as in PIL; shrinking is without anti-aliasing up to a factor of 2 and
by area averages past it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The recipe is published for this size; lengths in pixels scale with it.
_PUBLISHED_SIZE_PX = 224
# Below this largest sigma a Gaussian hardly reaches the next pixel: the blur is left out whole, as
# SimCLR does at 32 px.
_SMALLEST_USEFUL_SIGMA_PX = 0.5
_CROP_ATTEMPTS = 10
_LEVELS = np.arange(256, dtype=np.uint8)
_SOLARISED = np.where(_LEVELS < 128, _LEVELS, 255 - _LEVELS)
_AREA_RESIZE_FACTOR = 2
_LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114])
# What rounding to the nearest has to lose to round down; a whole number stays the same.
_TRUNCATION = 0.4999


@dataclass(frozen=True)
class AugmentConfig:
    """The recipe of one view; the defaults are StableRep's at 224 px.

    Probabilities and the strengths of the jitter are fractions, as in torchvision's ColorJitter.
    """

    image_size_px: int = _PUBLISHED_SIZE_PX
    """Side of the square view."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Least and greatest share of the image's area that the crop covers."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and greatest width / height of the crop, before it is made square."""
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    """Greatest turn of the hue either way, in full circles; at most 0.5."""
    grayscale_probability: float = 0.2
    blur_probability: float = 0.5
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    """Least and greatest standard deviation of the blur, above 0."""
    solarise_probability: float = 0.0
    """Chance that levels from the middle up are inverted; 0.2 in every second view of BYOL."""
    flip_probability: float = 0.5
    downsample_probability: float = 0.0
    """Chance that the image loses resolution before the crop; 0.05 in the paper's variant."""
    downsample_factors: tuple[float, ...] = (0.25, 0.5)
    """Shares of the stored side length to fall to, equally likely: 64 and 128 of 256 px."""

    def __post_init__(self) -> None:
        probabilities = (
            self.jitter_probability,
            self.grayscale_probability,
            self.blur_probability,
            self.solarise_probability,
            self.flip_probability,
            self.downsample_probability,
        )
        strengths = (self.brightness, self.contrast, self.saturation, self.hue * 2)
        ranges = (self.crop_scale, self.crop_ratio, self.blur_sigma_px)
        if self.image_size_px < 1:
            raise ValueError(f"image_size_px must be at least 1, got {self.image_size_px}")
        if not all(0 <= fraction <= 1 for fraction in (*probabilities, *strengths)):
            raise ValueError(f"probabilities and strengths lie in 0-1, hue in 0-0.5, got {self}")
        if not all(0 < low <= high for low, high in ranges) or self.crop_scale[1] > 1:
            raise ValueError(f"ranges are (low, high) above 0, crop_scale at most 1, got {self}")
        if not all(0 < factor <= 1 for factor in self.downsample_factors):
            raise ValueError(f"downsample_factors lie above 0 and up to 1, got {self}")

    @classmethod
    def for_image_size(cls, image_size_px: int) -> "AugmentConfig":
        """The published recipe at another size.

        The sigma of the blur scales with the side; below 56 px the blur is dropped, since even its
        greatest sigma stays under half a pixel. All else is relative already.
        """
        factor = image_size_px / _PUBLISHED_SIZE_PX
        low, high = (factor * sigma for sigma in cls.blur_sigma_px)
        is_blurred = high >= _SMALLEST_USEFUL_SIGMA_PX
        return cls(
            image_size_px=image_size_px,
            blur_probability=cls.blur_probability if is_blurred else 0.0,
            blur_sigma_px=(low, high),
        )

    @classmethod
    def whole(cls, image_size_px: int) -> "AugmentConfig":
        """The image as it is, in this size: for looking at, not for training."""
        return cls(
            image_size_px=image_size_px,
            crop_scale=(1.0, 1.0),
            crop_ratio=(1.0, 1.0),
            jitter_probability=0.0,
            grayscale_probability=0.0,
            blur_probability=0.0,
            flip_probability=0.0,
        )


def augment(
    image: UInt8[np.ndarray, "height width *channels"],
    config: AugmentConfig,
    *,
    seed: int | Sequence[int] | np.random.Generator,
) -> UInt8[np.ndarray, "size size 3"]:
    """One random view of an RGB or grey image, of `config.image_size_px` pixels a side.

    The view is a function of image, config and seed: the same three give the same bytes. The image
    is not changed, and the view shares no memory with it.

    Args:
        image: any size from 1 x 1 pixel; (height, width), or 1 or 3 channels last.
        seed: what `numpy.random.default_rng` takes. A generator is advanced.

    Raises:
        ValueError: the array is not a uint8 image of 1 or 3 channels.
    """
    rng = np.random.default_rng(seed)
    pixels = _as_rgb(image)
    if rng.random() < config.downsample_probability:
        pixels = _downsample(pixels, config, rng)
    pixels = _random_resized_crop(pixels, config, rng)
    if rng.random() < config.jitter_probability:
        pixels = _colour_jitter(pixels, config, rng)
    if rng.random() < config.grayscale_probability:
        pixels = cv2.cvtColor(_luma(pixels), cv2.COLOR_GRAY2RGB)
    if rng.random() < config.blur_probability:
        sigma = rng.uniform(*config.blur_sigma_px)
        pixels = _blur(pixels, sigma)
    # Nothing is drawn for it where there is none: other recipes keep their views.
    if config.solarise_probability and rng.random() < config.solarise_probability:
        pixels = cv2.LUT(pixels, _SOLARISED)
    if rng.random() < config.flip_probability:
        pixels = cv2.flip(pixels, 1)
    return pixels


def normalise(
    images: UInt8[Tensor, "batch height width 3"],
) -> Float[Tensor, "batch 3 height width"]:
    """Standardises uint8 RGB with ImageNet's mean and deviation, on the device of the images."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).mul_(255)
    std = torch.tensor(IMAGENET_STD, device=images.device).mul_(255)
    channels_first = images.permute(0, 3, 1, 2)
    floats = channels_first.to(torch.float32, memory_format=torch.contiguous_format)
    return floats.sub_(mean[:, None, None]).div_(std[:, None, None])


def use_one_thread() -> None:
    """Keeps OpenCV in this process to the calling thread; each loader worker calls it first."""
    cv2.setNumThreads(0)


def _as_rgb(image: np.ndarray) -> np.ndarray:
    channels = image.shape[2] if image.ndim == 3 else 1
    if (
        image.dtype != np.uint8
        or image.ndim not in (2, 3)
        or channels not in (1, 3)
        or not image.size
    ):
        raise ValueError(
            "expected a uint8 image (height, width) with 1 or 3 channels last, got "
            f"{image.dtype} {image.shape}"
        )
    return image if channels == 3 else cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)


def _luma(pixels: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def _resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    shrink = min(pixels.shape[0] / height, pixels.shape[1] / width)
    kernel = cv2.INTER_AREA if shrink > _AREA_RESIZE_FACTOR else cv2.INTER_CUBIC
    return cv2.resize(pixels, (width, height), interpolation=kernel)


def _downsample(pixels: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Shrinks and enlarges again, so that the view looks like one of a low-resolution image."""
    height, width = pixels.shape[:2]
    factor = config.downsample_factors[rng.integers(len(config.downsample_factors))]
    small_height, small_width = (max(1, round(factor * side)) for side in (height, width))
    small = cv2.resize(pixels, (small_width, small_height), interpolation=cv2.INTER_AREA)
    return _resize(small, height, width)


def _random_resized_crop(
    pixels: np.ndarray, config: AugmentConfig, rng: np.random.Generator
) -> np.ndarray:
    height, width = pixels.shape[:2]
    crop_height, crop_width = _crop_size(height, width, config, rng)
    top = rng.integers(height - crop_height + 1)
    left = rng.integers(width - crop_width + 1)
    crop = pixels[top : top + crop_height, left : left + crop_width]
    return _resize(crop, config.image_size_px, config.image_size_px)


def _crop_size(
    height: int, width: int, config: AugmentConfig, rng: np.random.Generator
) -> tuple[int, int]:
    """Height and width of a crop, uniform in area and in the logarithm of its ratio.

    A draw that does not fit is drawn again, a few times; then the crop is the largest whose ratio
    is allowed.
    """
    low_ratio, high_ratio = config.crop_ratio
    for _ in range(_CROP_ATTEMPTS):
        area = height * width * rng.uniform(*config.crop_scale)
        ratio = math.exp(rng.uniform(math.log(low_ratio), math.log(high_ratio)))
        crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            return crop_height, crop_width
    if width < low_ratio * height:
        return max(1, round(width / low_ratio)), width
    return height, max(1, min(width, round(height * high_ratio)))


def _colour_jitter(
    pixels: np.ndarray, config: AugmentConfig, rng: np.random.Generator
) -> np.ndarray:
    """Four changes in random order, each by a factor around 1, the hue by an angle around 0."""
    for change in rng.permutation(4):
        if change == 0:
            pixels = _blend(pixels, 0, _factor(config.brightness, rng))
        elif change == 1:
            grey_level = int(cv2.mean(_luma(pixels))[0] + 0.5)
            pixels = _blend(pixels, grey_level, _factor(config.contrast, rng))
        elif change == 2:
            pixels = _change_saturation(pixels, _factor(config.saturation, rng))
        else:
            pixels = _turn_hue(pixels, rng.uniform(-config.hue, config.hue))
    return pixels


def _factor(strength: float, rng: np.random.Generator) -> float:
    return rng.uniform(1 - strength, 1 + strength)


def _blend(pixels: np.ndarray, level: int, factor: float) -> np.ndarray:
    """Moves values towards (factor < 1) or away from one level; clips and truncates as PIL does."""
    # OpenCV rounds. This takes half the time of a table of the 256 values.
    return cv2.addWeighted(pixels, factor, pixels, 0, (1 - factor) * level - _TRUNCATION)


def _change_saturation(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Moves values towards or away from the luma of their pixel."""
    weights = factor * np.eye(3) + (1 - factor) * _LUMA_WEIGHTS
    return cv2.transform(pixels, np.column_stack([weights, [-_TRUNCATION] * 3]))


def _blur(pixels: np.ndarray, sigma_px: float) -> np.ndarray:
    """As `cv2.GaussianBlur`, whose arithmetic for bytes takes twice as long where it blurs much."""
    kernel = cv2.getGaussianKernel(round(6 * sigma_px + 1) | 1, sigma_px, cv2.CV_32F)
    return cv2.sepFilter2D(pixels, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)


def _turn_hue(pixels: np.ndarray, circles: float) -> np.ndarray:
    steps = round(circles * 256) % 256
    if steps == 0:  # the round trip through HSV is not free of rounding
        return pixels
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    hsv += np.array([[steps, 0, 0]], np.uint8).repeat(hsv.shape[1], 0)  # wraps around
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
