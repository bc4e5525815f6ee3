# SPDX-License-Identifier: Apache-2.0
"""`lowbits data prepare` and `lowbits data info`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowbits.data import TokenData, find_source, prepare
from lowbits.errors import UnknownNameError

__all__ = ["Info", "Prepare", "info_command", "main", "prepare_command"]


@dataclass(frozen=True)
class Prepare:
    """Turn text into token shards, with the tokenizer and a validation split beside them.

    Duplicates are dropped, and no document stands on both sides of the split. The folder appears when all is written;
    asking for the same again does nothing.

    A SOURCE is a text file (.txt, .md, .py, ... also .gz, .xz, .bz2; a line <|endoftext|> parts documents), a .jsonl or
    .parquet file, a folder of these, a folder written by `datasets`, hf:OWNER/NAME[/CONFIGURATION][:SPLIT], or
    `stdlib`, the source code of Python's standard library.

    Args:
        sources: Text of the training split, and of the validation split unless that has its own.
        out: Folder to make.
        validation: Sources of the validation split, for text that comes with one.
        tokenizer: A tokenizer.json, a folder of tokenizer files (also GPT-2's encoder.json and vocab.bpe), or a name on
            the hub. A byte-level BPE is trained on the training split if none is given.
        vocab_size: Largest vocabulary of a trained tokenizer.
        val_fraction: Share of the text that becomes validation, up to 0.5.
        text_field: Field of JSON-lines, parquet and data sets that holds the text.
    """

    sources: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE ...")]]
    out: Path
    validation: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE ...")] = ()
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="PATH|NAME")] = None
    vocab_size: int = 4096
    val_fraction: float = 0.05
    text_field: str = "text"


@dataclass(frozen=True)
class Info:
    """Verify a folder of token shards, and say what is in it.

    Args:
        folder: What `lowbits data prepare` wrote.
    """

    folder: tyro.conf.Positional[Path]


Args = TypeVar("Args")

_HELP = """usage: lowbits data {prepare,info} [options]

  prepare   turn text into token shards, with the tokenizer and a validation split beside them
  info      verify a folder of token shards, and say what is in it

`lowbits data prepare --help` explains the options and shows examples."""
_EXAMPLES = {
    Prepare: """
Examples:
  lowbits data prepare stdlib --out runs/data/stdlib
  lowbits data prepare corpus/ more.txt.xz --out runs/data/mine --vocab-size 8192
  lowbits data prepare chat.jsonl --text-field content --tokenizer path/to/gpt2 --out runs/data/chat
  lowbits data prepare train.txt --validation valid.txt --out runs/data/given-split
  lowbits data prepare hf:roneneldan/TinyStories --out runs/data/stories""",
    Info: """
Examples:
  lowbits data info runs/data/stdlib""",
}


def prepare_command(args: Prepare) -> None:
    """Prepare the data and print what came out.

    Args:
        args: what was asked for.

    Raises:
        LowbitsError: see `lowbits.data.prepare`.
    """
    data = prepare(
        [find_source(name, args.text_field) for name in args.sources],
        args.out,
        validation=[find_source(name, args.text_field) for name in args.validation],
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        val_fraction=args.val_fraction,
    )
    _print(data)


def info_command(args: Info) -> None:
    """Verify the data and print what it is.

    Args:
        args: which folder.

    Raises:
        DataError: it is no token data, or was altered.
    """
    _print(TokenData.open(args.folder))


def main(arguments: Sequence[str]) -> int:
    """Run `lowbits data`.

    Args:
        arguments: the words after it.

    Returns:
        0, or 2 if there are no words; errors are raised.
    """
    words = list(arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_HELP)
        return 0 if words else 2
    if words[0] == "prepare":
        prepare_command(_parse(Prepare, words))
    elif words[0] == "info":
        info_command(_parse(Info, words))
    else:
        raise UnknownNameError(
            "command", f"data {words[0]}", ("data prepare", "data info"), where="lowbits data --help"
        )
    return 0


def _parse(kind: type[Args], words: list[str]) -> Args:
    """Read the options; --help shows the docstring up to its arguments, and examples."""
    text = (inspect.getdoc(kind) or "").split("\nArgs:")[0].rstrip()
    return tyro.cli(kind, prog=f"lowbits data {words[0]}", description=f"{text}\n{_EXAMPLES[kind]}", args=words[1:])


def _print(data: TokenData) -> None:
    index = data.index
    table = Table(title=Text(str(data.folder)), title_justify="left")
    for column in ("split", "documents", "tokens", "bytes of text", "bytes a token", "shards"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for name, split in index.splits.items():
        counts = (f"{count:,}" for count in (split.documents, split.tokens, split.bytes))
        table.add_row(name, *counts, f"{data.bytes_per_token(name):.2f}", str(len(split.shards)))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    console.print(f"from {', '.join(index.sources)}")
    console.print(f"vocabulary of {index.vocab_size:,} tokens, stored as {index.dtype}; all checksums agree")
    console.print(f"dropped {index.duplicates:,} duplicate and {index.empty:,} empty documents")
