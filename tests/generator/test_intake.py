from __future__ import annotations

import random

import pytest

from synthrep_generator.errors import IntakeError
from synthrep_generator.intake import (
    IntakeReader,
    batch_id_from_key,
    is_paused,
    list_batches,
    set_paused,
    write_batch,
)
from synthrep_shared.storage import temporary_path


def test_batch_reads_back_as_it_was_written(pets):
    prompts = ["a dog", "naïve 犬 🐕", 'a "quoted" cat']
    header = pets.accept(prompts)
    reader = IntakeReader(pets.paths, header.id)
    assert reader.header == header
    assert reader.prompts(0, 10) == prompts


def test_prompts_are_found_by_position_in_any_order(pets):
    prompts = [f"prompt {i}" for i in range(1003)]
    reader = IntakeReader(pets.paths, pets.accept(prompts).id)
    for start in [1000, 0, *random.Random(0).sample(range(1010), 40), 255, 256, 257, 512]:
        for count in (0, 1, 7, 300):
            assert reader.prompts(start, count) == prompts[start : start + count]


def test_first_writer_of_a_batch_id_wins(pets):
    header = pets.accept(["first"])
    assert not write_batch(pets.paths, header, ["second"])
    assert IntakeReader(pets.paths, header.id).prompts(0, 2) == ["first"]
    assert [p.name for p in pets.paths.intake.iterdir()] == [f"{header.id}.jsonl"]


def test_writer_that_fails_leaves_nothing(pets):
    header = pets.accept(["one"], batch="a" * 32)

    def prompts():
        yield "one"
        raise RuntimeError("client is gone")

    with pytest.raises(RuntimeError):
        write_batch(pets.paths, header.model_copy(update={"id": "c" * 32}), prompts())
    assert [p.name for p in pets.paths.intake.iterdir()] == [f"{header.id}.jsonl"]


def test_unfinished_files_are_no_batches(pets):
    header = pets.accept(["a"])
    temporary_path(pets.paths.intake, "x").write_text("half")
    (pets.paths.intake / ".hidden.jsonl").write_text("half")
    assert list_batches(pets.paths) == [header.id]


def test_malformed_header_is_an_error(pets):
    (pets.paths.intake / "x.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(IntakeError, match="malformed header"):
        IntakeReader(pets.paths, "x")


def test_group_ids_differ_by_everything_that_was_asked_for(pets):
    header = pets.accept(["a"])
    other = header.model_copy(
        update={"settings": header.settings.model_copy(update={"guidance_scale": 3.0})}
    )
    gids = {
        header.gid(0, "a"),
        header.gid(1, "a"),
        header.gid(0, "b"),
        other.gid(0, "a"),
        header.model_copy(update={"id": "c" * 32}).gid(0, "a"),
        header.model_copy(update={"dataset": "cars"}).gid(0, "a"),
    }
    assert len(gids) == 6
    assert header.gid(0, "a") == IntakeReader(pets.paths, header.id).header.gid(0, "a")


def test_idempotency_keys_of_owners_and_data_sets_do_not_meet():
    ids = {
        batch_id_from_key(owner, dataset, key)
        for owner in ("o", "p")
        for dataset in ("d", "e")
        for key in ("k", "l")
    }
    assert len(ids) == 8
    assert batch_id_from_key("o", "d", "k") in ids


def test_pausing_twice_and_resuming_twice_is_harmless(pets):
    header = pets.accept(["a"])
    for paused in (True, True, False, False, True):
        set_paused(pets.paths, header.id, paused)
        assert is_paused(pets.paths, header.id) is paused
