# SPDX-License-Identifier: Apache-2.0
"""Keep a teacher's likeliest classes on disk, so that it runs once for many students, or on another machine.

    FOLDER/index.jsonl               a line says what is kept, then one of each shard its examples, size and SHA-256
    FOLDER/shard-00000.safetensors   keys [E], log_probs [E, ..., K], classes [E, ..., K], rest [E, ...]

A shard is written whole, then the line that names it: whatever instant the process dies at, all shards of the index are
whole, and a writer goes on where they end. Reading maps the shards, so a cache may be larger than the memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbits.errors import DataError, RunError, ShapeError
from lowbits.export import write_whole
from lowbits.methods._distillation_loss import TopK

INDEX = "index.jsonl"
FORMAT = "lowbits-teacher-1"
_REMEDY = "TeacherCache.repair(folder) takes it out of the index; then go on writing: what is missing is written again."


class Stored(Enum):
    """In which precision logarithms of probabilities are kept."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors on disk."""
        return getattr(torch, self.value)


@dataclass(frozen=True)
class CacheSettings:
    """What a cache holds; two caches with other settings never mix.

    Args:
        teacher: a name, for the error messages.
        num_classes: C, the teacher's vocabulary.
        k: how many classes are kept for each position, at most C.
        temperature: of the softmax.
        stored: precision of the logarithms.
    Raises:
        ShapeError: k is not between 1 and C.
    """

    teacher: str
    num_classes: int
    k: int
    temperature: float = 1.0
    stored: Stored = Stored.FLOAT32

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.num_classes:
            raise ShapeError(f"a cache keeps 1 to {self.num_classes} classes a position, got {self.k}.")


def content_keys(ids: Tensor) -> list[int]:
    """Return a key for each sequence of tokens that depends on its content alone.

    Args:
        ids: integers, [E, ...].
    """
    rows = ids.cpu().to(torch.int64).contiguous().reshape(ids.shape[0], -1).numpy()
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return [int.from_bytes(digest, "little") >> 1 for digest in digests]


