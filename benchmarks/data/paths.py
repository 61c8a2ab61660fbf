"""Processor seconds that one image takes on one thread, from a shard to batches of 60 views.

Images are JPEG of 256 px at quality 95 in groups of ten; views have 224 px. Each function runs in
a fresh process, once over a few groups to warm up, then timed.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.data import rivals
from benchmarks.data.rivals import MEAN, SCALE, STD, VIEW_PX

IMAGES = 10
_SIDE_PX = 256
_GROUPS_PER_BATCH = rivals.BATCH // IMAGES
Group = tuple[str, list[bytes]]
View = Callable[[bytes, int], Any]


def write_shard(path: Path, groups: int) -> None:
    """A shard of smooth shapes under grain, the same for the same number of groups."""
    from PIL import Image

    rng = np.random.default_rng(0)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for group, image in itertools.product(range(groups), range(IMAGES)):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BICUBIC))
            grain = rng.normal(0, 5, (_SIDE_PX, _SIDE_PX, 1))
            pixels = (smooth + grain).clip(0, 255).astype(np.uint8)
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, "JPEG", quality=95)
            name = f"{_gid(group)}-{image}"
            for suffix, data in (("jpg", encoded.getvalue()), ("json", _metadata(group, image))):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def read_s(name: str, shard: str, groups: int) -> float:
    """Seconds an image to read groups; `verified` reads a shard that was verified before."""
    torch.set_num_threads(1)
    if name == "webdataset":
        return _timed(lambda: _consume(_webdataset(shard)), groups)
    if name == "first use":
        return _timed(lambda: _consume(_shard_files(shard, _layout(shard, groups), groups)), groups)
    layout = _layout(shard, groups)
    return _timed(lambda: _consume(_shard_files(shard, layout, groups)), groups)


def path_s(name: str, shard: str, groups: int) -> float:
    """Seconds an image from the shard to the batch; ours verifies the shard each time."""
    torch.set_num_threads(1)
    if name in ("torchvision", "albumentationsx"):
        view = _torchvision() if name == "torchvision" else _albumentationsx()
        return _timed(lambda: _batches(_webdataset(shard), view), groups)
    if name in ("dali", "spdl"):
        return _timed(getattr(rivals, name)(shard, groups * IMAGES), groups)
    return _timed(lambda: _our_batches(shard, groups, name), groups)


def _consume(found: Iterator[object]) -> None:
    """Take one after the other and keep none, as a batch does that decodes them."""
    for _ in found:
        pass


def _timed(work: Callable[[], object], groups: int) -> float:
    work()
    started = time.process_time()
    work()
    return (time.process_time() - started) / (groups * IMAGES)


def _gid(group: int) -> str:
    return hashlib.sha256(str(group).encode()).hexdigest()[:32]


def _caption(group: int) -> str:
    return f"a photo of thing {group}"


def _metadata(group: int, image: int) -> bytes:
    from synthrep_shared import samples

    return (
        samples.SampleMetadata(
            caption=_caption(group),
            caption_id=samples.caption_id(_caption(group)),
            gid=_gid(group),
            image_index=image,
            seed=image,
            model="none",
            model_revision="none",
            scheduler="none",
            num_inference_steps=1,
            guidance_scale=1.0,
            negative_prompt="",
            stored_px=_SIDE_PX,
            generator_version="none",
        )
        .model_dump_json()
        .encode()
    )


def _layout(shard: str, groups: int) -> Any:
    from synthrep_shared import samples
    from synthrep_trainer.shard_files import GroupKey, verify_shard

    path = Path(shard)
    return verify_shard(
        path,
        sha256=path.with_suffix(".sha256").read_text(),
        num_bytes=path.stat().st_size,
        groups=[GroupKey(_gid(g), samples.caption_id(_caption(g)), IMAGES) for g in range(groups)],
    )


def _shard_files(shard: str, layout: Any, groups: int) -> Iterator[tuple[str, list[Any]]]:
    from synthrep_trainer.shard_files import read_caption, read_images

    path = Path(shard)
    for group in range(groups):
        images = read_images(path, layout, group, range(IMAGES))
        yield read_caption(path, layout, group), images


def _our_batches(shard: str, groups: int, name: str) -> None:
    """Views in float, in uint8, or crops, which are uint8 views without jitter, grey and blur."""
    from synthrep_trainer.augment import AugmentConfig, augment, normalise, use_one_thread
    from synthrep_trainer.batches import decode

    use_one_thread()
    config = AugmentConfig(image_size_px=VIEW_PX)
    if name == "crops":
        config = replace(
            config, jitter_probability=0.0, grayscale_probability=0.0, blur_probability=0.0
        )
    found = _shard_files(shard, _layout(shard, groups), groups)
    for step in itertools.count():
        drawn = list(itertools.islice(found, _GROUPS_PER_BATCH))
        if not drawn:
            return
        images = [image for _, group in drawn for image in group]
        pixels = np.empty((len(images), VIEW_PX, VIEW_PX, 3), dtype=np.uint8)
        for row, image in enumerate(images):
            pixels[row] = augment(decode(image), config, seed=(0, step, row, 0))
        batch = torch.from_numpy(pixels)
        if name == "float":
            normalise(batch)


def _webdataset(shard: str) -> Iterator[Group]:
    import webdataset

    samples = iter(webdataset.WebDataset(shard, shardshuffle=False, empty_check=False))
    while group := list(itertools.islice(samples, IMAGES)):
        yield json.loads(group[0]["json"])["caption"], [sample["jpg"] for sample in group]


def _batches(found: Iterator[Group], view: View) -> None:
    seeds = itertools.count()
    while drawn := list(itertools.islice(found, _GROUPS_PER_BATCH)):
        torch.stack([view(data, next(seeds)) for _, group in drawn for data in group])


def _torchvision() -> View:
    from PIL import Image, ImageFilter
    from torchvision import transforms as T

    class Blur:
        def __call__(self, image: Any) -> Any:
            return image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))

    steps = T.Compose(
        [
            T.RandomResizedCrop(VIEW_PX, scale=SCALE, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([Blur()], p=0.5),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
        ]
    )
    return lambda data, seed: steps(Image.open(io.BytesIO(data)).convert("RGB"))


def _albumentationsx() -> View:
    import albumentations as A
    import cv2
    import simplejpeg

    cv2.setNumThreads(0)
    steps = A.Compose(
        [
            A.RandomResizedCrop((VIEW_PX, VIEW_PX), scale=SCALE, interpolation=cv2.INTER_CUBIC),
            A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1), p=0.8),
            A.ToGray(p=0.2),
            A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=0.5),
            A.HorizontalFlip(p=0.5),
            A.Normalize(MEAN, STD),
        ]
    )

    def view(data: bytes, seed: int) -> Any:
        pixels = steps(image=simplejpeg.decode_jpeg(data, colorspace="RGB"))["image"]
        return torch.from_numpy(pixels).permute(2, 0, 1)

    return view
