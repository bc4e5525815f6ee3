# SPDX-License-Identifier: Apache-2.0
"""The stable embedding: what it computes, how it starts, and models that get one."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lowbits.errors import ConversionError
from lowbits.nn import StableEmbedding, stable_embedding_
from lowbits.optim import AdamW8bit, embeddings_in_32_bits, param_groups

SMALL = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 0}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=2, n_positions=16, **SMALL))


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=False,
            **SMALL,
        )
    )  # fmt: skip


TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_a_layer_norm_in_float32_of_what_is_looked_up(dtype):
    layer = StableEmbedding(50, 24, dtype=dtype)
    with torch.no_grad():
        layer.norm.weight.copy_(torch.linspace(0.5, 2, 24))
        layer.norm.bias.copy_(torch.linspace(-1, 1, 24))
    x = layer.weight.double()[TOKENS]
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = x * layer.norm.weight.double() + layer.norm.bias.double()
    out = layer(TOKENS)
    assert out.dtype == dtype and out.shape == (1, 6, 24)
    # one rounding to the dtype of values up to about 4 * 2 + 1, on top of float32's
    torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_it_starts_xavier_uniform_with_a_zero_row_for_padding():
    torch.manual_seed(0)
    layer = StableEmbedding(1000, 200, padding_idx=7)
    bound = math.sqrt(6 / 1200)
    rows = torch.cat((layer.weight[:7], layer.weight[8:]))
    assert not layer.weight[7].any() and rows.any(1).all()
    assert 0.999 * bound < rows.abs().max() <= bound
    assert rows.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    layer(torch.tensor([7, 8])).square().sum().backward()
    assert not layer.weight.grad[7].any() and set(layer.state_dict()) == {"weight", "norm.weight", "norm.bias"}


def test_a_tied_model_stays_tied_and_positions_are_left_alone():
    model = gpt2()
    weight, positions = model.transformer.wte.weight, model.transformer.wpe.weight.detach().clone()
    keys = set(model.state_dict())
    assert stable_embedding_(model) == ["transformer.wte"]
    assert model.transformer.wte.weight is weight is model.lm_head.weight
    assert type(model.transformer.wpe) is nn.Embedding and torch.equal(model.transformer.wpe.weight, positions)
    assert weight.abs().max() <= math.sqrt(6 / (96 + 64))
    assert set(model.state_dict()) - keys == {"transformer.wte.norm.weight", "transformer.wte.norm.bias"}
    seen = []
    model.transformer.drop.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(TOKENS)
    before_positions = seen[0] - model.transformer.wpe(torch.arange(6))
    torch.testing.assert_close(before_positions, model.transformer.wte(TOKENS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_it_trains_with_moments_of_its_own_in_32_bits(make):
    model = make()
    (name,) = stable_embedding_(model)
    embedding = model.get_submodule(name)
    optimizer = AdamW8bit(param_groups(model, 0.1, embeddings_in_32_bits), min_8bit_size=0)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert (
        "first.value" in optimizer.state[embedding.weight] and "first.codes" in optimizer.state[embedding.norm.weight]
    )


def test_state_dicts_go_round(tmp_path):
    model = gpt2()
    plain = copy.deepcopy(model.state_dict())
    stable_embedding_(model)
    missing, unexpected = model.load_state_dict(plain, strict=False)
    assert set(missing) == {"transformer.wte.norm.weight", "transformer.wte.norm.bias"} and not unexpected
    with torch.no_grad():
        model.transformer.wte.norm.weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    other = gpt2()
    stable_embedding_(other)
    missing, unexpected = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected  # tied, hence written once
    model.eval()
    other.eval()
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.transformer.wte.weight and torch.equal(twin(TOKENS).logits, model(TOKENS).logits)


def test_pretrained_models_are_refused_and_not_changed(tmp_path):
    gpt2().save_pretrained(tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConversionError, match=r"was loaded from .* fine-tuning poor.*embeddings_in_32_bits"):
        stable_embedding_(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


class Two(nn.Module):
    """Which embedding is the tokens' cannot be known."""

    def __init__(self, **more):
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4, **more), nn.Embedding(5, 4)


def test_what_is_meant_must_be_clear():
    assert stable_embedding_(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))) == ["0"]
    model = Two()
    with pytest.raises(ConversionError, match="words, places of Two none or several could be meant. Pass choose="):
        stable_embedding_(model)
    assert stable_embedding_(model, lambda name, _: name == "words") == ["words"]
    assert type(model.words) is StableEmbedding and type(model.places) is nn.Embedding
    for wrong, message in (
        (model, "'words': 'StableEmbedding'.* has a forward of its own"),
        (nn.Linear(2, 2), r"\(none\) of Linear"),
        (Two(max_norm=1.0), "words has max_norm=1.0"),
    ):
        with pytest.raises(ConversionError, match=message):
            stable_embedding_(wrong, lambda name, _: name == "words")