class TeacherCache:
    """A teacher's likeliest classes on disk.

    Args:
        folder: of the cache; made by `create`.
    Raises:
        DataError: there is no cache, or its index or a shard is damaged; names the file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.settings, self._shards = _read_index(self.folder)
        self._where: dict[int, tuple[int, int]] = {}
        self._open: dict[int, dict[str, Tensor]] = {}
        for number, shard in enumerate(self._shards):
            self._where |= {key: (number, row) for row, key in enumerate(_keys(self.folder, shard))}

    @staticmethod
    def create(folder: str | Path, settings: CacheSettings) -> TeacherCache:
        """Make a cache, or open the one in the folder to go on with it.

        Args:
            folder: where to; made if need be.
            settings: what is kept.
        Raises:
            DataError: the folder holds a cache of other settings, or other files.
            RunError: it cannot be written.
        """
        folder = Path(folder)
        if (folder / INDEX).exists():
            cache = TeacherCache(folder)
            if cache.settings != settings:
                raise DataError(
                    f"{folder} holds a cache of {cache.settings}, not of {settings}. Take another folder; the one "
                    "there is untouched."
                )
            return cache
        if folder.is_dir() and any(not path.name.startswith((".", "shard-")) for path in folder.iterdir()):
            raise DataError(f"{folder} holds other files; a cache needs a folder of its own.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{folder} cannot be made: {error.strerror}; choose another folder.") from error
        _write_index(folder, settings, [])
        return TeacherCache(folder)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._where)

    def __contains__(self, key: int) -> bool:
        """Tell whether an example is there."""
        return key in self._where

    def missing(self, keys: list[int]) -> list[int]:
        """Return the positions in `keys` of the examples that are not there.

        Args:
            keys: of examples.
        """
        return [i for i, key in enumerate(keys) if key not in self._where]

    def append(self, keys: list[int], logits: Tensor) -> None:
        """Write a shard of examples; those that are there already, or come twice, are left out.

        Args:
            keys: one for each example, below 2^63: an index of the data set, or `content_keys`.
            logits: floating point, [E, ..., C]: all examples of one cache have the same shape.
        Raises:
            ShapeError: another vocabulary, or not a key for each example.
            RunError: the disk is full; all earlier shards stand.
        """
        if logits.shape[-1] != self.settings.num_classes or len(keys) != logits.shape[0]:
            raise ShapeError(
                f"{self.folder} keeps {self.settings.num_classes} classes, got logits {tuple(logits.shape)} for "
                f"{len(keys)} keys. Write another vocabulary into another folder."
            )
        rows = list(dict(reversed([(keys[i], i) for i in self.missing(keys)])).values())[::-1]
        if not rows:
            return
        new = logits.detach()[torch.tensor(rows, device=logits.device)]
        top = TopK.of_logits(new, self.settings.k, self.settings.temperature)
        kept = [keys[i] for i in rows]
        self._add(kept, self._tensors(kept, top))

    def read(self, keys: list[int]) -> TopK:
        """Return the teacher of a batch.

        Args:
            keys: of the examples, as they were given to `append`.
        Raises:
            DataError: the cache is empty, lacks an example, or a shard is damaged; names it.
        """
        if not self._where:
            raise DataError(
                f"{self.folder} is empty; fill it with append (TeacherCache.create) before training from it."
            )
        if lacking := self.missing(keys):
            raise DataError(
                f"{self.folder} lacks {len(lacking)} of {len(keys)} examples (first key {keys[lacking[0]]}): it was "
                "written for other data, or not to its end. Go on writing it with the same data."
            )
        rows = [(self._shard(number), row) for number, row in (self._where[key] for key in keys)]
        log_probs = torch.stack([shard["log_probs"][row].float() for shard, row in rows])
        classes = torch.stack([shard["classes"][row].long() for shard, row in rows])
        rest = torch.stack([shard["rest"][row].float() for shard, row in rows])
        return TopK(log_probs, classes, rest, self.settings.num_classes, self.settings.temperature)

    def verify(self) -> list[str]:
        """Compare every shard with its SHA-256, and return what is wrong, one line a shard."""
        return [line for shard in self._shards if (line := _complaint(self.folder, shard)) is not None]

    @staticmethod
    def repair(folder: str | Path) -> int:
        """Take damaged shards out of the index, so that their examples can be written again; no file is deleted.

        Args:
            folder: of the cache.
        Returns:
            The number of examples that are gone; 0 if every shard has its SHA-256.
        """
        folder = Path(folder)
        settings, shards = _read_index(folder)
        bad = [shard for shard in shards if _complaint(folder, shard) is not None]
        for path in (folder / shard["name"] for shard in bad):
            if path.exists():
                path.replace(path.with_name(f".{path.name}.damaged"))
        if bad:
            _write_index(folder, settings, [shard for shard in shards if shard not in bad])
        return sum(shard["examples"] for shard in bad)

    def _tensors(self, keys: list[int], top: TopK) -> dict[str, Tensor]:
        dtype = self.settings.stored.dtype
        integer = torch.uint8 if self.settings.num_classes <= 256 else torch.int32
        if 256 < self.settings.num_classes <= 1 << 16:
            integer = torch.uint16
        return {
            "keys": torch.tensor(keys, dtype=torch.int64),
            "log_probs": top.log_probs.to(dtype).cpu().contiguous(),
            "classes": top.classes.to(integer).cpu().contiguous(),
            "rest": top.rest.to(dtype).cpu().contiguous(),
        }

    def _add(self, keys: list[int], tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save

        data = save(tensors)
        numbers = [int(shard["name"][6:11]) for shard in self._shards]  # a repaired cache has gaps
        name = f"shard-{max(numbers, default=-1) + 1:05d}.safetensors"
        shard = {"name": name, "examples": len(keys), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write_whole(self.folder / name, data)
        _add_line(self.folder, shard)
        self._where |= {key: (len(self._shards), row) for row, key in enumerate(keys)}
        self._shards.append(shard)

    def _shard(self, number: int) -> dict[str, Tensor]:
        """The tensors of a shard, mapped from its file; compared with its SHA-256 when it is first opened."""
        if number not in self._open:
            from safetensors.torch import load_file

            shard = self._shards[number]
            if (line := _complaint(self.folder, shard)) is not None:
                raise DataError(f"{line} {_REMEDY}")
            self._open[number] = load_file(self.folder / shard["name"])
        return self._open[number]


def _keys(folder: Path, shard: dict[str, Any]) -> list[int]:
    """The keys of a shard's examples; the rest of the file is not read."""
    from safetensors import SafetensorError, safe_open

    path = folder / shard["name"]
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.get_tensor("keys").tolist()
    except (SafetensorError, OSError) as error:
        raise DataError(f"{_complaint(folder, shard) or path} {_REMEDY}") from error
    if len(keys) != shard["examples"]:
        raise DataError(f"{_complaint(folder, shard) or path} {_REMEDY}")
    return keys


