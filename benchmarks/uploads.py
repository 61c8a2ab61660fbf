"""A streamed upload of made-up captions, as a client sends it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import httpx

_LINES_AT_ONCE = 2000
_ADJECTIVES = ("red", "old", "small", "shiny", "striped", "wooden", "blue", "broken", "furry")
_NOUNS = ("dog", "boat", "bridge", "apple", "castle", "lorry", "owl", "teapot", "mountain")


def captions(count: int) -> Iterator[str]:
    """So many different captions."""
    kinds = itertools.cycle(itertools.product(_ADJECTIVES, _NOUNS, _ADJECTIVES, _NOUNS))
    for number, (first, noun, second, other) in zip(range(count), kinds, strict=False):
        yield f"a photo of a {first} {noun} beside a {second} {other}, number {number}"


def body(count: int) -> Iterator[bytes]:
    """So many captions as a text file, in blocks."""
    lines = (f"{caption}\n".encode() for caption in captions(count))
    return iter(lambda: b"".join(itertools.islice(lines, _LINES_AT_ONCE)), b"")


def upload(
    url: str, blocks: Iterable[bytes], *, prompts: int, dataset: str, images_per_prompt: int
) -> str:
    """Hand in a file of so many captions in one request; returns the batch's id."""
    answer = httpx.post(
        f"{url}/v1/batches/upload",
        params={"dataset": dataset, "images_per_prompt": images_per_prompt},
        headers={"content-type": "text/plain"},
        content=iter(blocks),
        timeout=300,
    )
    answer.raise_for_status()
    accepted = answer.json()
    if accepted["prompts_accepted"] != prompts:
        raise RuntimeError(f"accepted {accepted['prompts_accepted']} of {prompts}")
    batch: str = accepted["id"]
    return batch
