"""A vocabulary that needs no download, and photos that are noise."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from models.training.diffusion import MAX_TOKENS
from models.training.vocabulary import bytes_to_characters, make_tokenizer


def write_merges(path: Path, words: list[str], *, num_fillers: int) -> Path:
    """A merge list as CLIP's: a heading, frequent pairs, then what builds each word up."""
    letters = [c for c in bytes_to_characters() if not c.isalpha() or not c.islower()]
    fillers = [f"{a} {b}" for a in letters for b in letters][:num_fillers]
    assert len(fillers) == num_fillers
    built: dict[str, None] = {}
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            built[f"{symbols[0]} {symbols[1]}"] = None
            symbols[:2] = ["".join(symbols[:2])]
    path.write_bytes(gzip.compress("\n".join(["heading", *fillers, *built]).encode() + b"\n"))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    merges = write_merges(
        folder / "bpe.gz", ["a", "red", "bird", "frog", "walrus"], num_fillers=1000
    )
    return make_tokenizer(merges, ["a", "red", "bird", "frog"], MAX_TOKENS, folder / "cut")


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    """64 photos (64, 32, 32, 3) of uniform noise."""
    return np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
