# SPDX-License-Identifier: Apache-2.0
"""Find the reader for what a user names: a file, a folder, `stdlib`, or a data set of the hub."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lowbits.data._readers import COMPRESSED, HubDataset, JsonLines, Parquet, SavedDataset, TextFile
from lowbits.errors import DataError


class Source(Protocol):
    """Anything that yields documents; write a class with these three to read what lowbits cannot."""

    @property
    def name(self) -> str:
        """What index.json and messages call it."""
        ...

    def documents(self) -> Iterator[str]:
        """Yield the text of every document, in an order that never changes."""
        ...

    def fingerprint(self) -> str:
        """Return a string that changes whenever the documents do."""
        ...


TEXT_SUFFIXES = frozenset(
    f".{kind}"
    for kinds in (
        "txt text raw md markdown rst tex org adoc html htm",
        "py pyi c h cc cpp hpp cu rs go java js ts jl r rb sh sql swift kt scala hs ml lua pl",
    )
    for kind in kinds.split()
)
_JSON_SUFFIXES = frozenset({".jsonl", ".ndjson"})
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
# Tables written by generators: 122 code pages that differ in a few lines each (near-duplicates would stand on both
# sides of the split), and one file of help text.
_GENERATED = frozenset({"encodings", "pydoc_data"})


@dataclass(frozen=True)
class Folder:
    """All text, JSON-lines and parquet files below a folder, in the order of their paths; hidden ones are left out.

    Args:
        path: the folder.
        text_field: the field of JSON-lines and parquet files that holds the documents.
    """

    path: Path
    text_field: str = "text"

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def files(self) -> list[Path]:
        """Return the files that are read, sorted."""
        known = TEXT_SUFFIXES | _JSON_SUFFIXES | {".parquet"}
        return [path for path in _walk(self.path, frozenset({"__pycache__"})) if _suffix(path) in known]

    def documents(self) -> Iterator[str]:
        """Yield the documents of every file."""
        files = self.files()
        if not files:
            raise DataError(f"{self.path}: no file of a known kind (.txt, .md, .py, .jsonl, .parquet, ...). Name one.")
        for path in files:
            yield from _file_source(path, self.text_field).documents()

    def fingerprint(self) -> str:
        """Return the sha256 of all files."""
        return _joint_sha256(_file_source(path, self.text_field) for path in self.files())


@dataclass(frozen=True)
class StandardLibrary:
    """The source code of this machine's Python standard library: real text that is always there; a document a file.

    Left out are tests, installed packages, and the tables in `encodings` and `pydoc_data` that were written by
    generators. What stays is about 10 MB, a little different from one Python release to the next.

    Args:
        root: the folder of the library.
    """

    root: Path = field(default_factory=lambda: Path(sysconfig.get_path("stdlib")))

    @property
    def name(self) -> str:
        """`stdlib` with the version of Python."""
        return f"stdlib (Python {platform.python_version()})"

    def files(self) -> list[Path]:
        """Return the modules that are read, sorted."""
        return [path for path in _walk(self.root, _NOT_LIBRARY | _GENERATED) if path.suffix == ".py"]

    def documents(self) -> Iterator[str]:
        """Yield every module."""
        files = self.files()
        if not files:
            raise DataError(
                f"stdlib: this Python has no .py files in {self.root}. Name a text file or a folder instead."
            )
        for path in files:
            yield from TextFile(path).documents()

    def fingerprint(self) -> str:
        """Return the sha256 of all modules."""
        return _joint_sha256(TextFile(path) for path in self.files())


def find_source(spec: str | Path, text_field: str = "text") -> Source:
    """Return the reader of what a user names.

    Args:
        spec: a file, a folder, a folder written by `datasets`, `stdlib`, or `hf:OWNER/NAME[/CONFIGURATION][:SPLIT]`.
        text_field: the field of JSON-lines, parquet and data sets that holds the documents.

    Returns:
        A source; nothing has been read yet.

    Raises:
        DataError: there is nothing of that name.

    >>> find_source("hf:roneneldan/TinyStories:validation").name
    'hf:roneneldan/TinyStories:validation'
    """
    if spec == "stdlib":
        return StandardLibrary()
    if str(spec).startswith("hf:"):
        dataset, _, split = str(spec).removeprefix("hf:").partition(":")
        return HubDataset(dataset, split or "train", text_field)
    path = Path(spec).expanduser()
    if os.path.isdir(path):
        saved = any(os.path.exists(path / mark) for mark in ("state.json", "dataset_dict.json"))
        return (SavedDataset if saved else Folder)(path, text_field)
    if not os.path.exists(path):  # unlike Path.exists, this is False, not an error, below a folder of another user
        raise DataError(f"{spec}: no such file or folder. A source is a path, `stdlib`, or `hf:OWNER/NAME[:SPLIT]`.")
    return _file_source(path, text_field)


def _file_source(path: Path, text_field: str) -> Source:
    suffix = _suffix(path)
    if suffix == ".parquet":
        return Parquet(path, text_field)
    if suffix in _JSON_SUFFIXES or suffix == ".json":  # hub exports are JSON-lines under .json; a folder skips them
        return JsonLines(path, text_field)
    return TextFile(path)


def _suffix(path: Path) -> str:
    return Path(path.stem if path.suffix in COMPRESSED else path.name).suffix.lower()


def _walk(root: Path, without: frozenset[str]) -> Iterator[Path]:
    """Yield all files in a fixed order, except hidden ones and those below the folders that are left out."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}). Check that you may read it.") from error

    for folder, inner, files in os.walk(root, onerror=refuse):
        inner[:] = sorted(name for name in inner if name not in without and not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))


def _joint_sha256(sources: Iterable[Source]) -> str:
    return hashlib.sha256("\n".join(source.fingerprint() for source in sources).encode()).hexdigest()
