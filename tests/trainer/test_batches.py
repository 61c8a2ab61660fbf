"""Batches hold the views that (seed, step, row) call for, whoever makes them."""

from __future__ import annotations

import io
import time
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import simplejpeg
import torch

from synthrep_shared import samples
from synthrep_trainer.augment import AugmentConfig, augment
from synthrep_trainer.batches import BatchLoader, HeldOutPlan, ViewPlan, decode
from synthrep_trainer.errors import BadShardError
from synthrep_trainer.order import SamplingPlan
from synthrep_trainer.shard_files import Image
from synthrep_trainer.shard_stream import ShardStream

AUGMENTATION = AugmentConfig.for_image_size(16)
WHOLE = AugmentConfig(
    image_size_px=16, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), jitter_probability=0.0,
    grayscale_probability=0.0, blur_probability=0.0, flip_probability=0.0,
)  # fmt: skip


def make_loader(
    maker, run, *, rank=0, world_size=1, views=1, threads=2, last_step=99, plan_views=None,
    share=0.0, held_out=None, **stream
):  # fmt: skip
    plan = SamplingPlan(
        seed=3, captions_per_batch=4, images_per_caption=2, min_fill_groups=4,
        max_uses_per_image=100, held_out=share,
    )  # fmt: skip
    source = ShardStream(
        maker.paths, run, plan, rank=rank, world_size=world_size, poll_s=0.01, **stream
    )
    view_plan = ViewPlan(3, 2, views, AUGMENTATION, **(plan_views or {}))
    return BatchLoader(
        source,
        view_plan,
        last_step=last_step,
        threads=threads,
        prefetch=2,
        pin=False,
        held_out=held_out,
    )


def take(loader, count):
    found = []
    for _ in range(count):
        assert loader.is_ready(10)
        found.append(loader.take())
    return found


def test_views_are_those_of_the_slow_way(shard_maker, tmp_path):
    shard_maker.commit(5)
    with make_loader(shard_maker, tmp_path) as loader:
        loaded = take(loader, 3)[2]
    stream = ShardStream(shard_maker.paths, tmp_path, loader._stream._plan)
    drawn = [stream.next_batch(lambda: False) for _ in range(3)][2]
    views, ids = [], []
    for group in drawn.groups:
        stream.verify(group.shard)
        for k, image in enumerate(stream.store.read(group.shard, group.place, group.images)):
            pixels = np.asarray(PIL.Image.open(io.BytesIO(image.data)))
            views.append(augment(pixels, AUGMENTATION, seed=(3, 3, group.row * 2 + k, 0)))
            ids.append(group.caption_id)
    assert loaded.batch.images.dtype == torch.uint8
    # Pillow and simplejpeg may round one level apart before the jitter widens that.
    difference = loaded.batch.images.numpy().astype(int) - np.stack(views)
    assert np.abs(difference).mean() < 1
    assert loaded.batch.caption_ids.tolist() == ids
    assert loaded.cursor == drawn.cursor


def test_views_do_not_depend_on_threads_or_ranks(shard_maker, tmp_path):
    shard_maker.commit(5)
    with make_loader(shard_maker, tmp_path, threads=1) as loader:
        whole = take(loader, 3)
    halves = []
    for rank in range(2):
        with make_loader(shard_maker, tmp_path, rank=rank, world_size=2, threads=3) as loader:
            halves.append(take(loader, 3))
    for step in range(3):
        images = whole[step].batch.images.reshape(4, 2, 16, 16, 3)
        for rank in range(2):
            half = halves[rank][step].batch
            assert torch.equal(half.images.reshape(2, 2, 16, 16, 3), images[rank::2])


