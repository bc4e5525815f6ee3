# SPDX-License-Identifier: Apache-2.0
"""Write tokens into shards of bounded size."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from lowbits.data._index import Shard

SHARD_TOKENS = 1 << 27  # 256 MiB as uint16


class ShardWriter:
    """Append tokens to `SPLIT-00000.bin`, `SPLIT-00001.bin`, ...; a context manager.

    Args:
        folder: where to; it exists.
        split: the first part of the file names.
        dtype: `uint16` or `uint32`; written little-endian.
    """

    def __init__(self, folder: Path, split: str, dtype: str) -> None:
        self.shards: list[Shard] = []
        self._folder = folder
        self._split = split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._stream: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._tokens = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()

    def append(self, ids: np.ndarray) -> None:
        """Write tokens; a new shard begins where one is full.

        Args:
            ids: integers of any length that the dtype can hold.
        """
        while len(ids):
            if self._stream is None:
                self._stream = (self._folder / self._name).open("wb")
            part = ids[: SHARD_TOKENS - self._tokens]
            data = part.astype(self._dtype).tobytes()
            self._stream.write(data)
            self._digest.update(data)
            self._tokens += len(part)
            if self._tokens == SHARD_TOKENS:
                self._finish()
            ids = ids[len(part) :]

    @property
    def _name(self) -> str:
        return f"{self._split}-{len(self.shards):05d}.bin"

    def _finish(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self.shards.append(Shard(self._name, self._tokens, self._digest.hexdigest()))
            self._stream, self._digest, self._tokens = None, hashlib.sha256(), 0