def _complaint(folder: Path, shard: dict[str, Any]) -> str | None:
    path = folder / shard["name"]
    if not path.is_file():
        return f"{path} of the teacher's cache is missing."
    if path.stat().st_size != shard["bytes"]:
        return f"{path} of the teacher's cache is cut off: {path.stat().st_size} of {shard['bytes']} bytes."
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
            return f"{path} of the teacher's cache was altered: it does not have its SHA-256."
    return None


def _write_index(folder: Path, settings: CacheSettings, shards: list[dict[str, Any]]) -> None:
    told = asdict(settings) | {"stored": settings.stored.value, "format": FORMAT}
    write_whole(folder / INDEX, b"".join(_line(entry) for entry in [told, *shards]))


def _add_line(folder: Path, shard: dict[str, Any]) -> None:
    """Append to the index, behind its last whole line: one that a crash tore off is no longer there."""
    path = folder / INDEX
    try:
        with path.open("r+b") as file:
            file.truncate(path.read_bytes().rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
            file.write(_line(shard))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror or error}. All earlier shards stand; free some space and go on."
        ) from error


def _line(entry: dict[str, Any]) -> bytes:
    """An entry and its SHA-256."""
    text = json.dumps(entry, sort_keys=True)
    return json.dumps([text, hashlib.sha256(text.encode()).hexdigest()]).encode() + b"\n"


def _read_index(folder: Path) -> tuple[CacheSettings, list[dict[str, Any]]]:
    path = folder / INDEX
    if not path.is_file():
        raise DataError(f"{folder} is no teacher's cache: {INDEX} is missing. TeacherCache.create makes one.")
    lines = path.read_bytes().split(b"\n")[:-1]  # what stands behind the last end of a line was torn off by a crash
    entries = [_entry(line) for line in lines]
    whole = [entry for entry in entries if entry is not None]
    if not whole or len(whole) < len(entries):
        raise DataError(
            f"{path} is damaged: it is not what was written. Take it from a copy, or move the folder away and write "
            "the cache again; its shards are untouched."
        )
    told, shards = whole[0], whole[1:]
    if told.pop("format", None) != FORMAT:
        raise DataError(f"{path} is of another format, this version reads {FORMAT}.")
    return CacheSettings(**{**told, "stored": Stored(told["stored"])}), shards


def _entry(line: bytes) -> dict[str, Any] | None:
    """What a line of the index says; None if it is not what was written."""
    try:
        text, digest = json.loads(line)
        return json.loads(text) if hashlib.sha256(text.encode()).hexdigest() == digest else None
    except (ValueError, TypeError, AttributeError):
        return None
