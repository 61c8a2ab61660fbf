"""Chunks: places in and out, ids from content, isolation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from synthrep_generator.chunks import Chunk, Part, Place, PlacesOf, chunk_from_places

places = st.lists(
    st.builds(Place, st.sampled_from(["a", "b"]), st.integers(0, 20)), min_size=1, unique=True
)


@given(places)
def test_places_survive_a_round_trip_in_order(wanted: list[Place]) -> None:
    chunk = chunk_from_places("birds", wanted)
    again = Chunk.model_validate_json(chunk.model_dump_json())
    assert list(again.places()) == wanted
    assert again.num_prompts == len(wanted)
    assert again.id == chunk.id


def test_consecutive_places_become_one_part() -> None:
    chunk = chunk_from_places("birds", [Place("a", 3), Place("a", 4), Place("b", 5)])
    assert chunk.parts == (
        Part(batch="a", start=3, count=2),
        Part(batch="b", start=5, count=1),
    )


def test_the_id_depends_on_data_set_and_places() -> None:
    some = [Place("a", 0), Place("a", 1)]
    ids = {
        chunk_from_places("birds", some).id,
        chunk_from_places("bees", some).id,
        chunk_from_places("birds", some[:1]).id,
        chunk_from_places("birds", some[::-1]).id,
    }
    assert len(ids) == 4


@given(places, st.sets(st.integers(0, 19)))
def test_isolation_keeps_every_prompt_once_and_suspects_alone(
    wanted: list[Place], numbers: set[int]
) -> None:
    suspects = {place for i, place in enumerate(wanted) if i in numbers}
    pieces = chunk_from_places("birds", wanted).isolate(suspects)
    found = [list(piece.places()) for piece in pieces]
    assert sorted(p for piece in found for p in map(repr, piece)) == sorted(map(repr, wanted))
    assert all(len(piece) == 1 for piece in found if set(piece) & suspects)
    assert len(pieces) == len(suspects) + (len(suspects) < len(wanted))


@given(st.lists(places, max_size=3))
def test_the_places_of_many_chunks_are_those_of_each(wanted: list[list[Place]]) -> None:
    found = PlacesOf(chunk_from_places("birds", some) for some in wanted)
    inside = {place for some in wanted for place in some}
    around = {Place(p.batch, p.index + step) for p in inside for step in (-1, 0, 1)}
    assert {place for place in around if place in found} == inside
    assert Place("elsewhere", 0) not in found
    assert ("a", 0) not in found


@pytest.mark.parametrize("batch", ["../b", "a/b", "", "a.b", "x" * 65])
def test_a_batch_name_that_is_a_path_is_refused(batch: str) -> None:
    with pytest.raises(ValidationError):
        Part(batch=batch, start=0, count=1)
