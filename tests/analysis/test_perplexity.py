# SPDX-License-Identifier: Apache-2.0
"""Perplexity against explicit loops, and against the entropy of real text."""

from __future__ import annotations

import lzma
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lowbits.analysis import perplexity, read_text, text_perplexity, windows
from lowbits.errors import DataError, SpecError


class Counting(nn.Module):
    """Logits that depend on the running mean of the window's embeddings: every token of context matters."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 8)
        self.head = nn.Linear(8, vocabulary)

    def forward(self, ids: Tensor) -> SimpleNamespace:
        context = self.embedding(ids).cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]
        return SimpleNamespace(logits=self.head(context))


class Unigram(nn.Module):
    """The same fixed distribution everywhere."""

    def __init__(self, counts: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(counts.double().clamp_min(1e-9).log().float())

    def forward(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*ids.shape, -1))


class Bytes:
    def encode(self, text: str, /, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return list(text.encode())


@given(n=st.integers(2, 60), window=st.integers(1, 20), data=st.data())
def test_every_token_but_the_first_is_scored_once(n: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    scored: list[int] = []
    for start, first, end in windows(n, window, stride):
        assert 0 <= start <= first < end <= n - 1 and end - start <= window
        assert start == 0 or end - start == window  # as much context as fits
        scored += range(first + 1, end + 1)
    assert scored == list(range(1, n))


@pytest.mark.parametrize(("window", "stride", "batch"), [(7, None, 3), (7, 3, 2), (64, None, 8), (1, 1, 4)])
def test_against_a_loop_over_tokens(window: int, stride: int | None, batch: int) -> None:
    model, tokens = Counting(11).train(), torch.randint(0, 11, (40,))
    total = 0.0
    for start, first, end in windows(40, window, stride or window):
        for target in range(first + 1, end + 1):
            logits = model(tokens[None, start:target]).logits[0, -1].double()
            total -= F.log_softmax(logits, -1)[tokens[target]].item()
    score = perplexity(model, tokens, window=window, stride=stride, batch=batch)
    assert (score.tokens, score.bytes, score.bits_per_byte) == (39, None, None)
    assert score.nats == pytest.approx(total, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(total / 39), rel=1e-5)
    assert model.training


def test_wikitext_2_under_its_own_byte_frequencies(shared_data: Path) -> None:
    path = shared_data / "wikitext-2" / "wiki.valid.raw.xz"
    raw = lzma.decompress(path.read_bytes())
    counts = torch.bincount(torch.frombuffer(bytearray(raw), dtype=torch.uint8).long(), minlength=256)
    p = counts[counts > 0].double() / len(raw)
    entropy = -(p * p.log()).sum().item()
    score = text_perplexity(Unigram(counts), Bytes(), [path])
    assert (score.tokens, score.bytes) == (len(raw) - 1, len(raw))
    assert score.loss == pytest.approx(entropy, rel=1e-4)
    assert score.bits_per_byte == pytest.approx(entropy / math.log(2), rel=1e-4)


def test_files_are_summed_by_tokens_not_averaged(tmp_path: Path) -> None:
    texts = ["abcab" * 30, "cc"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    model = Counting(128)
    parts = [perplexity(model, torch.tensor(list(text.encode())), window=16) for text in texts]
    whole = text_perplexity(model, Bytes(), [tmp_path / "0.txt", tmp_path / "1.txt"], window=16)
    assert whole.loss == pytest.approx(sum(p.nats for p in parts) / (149 + 1), rel=1e-6)
    assert whole.loss != pytest.approx(sum(p.loss for p in parts) / 2, rel=1e-3)


def test_bad_input(tmp_path: Path) -> None:
    model = Unigram(torch.ones(256))
    (tmp_path / "binary.txt").write_bytes(b"ab\xff\xfe\x00")
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "torn.txt.xz").write_bytes(lzma.compress(b"text" * 1000)[:-20])
    cases = {"is not UTF-8": "binary.txt", "at least 2": "short.txt", "cannot be read": "torn.txt.xz"}
    cases["No such file"] = "absent.txt"
    for message, name in cases.items():
        with pytest.raises(DataError, match=message):
            text_perplexity(model, Bytes(), [tmp_path / name])
    with pytest.raises(DataError, match="no text file"):
        text_perplexity(model, Bytes(), [])
    with pytest.raises(SpecError, match="stride 9"):
        perplexity(model, torch.zeros(5, dtype=torch.long), window=8, stride=9)
    (tmp_path / "plain.txt").write_text("ab\n")
    assert read_text(tmp_path / "plain.txt") == "ab\n"
