# SPDX-License-Identifier: Apache-2.0
"""Layers that see their weights quantized: names, ties, gradients, kinds of layer, and other parts of the library."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lowbits import recipes
from lowbits.errors import ConversionError, RunError
from lowbits.export import load_coded, save_coded
from lowbits.methods._weight_views import matrices
from lowbits.methods.distillation import (
    Levels,
    Mixing,
    Teacher,
    coded_model,
    distillation_loss,
    encode,
    master_weights,
    quantize_weights_,
    remove_views_,
    round_to_levels,
    set_draw_,
    settle_,
    viewed,
)
from lowbits.nn import QuantizedLinear, convert_
from lowbits.optim import AdamW8bit, param_groups
from lowbits.quantizers import PerGroup, PerRow, Rounding

STOCHASTIC = Levels(4, rounding=Rounding.STOCHASTIC)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def gpt2(tied: bool = True) -> GPT2LMHeadModel:
    config = GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=16, tie_word_embeddings=tied,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def test_layers_compute_with_the_rounded_weight() -> None:
    model, x = net(), torch.randn(3, 1, 8, 8)
    plain = copy.deepcopy(model)
    assert quantize_weights_(model, Levels(4)) == ["0.weight", "4.weight"]
    with torch.no_grad():
        for place in matrices(plain):
            place.parameter.copy_(round_to_levels(place.parameter, Levels(4)))
    assert torch.equal(model(x), plain(x))
    model.zero_grad()
    model(x).square().sum().backward()
    plain.zero_grad()
    plain(x).square().sum().backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)  # the gradient at Q(w) reaches w


def test_names_parameters_and_a_step_of_no_length() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    quantize_weights_(model, STOCHASTIC)
    assert [n for n, _ in model.named_parameters()] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "4.weight",
        "4.bias",
    ]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=0.1)
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    after = model.state_dict()
    assert list(after) == list(before)
    masters = ["0.weight", "0.bias", "4.weight", "4.bias"]
    assert all(torch.equal(after[name], before[name]) for name in masters)


def test_master_weights_settling_and_removing() -> None:
    model, x = net().eval(), torch.randn(2, 1, 8, 8)
    plain = model(x)
    quantize_weights_(model, Levels(4))
    quantized = model(x)
    with master_weights(model):
        assert torch.equal(model(x), plain)
    assert torch.equal(model(x), quantized) and not torch.equal(quantized, plain)
    settled = copy.deepcopy(model)
    assert settle_(settled) == ["0.weight", "4.weight"] and viewed(settled) == []
    assert torch.equal(settled(x), quantized) and type(settled[0]) is nn.Conv2d
    remove_views_(model)
    assert torch.equal(model(x), plain) and list(dict(model.named_modules())) == list(dict(net().named_modules()))


def test_stochastic_rounding_is_a_function_of_seed_and_draw_alone() -> None:
    model, x = net(), torch.randn(2, 1, 8, 8)
    other = copy.deepcopy(model)
    quantize_weights_(model, STOCHASTIC, seed=3)
    quantize_weights_(other, STOCHASTIC, seed=3)
    set_draw_(model, 5)
    first = model[4].weight.clone()
    torch.manual_seed(123)
    assert torch.equal(model[4].weight, first)
    set_draw_(model, 6)
    assert not torch.equal(model[4].weight, first)
    set_draw_(other, 5)
    assert torch.equal(other[4].weight, first)
    assert not torch.equal(model[0].weight.reshape(-1)[:9] - model[0].weight.min(), first.reshape(-1)[:9] - first.min())
    model.eval()  # evaluation is on the nearest levels: on what is stored
    assert torch.equal(model[4].weight, encode(model[4]._parameters["weight"], Levels(4)).dequantize())
    assert torch.equal(coded_model(model).coded["4.weight"].dequantize(), model[4].weight)
    assert model(x).isfinite().all()


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_stays_tied_loads_and_groups_as_before(tied: bool) -> None:
    model = gpt2(tied)
    before, parameters = model.state_dict(), [id(p) for p in model.parameters()]
    names = quantize_weights_(model, Levels(16, PerGroup(8)))
    assert ("lm_head.weight" in names) is (not tied) and "transformer.wte.weight" in names
    assert [id(p) for p in model.parameters()] == parameters and list(model.state_dict()) == list(before)
    if tied:
        assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    conv = model.transformer.h[0].mlp.c_fc  # [in, out]: a row is a column
    assert torch.equal(conv.weight, round_to_levels(conv._parameters["weight"].t(), Levels(16, PerGroup(8))).t())
    fresh = gpt2(tied)
    fresh.load_state_dict(model.state_dict())
    ids = torch.randint(0, 32, (2, 8))
    with master_weights(model):
        assert torch.equal(model(ids).logits, fresh(ids).logits)
    coded = coded_model(model)
    assert coded.ties == ({"lm_head.weight": "transformer.wte.weight"} if tied else {})
    fresh.load_state_dict(coded.state_dict())
    assert torch.equal(model(ids).logits, fresh(ids).logits)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: type[nn.RNNBase]) -> None:
    layer, x = kind(5, 7, num_layers=2, batch_first=True), torch.randn(2, 3, 5)
    plain = copy.deepcopy(layer)
    names = quantize_weights_(layer, Levels(4))
    assert names == ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"]
    layer(x)[0].sum().backward()
    with torch.no_grad():
        for name in names:
            p = plain._parameters[name]
            p.copy_(round_to_levels(p, Levels(4)))
    plain(x)[0].sum().backward()
    assert torch.equal(layer(x)[0], plain(x)[0])
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(layer.parameters(), plain.parameters(), strict=True))


def test_attention_and_embeddings() -> None:
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 3, 8)
    assert quantize_weights_(layer, Levels(4)) == ["in_proj_weight", "out_proj.weight"]
    layer(x, x, x)[0].sum().backward()
    assert layer._parameters["in_proj_weight"].grad is not None
    table = nn.Embedding(10, 6)
    quantize_weights_(table, Levels(4, PerRow()))
    table(torch.tensor([1, 2])).sum().backward()
    assert table._parameters["weight"].grad[1].tolist() == [1.0] * 6


def test_composes_with_recipes_and_eight_bit_optimizers() -> None:
    model = gpt2()
    convert_(model, recipes.named("w8a8"), verbose=False)
    layer = model.transformer.h[0].mlp.c_fc
    quantize_weights_(model, Levels(16))
    assert layer.recipe == recipes.named("w8a8")
    optimizer = AdamW8bit(param_groups(model, 0.1), lr=1e-2, min_8bit_size=64)
    ids = torch.randint(0, 32, (4, 16))
    losses = []
    for step in range(60):
        set_draw_(model, step)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert any(t.dtype == torch.uint8 for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))


@pytest.mark.parametrize("recipe", ["nvfp4", "w4a4", "fp8_rowwise"])
def test_a_teacher_in_high_precision_draws_its_few_bits_nearer(recipe: str) -> None:
    """Distillation of any recipe, with quantized weights below it or not."""
    model, ids = gpt2(), torch.randint(0, 32, (8, 16))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    teacher = Teacher(copy.deepcopy(model))
    convert_(model, recipes.named(recipe), verbose=False)
    quantize_weights_(model, Levels(16, PerGroup(8)))
    optimizer = AdamW8bit(param_groups(model, 0.0), lr=2e-3, min_8bit_size=64)
    losses = []
    for step in range(25):
        set_draw_(model, step)
        loss = distillation_loss(model(ids).logits[:, :-1], teacher(ids)[:, :-1], ids[:, 1:], Mixing(1.0, 1.0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]


@pytest.mark.parametrize("recipe", [name for name in recipes.NAMED if not name.endswith("_native")])  # a GPU's
def test_every_recipe_computes_with_the_rounded_weight(recipe: str) -> None:
    """The layer of a recipe quantizes Q(w), and its gradient reaches the master copy; a teacher in bf16."""
    torch.manual_seed(0)
    model, ids = gpt2(), torch.randint(0, 32, (4, 16))
    teacher = Teacher(copy.deepcopy(model).bfloat16())
    convert_(model, recipes.named(recipe), verbose=False)
    rounded = copy.deepcopy(model)
    quantize_weights_(model, Levels(4, PerGroup(8)))
    with torch.no_grad():
        for place, view in viewed(model):
            rounded.get_parameter(place.name).copy_(view(place.parameter))
    pairs = []
    for network in (model, rounded):
        loss = distillation_loss(network(ids).logits[:, :-1], teacher(ids)[:, :-1], ids[:, 1:], Mixing())
        loss.backward()
        pairs.append((loss.item(), [p.grad for p in network.parameters()]))
    (loss, gradients), (expected, wanted) = pairs
    assert loss == pytest.approx(expected, rel=1e-6)  # another order of memory may be another order of sums
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(gradients, wanted, strict=True))


def test_moment_codecs_of_a_recipe_reach_the_master_weight() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    convert_(model, lambda *_: recipes.named("adam8bit"), verbose=False)
    quantize_weights_(model, Levels(16))
    assert isinstance(model[0], QuantizedLinear)
    groups = param_groups(model, 0.1)
    assert ["first" in group for group in groups if group["params"][0].ndim == 2] == [True]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit and Function, from inside torch.compile
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_deep_copies_export_and_compile(backend: str) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(5, 8)
    quantize_weights_(model, STOCHASTIC)
    set_draw_(model, 3)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    compiled = torch.compile(model, backend=backend)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    set_draw_(model, 4)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)  # the counter is no constant of the graph
    exported = torch.export.export(model.eval(), (x,)).module()
    assert torch.allclose(exported(x), model(x), atol=1e-6)


def test_evaluation_is_that_of_the_file(tmp_path) -> None:
    model, x = net(), torch.randn(20, 1, 8, 8)
    quantize_weights_(model, STOCHASTIC)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(5):
        set_draw_(model, step)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    save_coded(tmp_path / "model.safetensors", coded_model(model))
    plain = net()
    plain.load_state_dict(load_coded(tmp_path / "model.safetensors").state_dict())
    assert torch.equal(plain.eval()(x), model.eval()(x))


def test_bad_input_is_named() -> None:
    with pytest.raises(ConversionError, match="none of its 2 weights was chosen"):
        quantize_weights_(net(), lambda *_: None)
    with pytest.raises(ConversionError, match="no weight is quantized"):
        coded_model(net())
    model = net()
    quantize_weights_(model, Levels(4))
    model[0].weight_view.forward = lambda w: w.no_such_attribute
    with pytest.raises(RunError, match=r"ViewedConv2d\.weight: its view failed"):
        _ = model[0].weight
