# SPDX-License-Identifier: Apache-2.0
"""convert_ changes layers and nothing else (U9), and says what it did."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lowbits.errors import ConversionError, ShapeError
from lowbits.formats import INT8
from lowbits.nn import Gemm, QuantizedConv1D, QuantizedLinear, Recipe, convert_, high_precision, quantized_layers
from lowbits.quantizers import QuantSpec
from lowbits.recipes import NAMED, named


def gpt2() -> GPT2LMHeadModel:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=8, **ends))


def llama() -> LlamaForCausalLM:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 40}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


@pytest.mark.parametrize("name", sorted(NAMED))
def test_u9_ties_counts_keys_and_parameters_survive_every_recipe(name):
    model = gpt2()
    keys, count = list(model.state_dict()), sum(p.numel() for p in model.parameters())
    before = {id(p) for p in model.parameters()}
    convert_(model, NAMED[name], verbose=False)
    assert list(model.state_dict()) == keys
    assert sum(p.numel() for p in model.parameters()) == count
    assert {id(p) for p in model.parameters()} == before
    assert model.lm_head.weight is model.transformer.wte.weight


def test_gpt2_and_llama_layers_become_quantized_ones():
    conversion = convert_(gpt2(), named("w8a8"), verbose=False)
    assert len(conversion.converted) == 8
    model = llama()
    convert_(model, named("w8a8"), verbose=False)
    layers = quantized_layers(model)
    assert len(layers) == 7 and all(isinstance(m, QuantizedLinear) for m in layers.values())
    assert all(isinstance(m, QuantizedConv1D) for m in quantized_layers(_converted(gpt2())).values())


def _converted(model: nn.Module) -> nn.Module:
    convert_(model, named("w8a8"), verbose=False)
    return model


def test_the_report_names_everything_and_the_share_of_flops(capsys):
    model = llama()
    conversion = convert_(model, named("w8a8"))
    weights = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert conversion.flops_share == (sum(weights.values()) - weights["lm_head"]) / sum(weights.values())
    assert list(conversion.left) == ["lm_head"]
    printed = capsys.readouterr().out
    assert "converted 7 linear layers" in printed and "left lm_head: the output head" in printed


def test_choose_decides_layer_by_layer_and_sees_the_head():
    model = gpt2()
    choice = {"lm_head": named("w8a8"), "transformer.h.1.mlp.c_fc": named("w4_tensor")}
    conversion = convert_(model, lambda name, module: choice.get(name), verbose=False)
    assert set(conversion.converted) == set(choice)
    assert "`choose` returned None" in conversion.left["transformer.h.0.attn.c_attn"]
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.transformer.h[1].mlp.c_fc.recipe == named("w4_tensor")


def test_converting_again_changes_the_recipe():
    model = _converted(gpt2())
    convert_(model, named("w4_tensor"), verbose=False)
    assert {layer.recipe for layer in quantized_layers(model).values()} == {named("w4_tensor")}


def test_high_precision_is_restored_after_an_error():
    model = _converted(gpt2())
    with pytest.raises(RuntimeError), high_precision(model):
        assert all(layer.recipe.plain for layer in quantized_layers(model).values())
        raise RuntimeError
    assert not any(layer.recipe.plain for layer in quantized_layers(model).values())


def test_subclasses_with_their_own_forward_are_left_alone():
    class Mine(nn.Linear):
        def forward(self, input):
            return super().forward(input) + 1

    model = nn.Sequential(Mine(4, 4), nn.Linear(4, 4))
    conversion = convert_(model, named("w8a8"), verbose=False)
    assert list(conversion.converted) == ["1"] and "forward of its own" in conversion.left["0"]


def test_parts_that_do_not_divide_name_the_layer_and_convert_nothing():
    model = gpt2()
    recipe = Recipe(dgrad=Gemm(QuantSpec(INT8), None), grad_parts=7)
    with pytest.raises(ShapeError, match=r"transformer\.h\.0\.attn\.c_attn: grad_parts=7 does not divide"):
        convert_(model, recipe, verbose=False)
    assert not quantized_layers(model)


def test_converting_nothing_is_an_error():
    with pytest.raises(ConversionError, match="none of its 0 linear layers"):
        convert_(nn.Sequential(nn.ReLU()), named("w8a8"))
    with pytest.raises(ConversionError, match="`choose` has to return"):
        convert_(gpt2(), lambda name, module: None)


def test_state_dicts_move_between_plain_and_converted_models():
    plain, ours = gpt2().eval(), _converted(gpt2()).eval()
    ours.load_state_dict(plain.state_dict())
    ids = torch.arange(8)[None]
    with high_precision(ours), torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, plain(ids).logits)
