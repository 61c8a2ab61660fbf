"""The map of a run shows a bounded sample of its images, nearest ones of other captions beside."""

from __future__ import annotations

import numpy as np
import pytest

from synthrep_shared.commit_log import LogReader
from synthrep_shared.messages import RunRequest
from synthrep_trainer.admissions import Admission, AdmissionJournal
from synthrep_trainer.checkpoint_folders import (
    FileEntry,
    Manifest,
    open_checkpoint,
    publish_checkpoint,
)
from synthrep_trainer.feature_maps import read_feature_map
from synthrep_trainer.map_drawing import choose, draw_feature_map
from synthrep_trainer.order import is_held_out
from synthrep_trainer.runs import Workplace
from synthrep_trainer.settings import TrainerSettings


def mean_colour(images):
    """Features by which images of a caption are alike: a shard maker paints each its colour."""
    return images.reshape(len(images), -1, 3).mean(axis=1).astype(np.float32) - 128


@pytest.fixture
def settings(tmp_path):
    return TrainerSettings(root=tmp_path / "data", runs=tmp_path / "runs", map_images=24)


@pytest.fixture
def run(settings):
    request = RunRequest(dataset="birds", max_steps=9, image_size=16, knn_every=None)
    return Workplace(settings.runs).submit_run(request)


@pytest.fixture
def checkpoint_at(run):
    def make(step):
        manifest = Manifest(
            step=step,
            created_at="2026-01-01T00:00:00Z",
            files={"state.json": FileEntry(bytes=2, sha256="0" * 64)},
        )
        return open_checkpoint(publish_checkpoint(run.checkpoints, {"state.json": b"{}"}, manifest))

    return make


@pytest.fixture
def draw(run, settings):
    def draw(checkpoint, extract=mean_colour):
        return draw_feature_map(run, checkpoint, extract, image_px=16, settings=settings)

    return draw


def gids_of(chosen):
    return [choice.group.gid for _, choices in chosen for choice in choices]


def test_images_of_a_caption_lie_together_and_neighbours_are_of_others(
    shard_maker, run, draw, checkpoint_at
):
    shard_maker.commit(6)
    drawn = draw(checkpoint_at(3))
    assert drawn == read_feature_map(run.path)
    assert (drawn.step, drawn.dataset, len(drawn.groups), len(drawn.images)) == (3, "birds", 6, 18)
    assert drawn.neighbour_accuracy == 1.0
    assert {group.caption for group in drawn.groups} == {f"bird number {k}" for k in range(6)}
    places = np.array([(image.x, image.y) for image in drawn.images])
    owners = np.array([image.group for image in drawn.images])
    within = [places[owners == g].std(axis=0).max() for g in range(6)]
    assert max(within) < places.std(axis=0).min() / 4
    assert 0.5 < sum(drawn.shares) <= 1
    for image in drawn.images:
        assert len(image.nearest) == 8
        assert all(drawn.images[near].group != image.group for near, _ in image.nearest)


def test_the_same_log_and_checkpoint_give_the_same_map(shard_maker, run, draw, checkpoint_at):
    shard_maker.commit(5)
    first = draw(checkpoint_at(3))
    (run.path / "map.json").unlink()
    assert draw(open_checkpoint(run.checkpoints / "step-000000003")) == first


def test_a_map_is_drawn_once_for_a_checkpoint_and_never_for_an_older_one(
    shard_maker, run, draw, checkpoint_at
):
    shard_maker.commit(3)
    assert draw(checkpoint_at(5)) is not None
    assert draw(open_checkpoint(run.checkpoints / "step-000000005")) is None
    assert draw(checkpoint_at(4)) is None
    assert draw(checkpoint_at(6)) is not None
    found = read_feature_map(run.path)
    assert found is not None
    assert found.step == 6


def test_a_data_set_without_images_has_no_map(shard_maker, run, draw, checkpoint_at):
    assert draw(checkpoint_at(3)) is None
    assert read_feature_map(run.path) is None


def test_a_broken_shard_is_left_off_and_not_put_in_quarantine(
    shard_maker, run, draw, checkpoint_at
):
    shard_maker.commit(2)
    shard_maker.commit(2, break_file=lambda data: data[:-1] + b"x")
    drawn = draw(checkpoint_at(3))
    assert {group.caption for group in drawn.groups} == {"bird number 0", "bird number 1"}
    assert run.num_quarantined == 0


def test_the_newest_groups_come_first_and_rejected_ones_never(shard_maker):
    shards = [shard_maker.commit(3) for _ in range(3)]
    shard_maker.reject(shards[2].groups[1])
    newest_first = [g.gid for shard in reversed(shards) for g in reversed(shard.groups)]
    newest_first.remove(shards[2].groups[1].gid)
    chosen = choose(LogReader(shard_maker.paths.log), held_out=0.0, max_images=12)
    assert gids_of(chosen) == newest_first[:4]


def test_held_out_captions_take_up_to_half_the_room(shard_maker):
    shard = shard_maker.commit(60)
    ids = np.array([int(group.caption_id, 16) for group in shard.groups])
    num_held_out = int(is_held_out(ids, 0.1).sum())
    assert 0 < num_held_out < 10
    for max_images, expected in ((60, num_held_out), (12, min(num_held_out, 2))):
        chosen = choose(LogReader(shard_maker.paths.log), held_out=0.1, max_images=max_images)
        choices = [choice for _, choices in chosen for choice in choices]
        assert sum(choice.is_held_out for choice in choices) == expected
        assert len(choices) == max_images // 3


def test_only_the_newest_shards_are_read(shard_maker):
    for _ in range(18):
        shard_maker.commit(1, images=1)
    chosen = choose(LogReader(shard_maker.paths.log), held_out=0.0, max_images=100)
    assert [record.seq for record, _ in chosen] == list(range(18, 2, -1))


def test_a_group_shows_four_images_at_most(shard_maker, draw, checkpoint_at):
    shard_maker.commit(2, images=6)
    drawn = draw(checkpoint_at(3))
    assert [(image.group, image.image) for image in drawn.images] == [
        (group, image) for group in range(2) for image in range(4)
    ]


@pytest.mark.s3
def test_of_a_long_log_in_a_store_only_the_newest_records_are_fetched(
    shard_maker, store_root, tmp_path
):
    maker = type(shard_maker)(store_root)
    for _ in range(5):
        maker.commit(1)
    settings = TrainerSettings(root=store_root, runs=tmp_path / "runs", map_images=24)
    run = Workplace(settings.runs).submit_run(RunRequest(dataset="birds", max_steps=9))
    journal = AdmissionJournal(run.path / "admissions.jsonl", is_writer=True)
    journal.append(Admission(window=0, seq=203, step=0, log=""))
    manifest = Manifest(step=1, created_at="2026-01-01T00:00:00Z", files={})
    checkpoint = open_checkpoint(publish_checkpoint(run.checkpoints, {}, manifest))
    drawn = draw_feature_map(run, checkpoint, mean_colour, image_px=16, settings=settings)
    assert {group.caption for group in drawn.groups} == {"bird number 3", "bird number 4"}
