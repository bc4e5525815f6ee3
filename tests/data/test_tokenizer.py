# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lowbits.data import _tokenizer
from lowbits.data._tokenizer import encode, load_tokenizer, save_tokenizer, train_bpe, vocabulary_size
from lowbits.errors import DataError
from tests.data.made_up import made_up

BPE = train_bpe(made_up(50), 320)


def ids(tokenizer: PreTrainedTokenizerFast, *texts: str) -> list[int]:
    return np.concatenate([part.ids for part in encode(tokenizer, texts)]).tolist()


@given(st.text())
def test_every_text_comes_back_from_its_tokens(text: str) -> None:
    (part,) = encode(BPE, [text])
    assert BPE.decode(part.ids[:-1]) == text
    assert part.ids[-1] == BPE.eos_token_id == 0 and part.ends and part.bytes == len(text.encode())


def test_training_is_repeatable_and_keeps_to_the_size() -> None:
    again = train_bpe(made_up(50), 320)
    assert again.backend_tokenizer.to_str() == BPE.backend_tokenizer.to_str()
    assert vocabulary_size(BPE) == 320
    assert vocabulary_size(train_bpe(["a b"], 4096)) < 270  # little text gives less


def test_the_end_of_text_inside_a_document_is_plain_text() -> None:
    inside = ids(BPE, "a<|endoftext|>b")
    assert inside.count(0) == 1 and inside[-1] == 0
    assert BPE("a<|endoftext|>b").input_ids.count(0) == 1  # and the tokenizer itself still knows it


def test_pieces_of_a_long_document_give_the_tokens_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path(sysconfig.get_path("stdlib"), "argparse.py").read_text(encoding="utf-8")
    tokenizer = train_bpe([text], 600)
    whole = ids(tokenizer, text, "x", text)
    monkeypatch.setattr(_tokenizer, "_PIECE", 1000)
    monkeypatch.setattr(_tokenizer, "_BATCH", 5000)
    parts = list(encode(tokenizer, [text, "x", text]))
    assert len(parts) > 50 and sum(part.ends for part in parts) == 3
    assert np.concatenate([part.ids for part in parts]).tolist() == whole
    assert sum(part.bytes for part in parts) == 2 * len(text.encode()) + 1
    assert "".join(_tokenizer.pieces("é" * 2500)) == "é" * 2500


def test_what_is_saved_is_what_transformers_load(tmp_path: Path) -> None:
    files = save_tokenizer(BPE, tmp_path)
    assert "tokenizer.json" in files and all((tmp_path / name).exists() for name in files)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "mi né  \n\tbadake<|endoftext|>"
    assert loaded(text).input_ids == BPE(text).input_ids and loaded.eos_token_id == 0


def gpt2(folder: Path) -> Path:
    model = json.loads(BPE.backend_tokenizer.to_str())["model"]
    (folder / "encoder.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "vocab.bpe").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    return folder


def bare(folder: Path) -> Path:
    BPE.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def full(folder: Path) -> Path:
    save_tokenizer(BPE, folder)
    return folder


@pytest.mark.parametrize("make", [gpt2, bare, full, lambda folder: bare(folder) / "tokenizer.json"])
def test_a_tokenizer_is_loaded_from_any_of_its_forms(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    loaded = load_tokenizer(make(tmp_path))
    text = "\n".join(made_up(2))
    assert ids(loaded, text) == ids(BPE, text)
    assert len(_tokenizer.tokenizer_files(make(tmp_path))) >= 1


def test_truncation_of_a_tokenizer_does_not_shorten_documents(tmp_path: Path) -> None:
    short = Tokenizer.from_str(BPE.backend_tokenizer.to_str())
    short.enable_truncation(4)
    short.enable_padding(length=64)
    short.save(str(tmp_path / "tokenizer.json"))
    text = made_up(1)[0]
    assert ids(load_tokenizer(tmp_path), text, "x") == ids(BPE, text, "x")


def test_gpt2_gives_the_published_tokens(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "gpt2")
    assert ids(tokenizer, "Hello world") == [15496, 995, 50256] and vocabulary_size(tokenizer) == 50257


def test_a_tokenizer_that_cannot_serve_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{nope")
    with pytest.raises(DataError, match=r"bad.json: no tokenizer can be loaded \(key must be a string"):
        load_tokenizer(tmp_path / "bad.json")
    with pytest.raises(DataError, match="no such tokenizer file or folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(DataError, match="nobody/nothing: no tokenizer can be loaded"):
        load_tokenizer("nobody/nothing")
    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="so nothing ends a text"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(DataError, match="no end-of-text token"):
        load_tokenizer(tmp_path)
