# SPDX-License-Identifier: Apache-2.0
"""Read documents from one file or data set: text, JSON-lines, parquet, Hugging Face.

A reader yields the text of one document after the other and never holds more than one of them. Whatever cannot be read
is a `DataError` that names the file and the line or byte.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from lowbits.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

SEPARATOR = b"<|endoftext|>"  # alone on a line, it stands between two documents of a text file
_OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
COMPRESSED = tuple(_OPENERS)


@dataclass(frozen=True)
class TextFile:
    """A UTF-8 text file, plain or compressed; documents are separated by a line `<|endoftext|>`.

    Args:
        path: the file; `.gz`, `.xz` and `.bz2` are decompressed.
    """

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def documents(self) -> Iterator[str]:
        """Yield the documents in order."""
        with _opened(self.path) as lines:
            start, document = 0, b""
            parts: list[bytes] = []
            for line in lines:
                if line.rstrip(b"\r\n") == SEPARATOR:
                    document = b"".join(parts)
                    yield _decode(document.removesuffix(b"\n"), self.path, start)
                    start, parts = start + len(document) + len(line), []
                else:
                    parts.append(line)
            yield _decode(b"".join(parts), self.path, start)

    def fingerprint(self) -> str:
        """Return the sha256 of what would be read."""
        return file_sha256(self.path)


@dataclass(frozen=True)
class JsonLines:
    """A file of one JSON object a line, plain or compressed.

    Args:
        path: the file.
        text_field: the key whose value is the document.
    """

    path: Path
    text_field: str = "text"

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def documents(self) -> Iterator[str]:
        """Yield the documents in order."""
        with _opened(self.path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield self._document(line, f"{self.path}:{number}")

    def _document(self, line: bytes, where: str) -> str:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error}). Write one object a line.") from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: not a JSON object. Write one object a line.")
        _require(self.text_field, list(record), where)
        return _text(record[self.text_field], self.text_field, where)

    def fingerprint(self) -> str:
        """Return the sha256 of what would be read."""
        return f"{file_sha256(self.path)}#{self.text_field}"


@dataclass(frozen=True)
class Parquet:
    """A parquet file; every row is a document.

    Args:
        path: the file.
        text_field: the column that holds the documents.
    """

    path: Path
    text_field: str = "text"

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def documents(self) -> Iterator[str]:
        """Yield the documents in order."""
        import pyarrow
        from pyarrow.parquet import ParquetFile

        try:
            with ParquetFile(self.path) as table:
                _require(self.text_field, table.schema_arrow.names, self.name)
                for batch in table.iter_batches(batch_size=256, columns=[self.text_field]):
                    for value in batch.column(0).to_pylist():
                        yield _text(value, self.text_field, self.name)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.path}: not a readable parquet file ({_first_line(error)}).") from error

    def fingerprint(self) -> str:
        """Return the sha256 of what would be read."""
        return f"{file_sha256(self.path)}#{self.text_field}"


@dataclass(frozen=True)
class SavedDataset:
    """A folder that `datasets.Dataset.save_to_disk` wrote.

    Args:
        path: the folder.
        text_field: the column that holds the documents.
    """

    path: Path
    text_field: str = "text"

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def documents(self) -> Iterator[str]:
        """Yield the documents in order."""
        from datasets import Dataset

        splits = self.path / "dataset_dict.json"
        if splits.exists():
            names = json.loads(splits.read_text(encoding="utf-8")).get("splits", [])
            example = self.path / (names or ["train"])[0]
            raise DataError(f"{self.path}: holds the splits {', '.join(names)}. Name one, for example {example}.")
        try:
            dataset = Dataset.load_from_disk(str(self.path))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: not a readable data set ({_first_line(error)}).") from error
        yield from _column(dataset, self.text_field, self.name)

    def fingerprint(self) -> str:
        """Return the sha256 of all that would be read."""
        files = sorted(path for path in self.path.rglob("*") if path.is_file())
        joined = " ".join(file_sha256(path) for path in files)
        return f"{hashlib.sha256(joined.encode()).hexdigest()}#{self.text_field}"


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face hub.

    Args:
        dataset: `OWNER/NAME` or `OWNER/NAME/CONFIGURATION`.
        split: the split to read.
        text_field: the column that holds the documents.
    """

    dataset: str
    split: str = "train"
    text_field: str = "text"

    @property
    def name(self) -> str:
        """The data set and its split, as the command line writes them."""
        return f"hf:{self.dataset}:{self.split}"

    def documents(self) -> Iterator[str]:
        """Yield the documents in order; downloads the data set on first use."""
        import datasets

        parts = self.dataset.split("/")
        path, configuration = "/".join(parts[:2]), "/".join(parts[2:]) or None
        try:
            dataset = datasets.load_dataset(path, configuration, split=self.split)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.name}: cannot be loaded from the hub ({_first_line(error)}).") from error
        yield from _column(cast("Dataset", dataset), self.text_field, self.name)

    def fingerprint(self) -> str:
        """Return the name: a data set of the hub is taken for what it is called."""
        return f"{self.name}#{self.text_field}"


def file_sha256(path: Path) -> str:
    """Return the sha256 of the bytes of a file.

    Args:
        path: the file; a compressed one is not decompressed.

    Returns:
        64 hexadecimal digits.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as stream:
            yield cast(BinaryIO, stream)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or _first_line(error)
    return DataError(f"{path}: cannot be read ({reason}). Check that the file is whole and that you may read it.")


def _decode(data: bytes, path: Path, start: int) -> str:
    if b"\0" in data:
        at = start + data.index(b"\0")
        raise DataError(f"{path}: binary, not text (a zero byte at {at}). Leave it out, or convert it to UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = start + error.start
        raise DataError(
            f"{path}: not UTF-8 (byte 0x{data[error.start]:02x} at {at}). Convert it with `iconv -t UTF-8`."
        ) from error


def _require(field: str, names: list[str], where: str) -> None:
    if field not in names:
        raise DataError(
            f"{where}: no field {field!r}, only {', '.join(names)}. Choose one with --text-field, or leave it out."
        )


def _text(value: object, field: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f"{where}: the field {field!r} holds {kind}, not text. Choose another with --text-field.")
    return value


def _column(dataset: Dataset, field: str, where: str) -> Iterator[str]:
    _require(field, dataset.column_names, where)
    for batch in dataset.select_columns([field]).iter(batch_size=256):
        for value in cast("dict[str, list[object]]", batch)[field]:
            yield _text(value, field, where)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
