# SPDX-License-Identifier: Apache-2.0
"""The lm-eval adapter against log-likelihoods computed here; without lm-eval, the message that says what to install."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lowbits.analysis import fewshot
from lowbits.errors import DataError, RunError
from lowbits.nn import convert_, high_precision
from lowbits.recipes import named

ALPHABET = "abcdefgh \n"
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


@pytest.fixture
def model() -> GPT2LMHeadModel:
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=16, n_positions=64, bos_token_id=0, eos_token_id=0)
    config.initializer_range = 0.5  # far from uniform, so that choices differ by more than rounding
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<e>": 0, **{c: i + 1 for i, c in enumerate(ALPHABET)}}
    characters = Tokenizer(WordLevel(words, unk_token="<e>"))
    characters.pre_tokenizer = Split("", "isolated")  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<e>", bos_token="<e>")


def write_task(folder: Path) -> tuple[dict[str, object], list[dict[str, object]]]:
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(0, 8, (40, 10), generator=generator).tolist()
    rows = [
        {"question": "".join(ALPHABET[i] for i in row[:6]), "choices": [ALPHABET[row[6]] + ALPHABET[row[7]],
         ALPHABET[row[8]] + ALPHABET[row[9]]], "label": row[0] % 2} for row in draw
    ]  # fmt: skip
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    task = {
        "task": "letters", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "label", "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    return task, rows


def accuracy(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, object]]) -> float:
    hits = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:  # type: ignore[attr-defined]
            ids = torch.tensor([tokenizer.encode(f"{row['question']}{choice}")])
            logs = model(ids).logits[0].log_softmax(-1)
            scores.append(sum(logs[t - 1, ids[0, t]].item() for t in range(ids.shape[1] - 2, ids.shape[1])))
        hits += int(scores.index(max(scores)) == row["label"])
    return hits / len(rows)


@needs_lm_eval
@pytest.mark.filterwarnings("default")  # lm-eval's own imports warn
def test_accuracy_with_quantizers_on_and_off(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task, rows = write_task(tmp_path)
    off = accuracy(model, tokenizer, rows)
    convert_(model, named("w4_tensor"), verbose=False)
    on = accuracy(model, tokenizer, rows)
    found = fewshot(model, tokenizer, [task], shots=0, seeds=(1, 2))
    assert found["letters"].per_seed == (on, on) and found["letters"].deviation == 0.0
    with high_precision(model):
        assert fewshot(model, tokenizer, [task], shots=0, seeds=(1,))["letters"].mean == off


@needs_lm_eval
@pytest.mark.filterwarnings("default")
def test_an_unknown_task_is_named(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="no task 'hellaswagg'"):
        fewshot(model, tokenizer, ["hellaswagg"])


def test_without_lm_eval_the_message_says_what_to_install(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(RunError, match=r"pip install lowbits\[eval\]"):
        fewshot(model, tokenizer)
