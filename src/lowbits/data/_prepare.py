# SPDX-License-Identifier: Apache-2.0
"""Turn text into token shards: read, part, train a tokenizer, encode, and only then let the folder appear."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from lowbits.data._corpus import SPLITS, Corpus, Partition, partition
from lowbits.data._index import FORMAT_VERSION, INDEX, Index, Split, read_index
from lowbits.data._readers import file_sha256
from lowbits.data._shards import ShardWriter
from lowbits.data._sources import Source, find_source
from lowbits.data._tokenizer import (
    MIN_VOCABULARY,
    encode,
    end_of_text_id,
    load_tokenizer,
    pieces,
    save_tokenizer,
    tokenizer_files,
    train_bpe,
    vocabulary_size,
)
from lowbits.data._tokens import TokenData
from lowbits.errors import DataError, RunError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BPE_BYTES = 100_000_000  # a tokenizer is trained on at most about so much text, evenly spread
Sources = str | Path | Source | Sequence[str | Path | Source]


def prepare(
    sources: Sources,
    out: str | Path,
    *,
    validation: Sources = (),
    tokenizer: str | Path | None = None,
    vocab_size: int = 4096,
    val_fraction: float = 0.05,
    console: Console | None = None,
) -> TokenData:
    """Turn text into a folder of token shards with the tokenizer beside them.

    Exact duplicates are dropped; no document stands on both sides of the split (see `partition`). The folder appears
    at once when all is written. If it is there already and was made by the same request from the same text, nothing is
    done.

    Args:
        sources: what `find_source` understands, or own `Source` objects; one, or several.
        out: the folder to make.
        validation: sources of the validation split, for text that comes with one; else it is taken from `sources`.
        tokenizer: what `load_tokenizer` understands. None: a byte-level BPE is trained on the training split.
        vocab_size: largest vocabulary of a trained tokenizer, at least 257.
        val_fraction: share of the text that becomes validation, in (0, 0.5]; unused if `validation` is given.
        console: where progress is shown; stderr if None.

    Returns:
        The data, verified and open.

    Raises:
        DataError: a source, the tokenizer or a number cannot be used, or a split would be empty.
        RunError: `out` holds something else, or cannot be written.
    """
    if vocab_size < MIN_VOCABULARY:
        raise DataError(f"vocab_size: at least {MIN_VOCABULARY} (256 bytes and the end of text), got {vocab_size}.")
    if not 0 < val_fraction <= 0.5:
        raise DataError(f"val_fraction: a share above 0 and up to 0.5, got {val_fraction}.")
    out, console = Path(out), console or Console(stderr=True)
    training, held_out = _sources(sources), _sources(validation)
    if not training:
        raise DataError("no sources. Name a file, a folder, `stdlib`, or `hf:OWNER/NAME`.")
    request = {
        "training": [source.fingerprint() for source in training],
        "validation": [source.fingerprint() for source in held_out] or val_fraction,
        "tokenizer": vocab_size if tokenizer is None else _tokenizer_fingerprint(tokenizer),
    }
    if not _is_done(out, request, console):
        given = None if tokenizer is None else load_tokenizer(tokenizer)
        try:
            with _appearing(out) as folder, closing(Corpus(folder)) as corpus:
                sides = _read(corpus, training, held_out, val_fraction, console)
                chosen = _train(corpus, sides, vocab_size, console) if given is None else given
                index = Index(
                    version=FORMAT_VERSION,
                    dtype=_dtype(chosen),
                    vocab_size=vocabulary_size(chosen),
                    eos_id=end_of_text_id(chosen),
                    splits=_encode(folder, corpus, sides, chosen, console),
                    tokenizer={name: file_sha256(folder / name) for name in save_tokenizer(chosen, folder)},
                    sources=tuple(source.name for source in [*training, *held_out]),
                    duplicates=corpus.duplicates,
                    empty=corpus.empty,
                    request=request,
                )
                (folder / INDEX).write_text(index.to_json(), encoding="utf-8")
        except RunError:
            if not _is_done(out, request, console):  # unless another process was the faster one
                raise
    return TokenData.open(out)


def _sources(named: Sources) -> list[Source]:
    several = [named] if isinstance(named, str | Path) or not isinstance(named, Sequence) else named
    return [find_source(one) if isinstance(one, str | Path) else one for one in several]


def _tokenizer_fingerprint(name: str | Path) -> str:
    files = tokenizer_files(name)
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest() if files else str(name)


def _is_done(out: Path, request: dict[str, object], console: Console) -> bool:
    """Say whether the folder holds what is asked for; refuse one that holds anything else."""
    if not os.path.exists(out) or (os.path.isdir(out) and not os.listdir(out)):
        return False
    if not os.path.exists(out / INDEX):
        raise RunError(f"{out}: exists and holds no token data. Choose another folder for --out, or remove it first.")
    made = read_index(out).request
    other = [key for key in request if made.get(key) != request[key]]
    if other:
        raise RunError(
            f"{out}: already holds data made from another request (differs in: {', '.join(other)})."
            " Choose another folder for --out, or remove it first."
        )
    console.print(f"{out}: this data is there already, nothing to do", markup=False, highlight=False, soft_wrap=True)
    return True


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """Give a folder beside `out` to write into; it takes that name when all went well, and is removed otherwise."""
    scratch = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        scratch.mkdir(parents=True)
        yield scratch
        for path in [*scratch.iterdir(), scratch]:
            _sync(path)
        scratch.replace(out)
        _sync(out.parent)
    except OSError as error:
        raise RunError(
            f"{out}: cannot be written ({error.strerror or error})."
            " Choose a folder that you may write to, on a disk with space."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _stage(console: Console, what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show how many bytes of text a stage has done: a bar on a terminal, one line elsewhere."""
    if not console.is_terminal:
        console.print(f"{what} ...")
        yield lambda size: None
        return
    columns = (TextColumn("{task.description:<22}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda size: progress.advance(task, size)


def _read(
    corpus: Corpus, training: list[Source], held_out: list[Source], val_fraction: float, console: Console
) -> Partition:
    """Fill the corpus and part it; given validation text comes first, so that duplicates leave the training set."""
    with _stage(console, "reading") as advance:
        for source in held_out:
            corpus.add(source, advance)
        given = len(corpus)
        for source in training:
            corpus.add(source, advance)
    return Partition(frozenset(range(given))) if held_out else partition(corpus, val_fraction)


def _train(corpus: Corpus, sides: Partition, vocab_size: int, console: Console) -> PreTrainedTokenizerFast:
    total = sum(len(text) for text in sides.texts(corpus, "train"))
    share = min(1.0, _BPE_BYTES / max(total, 1))
    with _stage(console, "training a tokenizer", total) as advance:
        return train_bpe(_sample(sides.texts(corpus, "train"), share, advance), vocab_size)


def _sample(texts: Iterator[str], share: float, advance: Callable[[int], None]) -> Iterator[str]:
    """Yield a share of the text, evenly spread over all of it; all of it if the share is 1."""
    seen = kept = 0
    for piece in (piece for text in texts for piece in pieces(text)):
        if kept <= share * seen:
            yield piece
            kept += len(piece)
        seen += len(piece)
        advance(len(piece))


def _dtype(tokenizer: PreTrainedTokenizerFast) -> str:
    return "uint16" if vocabulary_size(tokenizer) <= 1 << 16 else "uint32"


def _encode(
    folder: Path, corpus: Corpus, sides: Partition, tokenizer: PreTrainedTokenizerFast, console: Console
) -> dict[str, Split]:
    """Write the shards of both sides."""
    splits = {}
    with _stage(console, "encoding", int(corpus.sizes().sum())) as advance:
        for split in SPLITS:
            documents = size = 0
            with ShardWriter(folder, split, _dtype(tokenizer)) as writer:
                for part in encode(tokenizer, sides.texts(corpus, split)):
                    writer.append(part.ids)
                    documents, size = documents + part.ends, size + part.bytes
                    advance(part.bytes)
            tokens = sum(shard.tokens for shard in writer.shards)
            if size == 0:
                raise DataError(
                    f"{split}: zero tokens, {len(corpus)} distinct documents do not fill both sides of the split."
                    " Give more text, or validation text of its own."
                )
            splits[split] = Split(tokens, documents, size, tuple(writer.shards))
    return splits
