# SPDX-License-Identifier: Apache-2.0
"""Train, load and apply tokenizers.

The trained one is a byte-level BPE as in GPT-2 (Radford et al. 2019, sec. 2.2): any text has a code, and decoding gives
back every byte.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lowbits.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
MIN_VOCABULARY = 257  # 256 bytes and the end of text
_BATCH = 1 << 22  # characters that are encoded at once: an encoding takes about 90 bytes a character
_PIECE = 1 << 19  # a longer document is encoded in pieces
_WORD_END = re.compile(r"(?<=\S)(?=\s)")  # GPT-2's rule always parts the text there


class Encoded(NamedTuple):
    """A document, or a piece of a long one, in tokens.

    Args:
        ids: int64; the last is the end of text if the document ends here.
        bytes: of UTF-8 that they stand for.
        ends: whether the document ends here.
    """

    ids: np.ndarray
    bytes: int
    ends: bool


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE.

    Args:
        texts: the training split, and nothing else.
        vocab_size: the largest vocabulary, `<|endoftext|>` (id 0) and 256 bytes included; little text gives less.

    Returns:
        A tokenizer whose end of text is `<|endoftext|>`; the same for the same texts.
    """
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_end(tokenizer, END_OF_TEXT)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer from disk or from the hub.

    Args:
        name: a `tokenizer.json`, a folder of tokenizer files (those of `transformers`, or GPT-2's `encoder.json` and
            `vocab.bpe`), or a name on the hub.

    Returns:
        The tokenizer; it has an end-of-text token.

    Raises:
        DataError: there is no such tokenizer, its files are damaged, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(name).expanduser()
    if not os.path.exists(path) and (path.suffix or path.is_absolute() or str(name).startswith(".")):
        raise DataError(f"{name}: no such tokenizer file or folder. Leave it out to train one on the text.")
    try:
        tokenizer = _from_disk(path) if os.path.exists(path) else AutoTokenizer.from_pretrained(str(name))
    except DataError:
        raise
    except (
        Exception
    ) as error:  # `tokenizers` raises bare Exception for a damaged file, `transformers` whatever it meets
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".: ")
        raise DataError(
            f"{name}: no tokenizer can be loaded ({reason}). Give a tokenizer.json, a folder that holds one, or none."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"{name}: a {type(tokenizer).__name__}, which has no tokenizer.json. Convert it to a fast one.")
    if tokenizer.eos_token_id is None:
        raise DataError(f"{name}: no end-of-text token. Set `eos_token` in its tokenizer_config.json.")
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return one more than the largest id, added tokens included: the rows that an embedding needs.

    Args:
        tokenizer: any.
    """
    return max(tokenizer.get_vocab().values()) + 1


def end_of_text_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id of the token that stands after each document.

    Args:
        tokenizer: one of `load_tokenizer` or `train_bpe`.
    """
    return cast(int, tokenizer.eos_token_id)


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Iterator[Encoded]:
    """Encode documents, each followed by the end of text.

    What looks like a special token inside a document is encoded as the plain text that it is.

    Args:
        tokenizer: any; left unchanged.
        texts: the documents.

    Yields:
        The documents in order, long ones in pieces.
    """
    end = end_of_text_id(tokenizer)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    for batch in _batches(texts):
        encodings = backend.encode_batch_fast([piece for piece, _ in batch], add_special_tokens=False)
        for encoding, (piece, last) in zip(encodings, batch, strict=True):
            ids = [*encoding.ids, end] if last else encoding.ids
            yield Encoded(np.asarray(ids, dtype=np.int64), len(piece.encode()), last)


def tokenizer_files(name: str | Path) -> list[Path]:
    """Return the files that make up a tokenizer on disk; none for one of the hub.

    Args:
        name: what `load_tokenizer` takes.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    kinds = ("*.json", "*.bpe", "*.model", "*.txt")
    return sorted(file for kind in kinds for file in path.glob(kind)) if path.is_dir() else []


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> list[str]:
    """Write files that `transformers.AutoTokenizer.from_pretrained(folder)` loads.

    Args:
        tokenizer: any.
        folder: where to; it exists.

    Returns:
        The names of the files, sorted.

    Raises:
        OSError: they cannot be written.
    """
    before = {path.name for path in folder.iterdir()}
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error  # `tokenizers` raises a bare Exception when a write fails
    return sorted({path.name for path in folder.iterdir() if path.is_file()} - before)


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _from_disk(path: Path) -> PreTrainedTokenizerFast:
    if path.is_file():
        return _from_json(path)
    if (path / "encoder.json").exists() and (path / "vocab.bpe").exists():  # as OpenAI published GPT-2's
        bpe = models.BPE.from_file(str(path / "encoder.json"), str(path / "vocab.bpe"))
        return _with_end(_byte_level(bpe), END_OF_TEXT)
    if (path / "tokenizer.json").exists() and not (path / "tokenizer_config.json").exists():
        return _from_json(path / "tokenizer.json")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path))


def _from_json(path: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_file(str(path))
    known = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
    end = next((token for token in known if tokenizer.token_to_id(token) is not None), None)
    if end is None:
        raise DataError(
            f"{path}: none of {', '.join(known)} is in it, so nothing ends a text."
            " Give a folder whose tokenizer_config.json names the `eos_token`."
        )
    return _with_end(tokenizer, end)


def _with_end(tokenizer: Tokenizer, end: str) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)


def _batches(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    size = 0
    for text in texts:
        parts = list(pieces(text))
        for number, piece in enumerate(parts, start=1):
            batch.append((piece, number == len(parts)))
            size += len(piece)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def pieces(text: str) -> Iterator[str]:
    """Cut a document between words into parts of at most half a million characters: encoding one must fit into memory.

    Args:
        text: the document.

    Yields:
        The parts, in order; together they are the document, and their tokens are its tokens.
    """
    start = 0
    while len(text) - start > _PIECE:
        ends = [match.start() for match in _WORD_END.finditer(text, start + _PIECE * 7 // 8, start + _PIECE)]
        end = ends[-1] if ends else start + _PIECE
        yield text[start:end]
        start = end
    yield text[start:]