def test_simclr_pairs_two_crops_under_an_id_of_their_own(shard_maker, tmp_path):
    shard_maker.commit(5)
    with make_loader(shard_maker, tmp_path, views=2) as loader:
        batch = take(loader, 1)[0].batch
    assert batch.caption_ids.tolist() == [k // 2 for k in range(16)]
    assert not torch.equal(batch.images[0], batch.images[1])


def test_small_crops_and_captions_travel_with_their_images(shard_maker, tmp_path):
    shard_maker.commit(5)
    crops = replace(AUGMENTATION, image_size_px=8, crop_scale=(0.08, 0.32))
    more = {"crops_per_image": 3, "crop_augmentation": crops, "text_context": 20}
    with make_loader(shard_maker, tmp_path / "more", plan_views=more) as loader:
        batch = take(loader, 2)[1].batch
    with make_loader(shard_maker, tmp_path / "plain") as loader:
        plain = take(loader, 2)[1].batch
    assert torch.equal(batch.images, plain.images)
    assert (plain.tokens, plain.crops) == (None, None)
    assert batch.crops.shape == (4 * 2 * 3, 8, 8, 3)
    assert len({crop.numpy().tobytes() for crop in batch.crops}) == 24
    captions = bytes_of(batch.tokens)
    ids = [int(samples.caption_id(caption), 16) for caption in captions]
    assert batch.caption_ids[::2].tolist() == ids


def bytes_of(tokens):
    return [bytes(t for t in row if t < 256).decode() for row in tokens.tolist()]


def test_held_out_images_come_whole_when_they_are_due(shard_maker, tmp_path):
    shard_maker.commit(40)
    held_out = HeldOutPlan(every=2, captions=4, images_per_caption=2, view=WHOLE)
    loader = make_loader(shard_maker, tmp_path, share=0.3, held_out=held_out)
    with loader:
        loaded = take(loader, 4)
    assert [item.held_out is not None for item in loaded] == [False, True, False, True]
    images, ids = loaded[1].held_out[:2]
    assert images.shape == (8, 16, 16, 3)
    assert torch.equal(images, loaded[3].held_out.images)
    assert len(set(ids.tolist())) == 4
    trained = {i for item in loaded for i in item.batch.caption_ids.tolist()}
    assert not trained & set(ids.tolist())
    group = loader._stream.held_out(captions=1, images=1)[0]
    stored = loader._stream.store.read(group.shard, group.place, [0])[0]
    assert np.array_equal(images[0].numpy(), decode(stored))


def test_every_second_image_may_have_its_own_recipe(shard_maker, tmp_path):
    shard_maker.commit(5)
    other = replace(AUGMENTATION, solarise_probability=1.0)
    with make_loader(shard_maker, tmp_path, plan_views={"odd_augmentation": other}) as loader:
        batch = take(loader, 1)[0].batch
    with make_loader(shard_maker, tmp_path / "plain") as loader:
        plain = take(loader, 1)[0].batch
    assert torch.equal(batch.images[::2], plain.images[::2])
    assert not torch.equal(batch.images[1::2], plain.images[1::2])


def test_an_image_that_cannot_be_decoded_quarantines_its_shard(shard_maker, tmp_path):
    shard_maker.commit(4, break_tar=lambda data: data.replace(b"\xff\xd8\xff", b"\0\0\0"))
    with make_loader(shard_maker, tmp_path) as loader:
        assert loader.is_ready(10)
        with pytest.raises(BadShardError, match="cannot be decoded"):
            loader.take()
    assert (tmp_path / "quarantine" / "1.json").exists()


def test_no_batch_is_made_after_the_last_step(shard_maker, tmp_path):
    shard_maker.commit(4)
    with make_loader(shard_maker, tmp_path, last_step=3) as loader:
        take(loader, 3)
        assert not loader.is_ready(0.05)
    assert len((tmp_path / "admissions.jsonl").read_text().splitlines()) == 3


def test_leaving_stops_a_loader_that_has_images_for_ever(shard_maker, tmp_path):
    shard_maker.commit(4)
    with make_loader(shard_maker, tmp_path, last_step=10**9) as loader:
        take(loader, 1)
        started = time.monotonic()
    assert time.monotonic() - started < 2
    assert len((tmp_path / "admissions.jsonl").read_text().splitlines()) <= 5


def test_leaving_stops_a_loader_that_waits_for_images(shard_maker, tmp_path):
    with make_loader(shard_maker, tmp_path) as loader:
        assert not loader.is_ready(0.05)
        started = time.monotonic()
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_every_format_decodes_to_rgb(suffix):
    pixels = np.full((9, 7, 3), (200, 30, 90), dtype=np.uint8)
    buffer = io.BytesIO()
    name = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix]
    PIL.Image.fromarray(pixels).save(buffer, name, quality=95)
    decoded = decode(Image(buffer.getvalue(), suffix))
    assert decoded.shape == (9, 7, 3)
    assert np.abs(decoded.astype(int) - pixels).max() < 12


def test_grey_jpegs_decode_to_rgb():
    data = simplejpeg.encode_jpeg(np.full((8, 8, 1), 99, np.uint8), colorspace="GRAY")
    assert decode(Image(data, "jpg")).shape == (8, 8, 3)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_bomb_is_refused_before_it_is_decoded(suffix):
    buffer = io.BytesIO()
    PIL.Image.new("L", (5000, 5000)).save(buffer, {"jpg": "JPEG", "png": "PNG"}[suffix])
    with pytest.raises(ValueError, match="at most"):
        decode(Image(buffer.getvalue(), suffix))


def test_a_png_named_jpg_is_refused():
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(buffer, "PNG")
    with pytest.raises(ValueError, match=r"."):
        decode(Image(buffer.getvalue(), "jpg"))
