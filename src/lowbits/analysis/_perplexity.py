# SPDX-License-Identifier: Apache-2.0
"""Score a text: every token once, every token with the same weight.

    perplexity = exp( (1/n) sum_t -log p(x_t | context) )          bits per byte = sum_t -log2 p(x_t | ...) / bytes

Averaging the losses of windows instead, as is often done, gives the tokens of a short last window more weight; and
dropping the first token of each window hides the hardest ones. Both are avoided: only the first token of the whole
text, which has no context, is not scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbits.analysis._evaluating import evaluating
from lowbits.errors import DataError, SpecError


class Tokenizer(Protocol):
    """What is needed of a tokenizer: text to ids, nothing added. `transformers` and `tokenizers` both fit."""

    def encode(self, text: str, /, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text."""
        ...


@dataclass(frozen=True)
class Perplexity:
    """The score of a text.

    Args:
        nats: total negative log-likelihood.
        tokens: tokens scored.
        bytes: length of the text in UTF-8, or None if it was given as tokens.
    """

    nats: float
    tokens: int
    bytes: int | None = None

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Return `exp(loss)`; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Total bits over bytes of text: comparable between tokenizers."""
        return None if self.bytes is None else self.nats / math.log(2) / self.bytes


def perplexity(
    model: nn.Module, tokens: Tensor, *, window: int = 1024, stride: int | None = None, batch: int = 8
) -> Perplexity:
    """Score a sequence of tokens with a causal language model.

    Args:
        model: maps ids `[batch, T]` to an output with `.logits` `[batch, T, vocabulary]`; run in `eval` mode.
        tokens: `[n]` ids, n >= 2.
        window: tokens that the model sees at once, >= 1.
        stride: tokens scored per window; `window` (the default) is the cheapest, a smaller one gives each token at
            least `window - stride` tokens of context.
        batch: windows of equal length that run together.
    Returns:
        The sum over the n - 1 scored tokens.
    Raises:
        DataError: fewer than two tokens.
        SpecError: not 1 <= stride <= window.
    """
    stride = window if stride is None else stride
    if tokens.numel() < 2:
        raise DataError(f"perplexity: needs at least 2 tokens, got {tokens.numel()}. Give a longer text.")
    if not 1 <= stride <= window:
        raise SpecError(f"perplexity: needs 1 <= stride <= window, got stride {stride}, window {window}.")
    device = next(model.parameters()).device
    total = 0.0
    with torch.no_grad(), evaluating(model):
        for group in _batches(windows(tokens.numel(), window, stride), batch):
            ids = torch.stack([tokens[start : end + 1] for start, _, end in group]).long().to(device)
            scored = group[0][2] - group[0][1]
            logits = model(ids[:, :-1]).logits[:, -scored:].float()
            total += F.cross_entropy(logits.flatten(0, 1), ids[:, -scored:].flatten(), reduction="sum").item()
    return Perplexity(total, tokens.numel() - 1)


def windows(tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Lay windows over a text so that each token but the first is scored once.

    Args:
        tokens: length of the text.
        window: longest input.
        stride: tokens scored per window.
    Returns:
        Triples `(start, first, end)`: the inputs are `[start, end)`, the targets one to the right of `[first, end)`.
    """
    for first in range(0, tokens - 1, stride):
        end = min(first + stride, tokens - 1)
        yield max(0, end - window), first, end


def _batches(spans: Iterator[tuple[int, int, int]], size: int) -> Iterator[list[tuple[int, int, int]]]:
    """Group consecutive windows of equal shape."""
    group: list[tuple[int, int, int]] = []
    for span in spans:
        if group and (len(group) == size or _shape(span) != _shape(group[0])):
            yield group
            group = []
        group.append(span)
    yield group


def _shape(span: tuple[int, int, int]) -> tuple[int, int]:
    start, first, end = span
    return end - start, end - first


def text_perplexity(
    model: nn.Module,
    tokenizer: Tokenizer,
    files: Sequence[Path],
    *,
    window: int = 1024,
    stride: int | None = None,
    batch: int = 8,
) -> Perplexity:
    """Score text files, each from its own beginning, and sum.

    Args:
        model: as in `perplexity`.
        tokenizer: the one that the model was trained with.
        files: UTF-8 texts; `.xz` and `.gz` are unpacked.
        window: as in `perplexity`.
        stride: as in `perplexity`.
        batch: as in `perplexity`.
    Returns:
        Totals with bytes, so `bits_per_byte` is set.
    Raises:
        DataError: a file is missing, is not UTF-8, or has fewer than two tokens.
    """
    if not files:
        raise DataError("perplexity: no text file was given.")
    nats, tokens, size = 0.0, 0, 0
    for path in files:
        text = read_text(path)
        ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
        if ids.numel() < 2:
            raise DataError(f"{path}: holds {ids.numel()} tokens, perplexity needs at least 2. Leave the file out.")
        score = perplexity(model, ids, window=window, stride=stride, batch=batch)
        nats, tokens, size = nats + score.nats, tokens + score.tokens, size + len(text.encode())
    return Perplexity(nats, tokens, size)


def read_text(path: Path) -> str:
    """Read a UTF-8 text, unpacking `.xz` and `.gz`.

    Args:
        path: the file.
    Raises:
        DataError: it cannot be read, unpacked or decoded.
    """
    import gzip
    import lzma

    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return str(file.read())
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start}). Give a text file.") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read: {error}.") from error
