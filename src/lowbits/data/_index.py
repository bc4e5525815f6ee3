# SPDX-License-Identifier: Apache-2.0
"""Describe a folder of tokens: `index.json`, its shards, and the checksums that hold them together.

train-00000.bin ...   token ids, little-endian uint16, or uint32 above 65,536; documents, each with its end of text
val-00000.bin ...     the same for validation
tokenizer.json ...    what `transformers.AutoTokenizer.from_pretrained(folder)` loads
index.json            this description, written last
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lowbits.data._readers import file_sha256
from lowbits.errors import DataError

FORMAT_VERSION = 1
INDEX = "index.json"


@dataclass(frozen=True)
class Shard:
    """One file of tokens.

    Args:
        file: its name.
        tokens: how many it holds.
        sha256: of its bytes.
    """

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """One side of the data.

    Args:
        tokens: in all shards, ends of text included.
        documents: how many; a document that was cut counts on both sides.
        bytes: of UTF-8 text, which bits per byte are counted over.
        shards: in order; a window of tokens may run from one into the next.
    """

    tokens: int
    documents: int
    bytes: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Index:
    """All that is known of a folder of tokens.

    Args:
        version: of this layout.
        dtype: of the shards, `uint16` or `uint32`.
        vocab_size: one more than the largest token id that the tokenizer knows.
        eos_id: the token after each document.
        splits: by name, `train` and `val`.
        tokenizer: sha256 of each tokenizer file, by name.
        sources: where the text came from.
        duplicates: documents that were dropped because they stood there before.
        empty: documents that were dropped because there was nothing in them.
        request: what was asked for; the same request finds its work done.
    """

    version: int
    dtype: str
    vocab_size: int
    eos_id: int
    splits: dict[str, Split]
    tokenizer: dict[str, str]
    sources: tuple[str, ...]
    duplicates: int
    empty: int
    request: dict[str, object]

    def to_json(self) -> str:
        """Return the text of index.json."""
        return json.dumps(asdict(self), indent=2) + "\n"


def read_index(folder: Path) -> Index:
    """Read the description of a folder of tokens.

    Args:
        folder: what `prepare` wrote.

    Returns:
        The index; the files that it names have not been looked at.

    Raises:
        DataError: there is none, it is damaged, or a newer version wrote it.
    """
    path = folder / INDEX
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        version = fields["version"]
        if version > FORMAT_VERSION:
            raise DataError(
                f"{path}: format version {version}, this lowbits reads up to {FORMAT_VERSION}."
                " Upgrade lowbits, or prepare the data again."
            )
        if fields["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"dtype {fields['dtype']}")
        for split in fields["splits"].values():
            split["shards"] = tuple(Shard(**shard) for shard in split["shards"])
        fields["splits"] = {name: Split(**split) for name, split in fields["splits"].items()}
        fields["sources"] = tuple(fields["sources"])
        return Index(**fields)
    except FileNotFoundError as error:
        raise DataError(f"{folder}: no {INDEX}, so no token data. Make some with `lowbits data prepare`.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check that you may read it.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({error}). Remove the folder and prepare the data again.") from error


def verify(folder: Path, index: Index) -> None:
    """Compare every file with the checksum that was taken when it was written.

    Args:
        folder: what `prepare` wrote.
        index: its description.

    Raises:
        DataError: a file is missing, truncated or altered.
    """
    remedy = f"Restore it, or remove {folder} and prepare the data again."
    for shard in (shard for split in index.splits.values() for shard in split.shards):
        path, size = folder / shard.file, shard.tokens * (2 if index.dtype == "uint16" else 4)
        if not path.exists():
            raise DataError(f"{path}: missing. {remedy}")
        if (found := path.stat().st_size) != size:
            raise DataError(f"{path}: {found} bytes where {INDEX} says {size}: truncated or altered. {remedy}")
        if file_sha256(path) != shard.sha256:
            raise DataError(f"{path}: altered after it was prepared, its sha256 is not that of {INDEX}. {remedy}")
    for name, digest in index.tokenizer.items():
        if not (folder / name).exists():
            raise DataError(f"{folder / name}: missing. {remedy}")
        if file_sha256(folder / name) != digest:
            raise DataError(f"{folder / name}: altered; the tokens were made by another tokenizer. {remedy}")
