# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowbits import models
from lowbits.errors import UnknownNameError

# Millions of parameters with the published vocabularies and 1024 positions. GPT-2: the numbers of the released
# checkpoints (the paper's own 117, 345, 762, 1542 were miscounted); Llama: llama2.c's table, Touvron et al. 2023.
PUBLISHED = {
    "gpt2-small": 124.4,
    "gpt2-medium": 354.8,
    "gpt2-large": 774.0,
    "gpt2-xl": 1557.6,
    "llama-15m": 15.2,
    "llama-42m": 41.7,
    "llama-110m": 109.5,
    "llama-134m": 134.1,
    "llama-3b": 3426.5,
    "llama-7b": 6738.4,
}


@pytest.mark.parametrize("name", models.SIZES)
def test_sizes_have_their_published_parameters(name: str) -> None:
    vocabulary = 50257 if models.SIZES[name].family == "gpt2" else 32000
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(models.config(name, vocabulary, 1024))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows % 8 == 0 and 0 <= rows - vocabulary < 8
    if name in PUBLISHED:
        assert millions == pytest.approx(PUBLISHED[name], abs=0.06)
    else:
        assert millions > 0


def test_the_seed_decides_the_weights_and_torch_keeps_its_own_stream() -> None:
    before = torch.get_rng_state()
    first, again, other = (models.build("gpt2-pico", 64, 16, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    a, b, c = (model.transformer.h[0].attn.c_attn.weight for model in (first, again, other))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert first.training and first.config._attn_implementation == "sdpa"


def test_dropout_is_off_unless_asked_for() -> None:
    for name in ("gpt2-pico", "llama-15m"):
        for probability in (0.0, 0.25):
            settings = models.build(name, 64, 16, seed=0, dropout=probability).config
            found = {value for key, value in settings.to_dict().items() if key.endswith(("pdrop", "attention_dropout"))}
            assert found == {probability}


def test_a_folder_brings_its_weights(tmp_path: Path) -> None:
    saved = models.build("llama-15m", 64, 16, seed=3)
    saved.save_pretrained(tmp_path)
    loaded = models.build(str(tmp_path), 64, 8, seed=0)
    pairs = zip(saved.state_dict().items(), loaded.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert loaded.training and loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_an_unknown_name_is_no_folder_either() -> None:
    with pytest.raises(UnknownNameError, match="llama-135m.*did you mean .*'llama-134m'"):
        models.build("llama-135m", 64, 16, seed=0)
