"""Data paths of DALI and SPDL on a CPU with one thread, from a shard to batches of 60 views.

DALI does every step of the recipe and normalises; its jitter is one matrix, whose hue is a turn in
YIQ. SPDL has FFmpeg's filters and none of the jitter: it crops, resizes and flips.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

BATCH = 60
VIEW_PX = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def dali(shard: str, images: int) -> Callable[[], None]:
    """One pass over the shard; only what is cropped is decoded."""
    from nvidia.dali import fn, pipeline_def, types

    def chance(probability: float) -> Any:
        return fn.random.coin_flip(probability=probability, dtype=types.BOOL)

    def uniform(low: float, high: float) -> Any:
        return fn.random.uniform(range=[low, high])

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=BATCH, num_threads=1, device_id=None, seed=0, enable_conditionals=True
    )
    def views() -> Any:
        data = fn.readers.webdataset(paths=[shard], ext=["jpg"])
        pixels = fn.decoders.image_random_crop(
            data, random_area=list(SCALE), random_aspect_ratio=list(RATIO)
        )
        pixels = fn.resize(
            pixels, size=[VIEW_PX, VIEW_PX], interp_type=types.INTERP_CUBIC, antialias=False
        )
        if chance(0.8):
            pixels = fn.color_twist(
                pixels,
                brightness=uniform(0.6, 1.4),
                contrast=uniform(0.6, 1.4),
                saturation=uniform(0.6, 1.4),
                hue=uniform(-36, 36),
            )
        if chance(0.2):
            pixels = fn.hsv(pixels, saturation=0.0)
        if chance(0.5):
            pixels = fn.gaussian_blur(pixels, sigma=uniform(0.1, 2.0))
        return fn.crop_mirror_normalize(
            pixels,
            mirror=fn.random.coin_flip(),
            mean=[255 * value for value in MEAN],
            std=[255 * value for value in STD],
        )

    pipeline = views()
    pipeline.build()

    def one_pass() -> None:
        for _ in range(images // BATCH):
            (batch,) = pipeline.run()
            np.asarray(batch.as_tensor())

    return one_pass


def spdl(shard: str, images: int) -> Callable[[], None]:
    """One pass over the shard; raises ImportError without FFmpeg's shared libraries."""
    import spdl.io

    try:
        spdl.io.demux_config()
    except RuntimeError as error:
        raise ImportError("SPDL finds no FFmpeg (libavutil and others)") from error
    rng = np.random.default_rng(0)

    def view(data: bytes) -> Any:
        packets = spdl.io.demux_image(data)
        return spdl.io.decode_packets(packets, filter_desc=_filters(rng))

    def one_pass() -> None:
        with open(shard, "rb") as file:
            found = (bytes(d) for name, d in spdl.io.iter_tarfile(file) if name.endswith(".jpg"))
            while drawn := list(itertools.islice(found, BATCH)):
                batch = spdl.io.convert_frames([view(data) for data in drawn])
                spdl.io.to_torch(batch)

    return one_pass


def _filters(rng: np.random.Generator, side: int = 256) -> str:
    """A crop drawn as in torchvision, made square, flipped or not."""
    while True:
        area = side * side * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if width <= side and height <= side:
            break
    left, top = rng.integers(side - width + 1), rng.integers(side - height + 1)
    flip = ",hflip" if rng.random() < 0.5 else ""
    return (
        f"format=rgb24,crop={width}:{height}:{left}:{top},"
        f"scale={VIEW_PX}:{VIEW_PX}:flags=bicubic{flip},format=rgb24"
    )
