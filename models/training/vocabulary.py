"""The CLIP byte-pair vocabulary cut to the merges that a list of words needs.

The full merge list is `bpe_simple_vocab_16e6.txt.gz` of OpenAI's CLIP (MIT), as the package
`open-clip-torch` carries it. Any other prompt still encodes, byte by byte.
"""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

_LAST_MERGE = 49152 - 256 - 2 + 1
_COMMON_MERGES = 1000  # kept whatever the words, so that ordinary English stays short


def bytes_to_characters() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE, in CLIP's order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(others))]


def needed_merges(merges: list[tuple[str, str]], words: list[str]) -> list[tuple[str, str]]:
    """The merges, in rank order, that encoding `words` applies, beside the most common ones."""
    rank = {pair: i for i, pair in enumerate(merges)}
    used = set(range(min(_COMMON_MERGES, len(merges))))
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            candidates = [rank.get(pair, len(merges)) for pair in pairwise(symbols)]
            best = min(candidates)
            if best == len(merges):
                break
            used.add(best)
            at = candidates.index(best)
            symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    return [merges[i] for i in sorted(used)]


def make_tokenizer(bpe_gz: Path, words: list[str], max_tokens: int, folder: Path) -> CLIPTokenizer:
    """Write the cut vocabulary into `folder` and load it as a CLIPTokenizer of `max_tokens`."""
    lines = gzip.decompress(bpe_gz.read_bytes()).decode().splitlines()[1:_LAST_MERGE]
    merges = needed_merges([(a, b) for a, b in map(str.split, lines)], words)
    letters = bytes_to_characters()
    tokens = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False)
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=max_tokens
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
