"""The cut vocabulary: short for the words it was cut for, possible for all others."""

from __future__ import annotations

from transformers import CLIPTokenizer

from models.training.diffusion import MAX_TOKENS, caption_tokens, tokenize
from models.training.vocabulary import needed_merges


def test_a_known_word_is_one_token(tokenizer):
    ids = tokenizer("a red bird").input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["<|startoftext|>", "a</w>", "red</w>", "bird</w>", "<|endoftext|>"]


def test_a_word_that_was_cut_encodes_by_letters_and_decodes_again(tokenizer):
    ids = tokenizer("walrus", add_special_tokens=False).input_ids
    assert len(ids) == len("walrus")
    assert tokenizer.decode(ids).strip() == "walrus"


def test_any_bytes_encode(tokenizer):
    text = "naïve 鳥 🦉 ~"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_the_cut_vocabulary_loads_from_its_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again("a red frog").input_ids == tokenizer("a red frog").input_ids
    assert again.model_max_length == MAX_TOKENS
    # Bytes within and at the end of a word, common merges, those of red, bird and frog, two marks.
    assert len(again) == 2 * 256 + 1000 + (2 + 3 + 3) + 2


def test_only_merges_that_a_word_applies_are_kept_beside_the_common_ones():
    common = [(f"{i}", "x") for i in range(1000)]
    rare = [("c", "a"), ("d", "o"), ("ca", "t</w>"), ("do", "g</w>"), ("a", "t</w>")]
    assert needed_merges(common + rare, ["cat"]) == [*common, ("c", "a"), ("ca", "t</w>")]


def test_captions_are_cut_and_padded_to_the_pipelines_length(tokenizer):
    ids = tokenize(tokenizer, ["a bird", "a frog " * 50])
    assert ids.shape == (2, MAX_TOKENS)
    assert ids[1, -1] == tokenizer.eos_token_id


def test_caption_rows_lead_back_to_the_captions(tokenizer):
    table = caption_tokens([["a red bird", "a bird", "a bird"], ["a frog"]], tokenizer)
    assert table.choices.shape == (2, 3)
    texts = tokenizer.batch_decode(table.tokens, skip_special_tokens=True)
    assert [[texts[row].strip() for row in rows] for rows in table.choices] == [
        ["a red bird", "a bird", "a bird"],
        ["a frog", "a frog", "a frog"],
    ]
    assert texts[0] == ""
