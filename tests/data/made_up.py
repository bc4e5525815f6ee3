# SPDX-License-Identifier: Apache-2.0
"""Text that is nowhere on disk."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass
class Memory:
    """A source that is not on disk."""

    texts: list[str]
    name: str = "memory"
    before: Callable[[], object] = lambda: None

    def documents(self) -> Iterator[str]:
        self.before()
        yield from self.texts

    def fingerprint(self) -> str:
        return repr(self.texts)


def made_up(documents: int, words: int = 40, seed: int = 0) -> list[str]:
    """Return documents of pronounceable words, no two alike."""
    draw = random.Random(seed)
    syllables = [first + second for first in "bdklmnrst" for second in "aeiou"]
    lexicon = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(300)]
    return [" ".join(draw.choice(lexicon) for _ in range(words)) + f".\n\nEnd of {n}." for n in range(documents)]
