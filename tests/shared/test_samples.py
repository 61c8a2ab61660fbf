import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthrep_shared.samples import (
    caption_id,
    group_id,
    image_seed,
    member_name,
    normalise_caption,
    parse_member_name,
)


def test_equal_captions_share_an_id_after_normalisation():
    assert caption_id("a caf\u00e9  table ") == caption_id("a cafe\u0301 table")
    assert caption_id("a red dog") != caption_id("a red cat")


@given(st.text())
def test_caption_id_fits_a_signed_int64(text):
    assert 0 <= int(caption_id(text), 16) < 2**63
    assert normalise_caption(normalise_caption(text)) == normalise_caption(text)


def test_group_id_depends_on_everything_that_was_asked():
    base = ("d", "b", 0, "a dog", {"model": "tiny"})
    others = [
        ("e", "b", 0, "a dog", {"model": "tiny"}),
        ("d", "c", 0, "a dog", {"model": "tiny"}),
        ("d", "b", 1, "a dog", {"model": "tiny"}),
        ("d", "b", 0, "a cat", {"model": "tiny"}),
        ("d", "b", 0, "a dog", {"model": "sdxl"}),
    ]
    ids = {group_id(*arguments) for arguments in [base, *others]}
    assert len(ids) == 6
    assert group_id(*base) == group_id(*base)


def test_image_seeds_differ_by_image_and_follow_the_request_seed():
    seeds = {image_seed("a" * 32, k, request_seed=None, index=0) for k in range(100)}
    assert len(seeds) == 100
    assert image_seed("a" * 32, 3, request_seed=7, index=5) == image_seed(
        "b" * 32, 3, request_seed=7, index=5
    )
    assert image_seed("a" * 32, 3, request_seed=7, index=5) != image_seed(
        "a" * 32, 3, request_seed=7, index=6
    )


def test_member_names_round_trip():
    gid = "0123456789abcdef" * 2
    assert parse_member_name(member_name(gid, 12, "jpg")) == (gid, 12, "jpg")


@pytest.mark.parametrize("name", ["../../x", "a.pickle", "0" * 32 + "-1.pkl", "0" * 32 + ".jpg"])
def test_foreign_member_names_are_refused(name):
    with pytest.raises(ValueError, match="member name"):
        parse_member_name(name)
