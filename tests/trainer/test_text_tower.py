"""Captions become bytes, and bytes become features that see nothing behind the caption's end."""

from __future__ import annotations

import pytest
import torch

from synthrep_trainer.text_tokens import END, PAD, START, VOCABULARY, encode_captions
from synthrep_trainer.text_tower import TextConfig, make_text_tower

SMALL = TextConfig(width=16, layers=2, heads=2, context=16)


def test_tokens_are_the_bytes_of_the_folded_caption():
    tokens = encode_captions(["A  Zaun-\n\u00e4"], 12)
    assert tokens.tolist() == [[START, *"a zaun- \u00e4".encode(), END]]
    assert tokens.max() < VOCABULARY


def test_short_captions_are_filled_up_and_long_ones_cut():
    tokens = encode_captions(["ab", "abcdefgh", ""], 6)
    assert tokens.tolist() == [
        [START, 97, 98, END, PAD, PAD],
        [START, 97, 98, 99, 100, END],
        [START, END, PAD, PAD, PAD, PAD],
    ]


def test_equal_captions_give_equal_tokens_whatever_their_form():
    composed, decomposed = encode_captions(["\u00e9t\u00e9", "e\u0301te\u0301"], 10)
    assert torch.equal(composed, decomposed)


def test_features_are_blind_to_what_follows_the_end():
    tower = make_text_tower(SMALL, seed=0)
    tokens = encode_captions(["a wren"], 16)
    changed = tokens.clone()
    changed[0, 9:] = 65
    assert torch.equal(tower(tokens), tower(changed))
    changed[0, 3] = 65
    assert not torch.allclose(tower(tokens), tower(changed))


def test_a_token_sees_only_what_comes_before_it():
    """Two captions with the same beginning, read at the same place."""
    tower = make_text_tower(SMALL, seed=0)
    seen = []
    tower.layers[-1].register_forward_hook(lambda *args: seen.append(args[2]))
    tower(encode_captions(["a wren", "a wrap"], 16))
    one, two = seen[0]
    torch.testing.assert_close(one[:5], two[:5])
    assert not torch.allclose(one[5], two[5])


def test_seed_alone_decides_the_weights():
    torch.manual_seed(3)
    one = make_text_tower(SMALL, seed=1).state_dict()
    torch.manual_seed(4)
    state = torch.get_rng_state()
    two = make_text_tower(SMALL, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = make_text_tower(SMALL, seed=2).state_dict()
    assert not torch.equal(one["tokens.weight"], other["tokens.weight"])


@pytest.mark.parametrize("sizes", [{"heads": 3}, {"layers": 0}, {"context": 2}])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="got|divide"):
        TextConfig(**({"width": 16} | sizes))
