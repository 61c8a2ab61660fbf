"""Embeddings of captions by text: each is encoded once while it is remembered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from synthrep_generator.pipelines.family import Embeddings, Family, Text


class CaptionCache:
    """The embeddings used last, up to a number of bytes on the device."""

    def __init__(self, family: Family, *, max_bytes: int) -> None:
        self._family, self._max_bytes = family, max_bytes
        self._found: OrderedDict[Text, Embeddings] = OrderedDict()
        self._bytes = 0

    def encode(self, texts: Sequence[Text]) -> list[Embeddings]:
        """Embeddings of the texts; those seen lately are not encoded again."""
        unseen = [text for text in dict.fromkeys(texts) if text not in self._found]
        at_once = self._family.texts_at_once
        for start in range(0, len(unseen), at_once):
            some = unseen[start : start + at_once]
            for text, bundle in zip(some, self._family.encode(some), strict=True):
                # Rows of a batch would keep the whole batch in memory.
                owned = {key: value.clone() for key, value in bundle.items()}
                self._found[text] = owned
                self._bytes += _size(owned)
        for text in texts:
            self._found.move_to_end(text)
        found = [self._found[text] for text in texts]
        while self._bytes > self._max_bytes and len(self._found) > 1:
            _, dropped = self._found.popitem(last=False)
            self._bytes -= _size(dropped)
        return found


def _size(bundle: Embeddings) -> int:
    return sum(value.nbytes for value in bundle.values())
