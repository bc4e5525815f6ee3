# SPDX-License-Identifier: Apache-2.0
"""Read batches from token shards; what a step reads depends on nothing but the step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lowbits.data._index import INDEX, Index, Split, read_index, verify
from lowbits.data._order import windows_of_step
from lowbits.data._readers import file_sha256
from lowbits.errors import DataError, UnknownNameError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, eq=False)
class TokenData:
    """A folder of tokens that `prepare` wrote, open for reading.

    A *window* is `block` tokens of a split; window `i` begins at token `i * block`, and a rest shorter than a block is
    not read. Windows pass over the ends of documents: the documents are packed.

    Args:
        folder: where it lies.
        index: its description.
    """

    folder: Path
    index: Index

    @classmethod
    def open(cls, folder: str | Path) -> TokenData:
        """Open a folder and compare every file with its checksum.

        Args:
            folder: what `prepare` wrote.

        Returns:
            The data.

        Raises:
            DataError: it is no token data, of a newer version, or a file is missing, truncated or altered.
        """
        folder = Path(folder)
        index = read_index(folder)
        verify(folder, index)
        return cls(folder, index)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id: the rows that an embedding needs."""
        return self.index.vocab_size

    @property
    def eos_id(self) -> int:
        """The token after each document."""
        return self.index.eos_id

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of index.json, which holds those of all shards: two equal ones mean equal data."""
        return file_sha256(self.folder / INDEX)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Load the tokenizer that made the tokens."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(self.folder))

    def tokens(self, split: str) -> int:
        """Return how many tokens a split holds.

        Args:
            split: `train` or `val`.
        """
        return self._split(split).tokens

    def bytes_per_token(self, split: str) -> float:
        """Return the bytes of text that a token stands for; bits a byte are `nats / ln 2 / bytes_per_token`.

        Args:
            split: `train` or `val`.
        """
        return self._split(split).bytes / self._split(split).tokens

    def windows(self, split: str, block: int) -> int:
        """Return how many windows a split holds: the length of an epoch in samples.

        Args:
            split: `train` or `val`.
            block: tokens a window, at least 2.

        Raises:
            DataError: the block is longer than the split, or too short to predict a token from another.
        """
        tokens = self.tokens(split)
        if block < 2:
            raise DataError(f"block: at least 2 tokens (each is predicted from those before it), got {block}.")
        if block > tokens:
            raise DataError(
                f"{self.folder}: a block of {block} tokens is longer than the {split} split, which has {tokens}."
                f" Choose a block of at most {tokens}, or prepare more text."
            )
        return tokens // block

    def batch(
        self, split: str, step: int, *, batch_size: int, block: int, seed: int, rank: int = 0, world: int = 1
    ) -> Tensor:
        """Return the inputs of one step; they are the labels too.

        Causal language models of `transformers` shift inside: `model(input_ids=x, labels=x)`. Every window is read once
        an epoch, in an order that is a pure function of `seed` and the epoch. Ranks read slices of one batch, so all of
        them together read the same, however many they are.

        Args:
            split: `train` or `val`.
            step: from 0; with gradient accumulation, count the micro-steps.
            batch_size: windows a step over all ranks; `world` must divide it.
            block: tokens a window.
            seed: of the order, not negative.
            rank: of this process.
            world: number of processes.

        Returns:
            int64 [batch_size / world, block].

        Raises:
            DataError: a number is out of its range, or the block longer than the split.
        """
        windows = self.windows(split, block)
        if batch_size < 1 or world < 1 or batch_size % world:
            raise DataError(f"batch_size: a multiple of the {world} processes, got {batch_size}.")
        if min(step, seed, rank) < 0 or rank >= world:
            raise DataError(f"step {step}, seed {seed} and rank {rank} of {world}: not negative, and rank below world.")
        share = batch_size // world
        chosen = windows_of_step(step, batch_size, windows, seed)[rank * share : (rank + 1) * share]
        return self._gather(split, chosen, block)

    def val_batches(self, batch_size: int, block: int, limit: int | None = None) -> Iterator[Tensor]:
        """Iterate over the validation split in the order of the text.

        Args:
            batch_size: windows a batch; the last may be smaller.
            block: tokens a window.
            limit: at most so many windows, the first ones; all if None.

        Returns:
            An iterator of int64 [at most batch_size, block].

        Raises:
            DataError: the block is longer than the split, or a number below 1.
        """
        windows = self.windows("val", block)
        stop = windows if limit is None else min(windows, limit)
        if batch_size < 1 or stop < 1:
            raise DataError(f"batch_size {batch_size} and limit {limit}: at least one window each.")
        starts = range(0, stop, batch_size)
        return (self._gather("val", np.arange(start, min(start + batch_size, stop)), block) for start in starts)

    def _split(self, name: str) -> Split:
        if name not in self.index.splits:
            raise UnknownNameError("split", name, self.index.splits)
        return self.index.splits[name]

    @cached_property
    def _shards(self) -> dict[str, list[np.ndarray]]:
        return {
            name: [
                np.memmap(self.folder / shard.file, np.dtype(self.index.dtype).newbyteorder("<"), "r")
                for shard in split.shards
            ]
            for name, split in self.index.splits.items()
        }

    def _gather(self, split: str, windows: np.ndarray, block: int) -> Tensor:
        rows = np.empty((len(windows), block), dtype=np.int64)
        for row, window in zip(rows, windows, strict=True):
            self._read(split, int(window) * block, row)
        return torch.from_numpy(rows)

    def _read(self, split: str, start: int, row: np.ndarray) -> None:
        """Fill a row with the tokens from `start` on; it may lie in several shards."""
        filled = 0
        for shard in self._shards[split]:
            if start < len(shard):
                part = shard[start : start + len(row) - filled]
                row[filled : filled + len(part)] = part
                filled, start = filled + len(part), start + len(part)
            start -= len(shard)


def check_vocabulary(data: TokenData, model_vocab_size: int) -> None:
    """Refuse a model that has no embedding for some of the tokens.

    Args:
        data: the tokens.
        model_vocab_size: rows of the model's embedding; more than the data needs is fine.

    Raises:
        DataError: the model's vocabulary is the smaller one.
    """
    if data.vocab_size > model_vocab_size:
        raise DataError(
            f"{data.folder}: its tokenizer has {data.vocab_size} tokens, the model an embedding of {model_vocab_size}."
            f" Give the model a vocab_size of at least {data.vocab_size}, or prepare the data with its tokenizer."
        )
