# SPDX-License-Identifier: Apache-2.0
"""Hold the distinct documents of all sources, and part them so that nothing of the validation text is trained on.

Two documents are the same if they differ in white space only. The second is dropped, so that the two cannot fall on
different sides. The side is a function of the document's own hash: it does not change when others are added.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Literal

import numpy as np

from lowbits.data._sources import Source
from lowbits.errors import DataError

SplitName = Literal["train", "val"]
SPLITS: tuple[SplitName, ...] = ("train", "val")
_IN_MEMORY = 1 << 28  # bytes of text that are kept in memory; more of it goes to a file beside the output


class Corpus:
    """Distinct documents in the order in which they were added.

    Args:
        scratch: a folder for the text that does not fit into memory.
    """

    def __init__(self, scratch: Path) -> None:
        self.digests: list[bytes] = []
        self.duplicates = 0
        self.empty = 0
        self._ends = [0]
        self._seen: set[bytes] = set()
        self._text = SpooledTemporaryFile(max_size=_IN_MEMORY, dir=str(scratch))  # noqa: SIM115  closed by close()

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.digests)

    def close(self) -> None:
        """Remove the text."""
        self._text.close()

    def sizes(self) -> np.ndarray:
        """Return the bytes of every document, int64 [documents]."""
        return np.diff(np.asarray(self._ends, dtype=np.int64))

    def add(self, source: Source, advance: Callable[[int], None]) -> None:
        """Add the documents of a source; empty ones and duplicates are counted instead.

        Args:
            source: where they come from.
            advance: told the bytes of every document that was read.

        Raises:
            DataError: the source holds no text at all, or text that UTF-8 cannot hold.
        """
        before = len(self) + self.duplicates
        for number, text in enumerate(source.documents(), start=1):
            try:
                data, words = text.encode(), " ".join(text.split()).encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{source.name}: document {number} holds half of a surrogate pair. Repair or remove it."
                ) from error
            advance(len(data))
            self._add(data, words)
        if len(self) + self.duplicates == before:
            raise DataError(f"{source.name}: empty, there is no text in it. Leave it out, or name another source.")

    def _add(self, data: bytes, words: bytes) -> None:
        digest = hashlib.blake2b(words, digest_size=16).digest()
        if not words:
            self.empty += 1
        elif digest in self._seen:
            self.duplicates += 1
        else:
            self._seen.add(digest)
            self.digests.append(digest)
            self._text.seek(self._ends[-1])
            self._text.write(data)
            self._ends.append(self._ends[-1] + len(data))

    def text(self, document: int) -> str:
        """Return the text of one document.

        Args:
            document: its number, from 0.
        """
        start, end = self._ends[document : document + 2]
        self._text.seek(start)
        return self._text.read(end - start).decode()


@dataclass(frozen=True)
class Partition:
    """Say which document belongs to which side.

    Args:
        held_out: numbers of the documents that are validation.
        cut: the one document of which the head is training and the tail is validation; None if there is none.
        at: the character at which it is cut.
    """

    held_out: frozenset[int]
    cut: int | None = None
    at: int = 0

    def texts(self, corpus: Corpus, split: SplitName) -> Iterator[str]:
        """Yield the texts of one side in the order of the corpus.

        Args:
            corpus: the documents that were parted.
            split: `train` or `val`.
        """
        for number in range(len(corpus)):
            if number == self.cut:
                text = corpus.text(number)
                yield text[: self.at] if split == "train" else text[self.at :]
            elif (number in self.held_out) == (split == "val"):
                yield corpus.text(number)


def partition(corpus: Corpus, val_fraction: float) -> Partition:
    """Part the documents by their hashes, or cut the longest one where whole documents do not serve.

    A document is validation if its hash, read as a number in [0, 1), is below `val_fraction`, and if it is not itself
    longer than `val_fraction` of all text. If that leaves one side empty (one book, a few chapters), the longest
    document is cut once instead, at the end of a paragraph, and its tail is the validation text.

    Args:
        corpus: the documents.
        val_fraction: share of the text that is validation, in (0, 0.5].

    Returns:
        The sides; the same for the same documents, whatever their order.
    """
    sizes = corpus.sizes()
    budget = int(val_fraction * sizes.sum())
    held_out = frozenset(
        number
        for number, digest in enumerate(corpus.digests)
        if _fraction(digest) < val_fraction and sizes[number] <= budget
    )
    if 0 < len(held_out) < len(corpus):
        return Partition(held_out)
    longest = max(range(len(corpus)), key=lambda number: (sizes[number], corpus.digests[number]))
    text = corpus.text(longest)
    tail = min(budget / sizes[longest], 0.5)
    return Partition(frozenset(), longest, _paragraph_end(text, len(text) - int(tail * len(text))))


def _fraction(digest: bytes) -> float:
    """Return the first eight bytes of a hash as a number in [0, 1)."""
    return int.from_bytes(digest[:8], "big") / (1 << 64)


def _paragraph_end(text: str, at: int) -> int:
    """Return the last end of a paragraph, line or word in the half before `at`, or `at` itself."""
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, at // 2, at)
        if found >= 0:
            return found + len(mark)
    return at
