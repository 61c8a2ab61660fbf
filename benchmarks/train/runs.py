"""A run in the demo's setting, over images that are all there, and how long its steps waited.

64 captions with 4 of 10 images of 64 px each, `vit_synthrep_tiny` at 32 px, one loader thread; the
data set is committed before the run starts, so that what is waited for is the loader.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from synthrep_shared import samples
from synthrep_shared.commit_log import CommitLog, GroupRef
from synthrep_shared.messages import RunRequest
from synthrep_shared.storage import DatasetPaths, publish_bytes

_DATASET = "demo"
_CAPTIONS, _IMAGES, _SIDE_PX = 240, 10, 64
_CAPTIONS_PER_BATCH, _IMAGES_PER_CAPTION = 64, 4
_WARM_UP_STEPS = 3


def waiting_share(steps: int) -> float:
    """Part of a run's time by the clock, after the first steps, that went into waiting for data."""
    from synthrep_trainer import train
    from synthrep_trainer.runs import Workplace
    from synthrep_trainer.settings import TrainerSettings

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        commit_images(DatasetPaths(root / "data", _DATASET))
        request = demo_request(_DATASET, max_steps=_WARM_UP_STEPS + steps)
        run = Workplace(root / "trainer").submit_run(request)
        settings = TrainerSettings(root=str(root / "data"), runs=root / "trainer", device="cpu")
        train.run(run, settings, lambda: False)
        metrics = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    timed = metrics[_WARM_UP_STEPS:]
    views = _CAPTIONS_PER_BATCH * _IMAGES_PER_CAPTION
    seconds = sum(views / step["images_per_s"] for step in timed)
    return float(sum(step["wait_s"] for step in timed) / seconds)


def demo_request(dataset: str, *, max_steps: int) -> RunRequest:
    """A run with the demo's batches."""
    return RunRequest(
        dataset=dataset,
        max_steps=max_steps,
        captions_per_batch=_CAPTIONS_PER_BATCH,
        images_per_caption=_IMAGES_PER_CAPTION,
    )


def commit_images(paths: DatasetPaths) -> None:
    """One shard of smooth noise, as the generator commits it."""
    paths.make_folders()
    buffer, groups = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(_CAPTIONS):
            caption = f"a photo of thing {index}"
            gid = samples.group_id(_DATASET, "b1", index, caption, {})
            caption_id = samples.caption_id(caption)
            for image in range(_IMAGES):
                for name, content in _members(gid, image, caption, caption_id):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
            groups.append(
                GroupRef(gid=gid, caption_id=caption_id, batch="b1", index=index, images=_IMAGES)
            )
    data = buffer.getvalue()
    sha256 = hashlib.sha256(data).hexdigest()

    def publish(seq: int) -> str:
        name = f"{seq:06d}-{sha256[:12]}.tar"
        publish_bytes(data, paths.shards / name)
        return name

    CommitLog(paths.log).append(
        "shard", name=publish, sha256=sha256, num_bytes=len(data), groups=tuple(groups)
    )


def _members(gid: str, image: int, caption: str, caption_id: str) -> Iterator[tuple[str, bytes]]:
    import simplejpeg

    random = np.random.default_rng(int(caption_id, 16) + image)
    pixels = random.integers(0, 256, (_SIDE_PX // 8, _SIDE_PX // 8, 3), dtype=np.uint8)
    smooth = np.ascontiguousarray(pixels.repeat(8, 0).repeat(8, 1))
    metadata = samples.SampleMetadata(
        caption=caption,
        caption_id=caption_id,
        gid=gid,
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
    yield samples.member_name(gid, image, "jpg"), simplejpeg.encode_jpeg(smooth, quality=95)
    yield samples.member_name(gid, image, "json"), metadata.model_dump_json().encode()
