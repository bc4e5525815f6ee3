# SPDX-License-Identifier: Apache-2.0
"""DiffQ in the library's form against its formulas, and the matched one against GaussWS."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lowbits.errors import ShapeError, SpecError
from lowbits.methods import Position, named
from lowbits.methods.diffq import DiffQ, Form, LibraryNoise, model_size
from lowbits.methods.gaussws import GaussWS, PseudoNoise, noisy
from lowbits.nn import Recipe, convert_, quantized_layers

AT = Position(step=2, steps=10, draw=5)


def network(method: DiffQ | GaussWS) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 40), nn.Linear(40, 4))
    convert_(model, Recipe(), verbose=False)
    method.prepare_(model, 3)
    method.before_forward_(model, AT)
    return model


def noise_of(model: nn.Module, index: int = 0) -> LibraryNoise:
    noise = list(quantized_layers(model).values())[index].weight_fn
    assert isinstance(noise, LibraryNoise)
    return noise


@pytest.mark.parametrize("kind", [PseudoNoise.NORMAL, PseudoNoise.UNIFORM])
def test_the_noise_is_the_librarys(kind: PseudoNoise) -> None:
    """Zero mean; its standard deviation (max - min) / (2^b - 1) times 1/2 or 1/sqrt(12), group by group."""
    noise = LibraryNoise(torch.empty(512, 512), kind, 1 << 17, (2.0, 15.0, 8.0), seed=0, name="a")
    with torch.no_grad():
        noise.logit.copy_(torch.tensor([-1.0, 1.0]))
    w = torch.randn(512, 512)
    r = (noise(w) - w).view(2, -1)
    bits = 2 + 13 * torch.sigmoid(noise.logit)
    step = (w.max() - w.min()) / (2**bits - 1)
    deviation = 0.5 if kind is PseudoNoise.NORMAL else 12**-0.5
    n = r.shape[1]
    assert bool((r.mean(1).abs() < 4 * step * deviation / n**0.5).all())
    # The variance's own error is sqrt(2 / n) for a normal; W + noise is rounded to float32, hence b is small enough.
    assert torch.allclose(r.std(1), step * deviation, rtol=4 * (1 / (2 * n)) ** 0.5 + 1e-3)
    if kind is PseudoNoise.UNIFORM:
        assert bool((r.abs().amax(1) <= step * 0.5001 + 1e-6).all())


def test_gradients_of_bits_and_of_the_range() -> None:
    """Autograd through the published formula, range included."""
    model = network(DiffQ(smallest=0.0))
    noise, w = noise_of(model), model[0].weight  # type: ignore[index]
    g = torch.randn_like(w)
    (noise(w) * g).sum().backward()
    flat = w.detach().double().view(-1, 8)
    unit = 1 / (2 ** noise.bits().detach().double() - 1)
    r = (noise(w).detach().double().view(-1, 8) - flat) / ((flat.max() - flat.min()) * unit[:, None])
    share = torch.sigmoid(noise.logit.detach().double())
    slope = 13 * share * (1 - share) * -math.log(2) * 2 ** noise.bits().detach().double() * unit**2
    expected = (g.double().view(-1, 8) * r).sum(1) * (flat.max() - flat.min()) * slope
    assert torch.allclose(noise.logit.grad.double(), expected, rtol=1e-3, atol=1e-8)  # type: ignore[union-attr]
    extra = (w.grad - g).view(-1)  # type: ignore[operator]
    (at,) = (extra.abs() > 1e-6).nonzero(as_tuple=True)
    assert set(at.tolist()) == {int(w.argmax()), int(w.argmin())}


def test_evaluation_is_on_the_grid() -> None:
    model = network(DiffQ(smallest=0.0)).eval()
    noise, w = noise_of(model), model[0].weight.detach()  # type: ignore[index, union-attr]
    found = model[0].weight_fn(w)  # type: ignore[index, operator]
    levels = (found - w.min()) / (w.max() - w.min()) * 255
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    assert float((found - w).abs().max()) <= float(w.max() - w.min()) / 255 / 2 * 1.001
    with torch.no_grad():
        noise.logit.fill_(-9.0)  # two bits
    assert noise.quantized(w).unique().numel() == 4
    assert torch.equal(noise.quantized(torch.ones(64, 96)), torch.ones(64, 96))


def test_the_size_is_counted_bit_by_bit() -> None:
    model = network(DiffQ(smallest=0.01, group=8))
    weights = 64 * 96 + 96 * 40  # the third is too small
    bits = weights * 8 + (weights // 8) * 4 + 2 * 72
    assert model_size(model).item() == pytest.approx(bits / 2**23, rel=1e-6)
    assert noise_of(model).true_size() + noise_of(model, 1).true_size() == pytest.approx(bits / 2**23, rel=1e-6)
    assert quantized_layers(model)["2"].weight_fn is None
    model_size(model).backward()
    assert bool((noise_of(model).logit.grad > 0).all())  # type: ignore[operator]  # the penalty takes bits away


def test_its_bits_have_no_decay_and_a_learning_rate_of_their_own() -> None:
    model = network(DiffQ())
    (own,) = [g for g in DiffQ().param_groups(model, 0.1) if g["params"][0] is noise_of(model).logit]
    assert (own["lr"], own["weight_decay"], len(own["params"])) == (1e-3, 0.0, 2)


def test_matched_differs_from_gaussws_by_the_noise_alone() -> None:
    matched = named("diffq,form=matched,noise=uniform,b_init=6,b_min=4,penalty=0.1,bit_lr=none")
    same = named("gaussws,noise=uniform")
    assert isinstance(matched, DiffQ) and isinstance(same, GaussWS) and matched.plan == same.plan
    one, other = network(matched), network(same)
    assert [g["weight_decay"] for g in matched.param_groups(one, 0.1)] == [
        g["weight_decay"] for g in same.param_groups(other, 0.1)
    ]
    x = torch.randn(8, 64)
    outputs: list[Tensor] = [model(x) for model in (one, other)]
    assert torch.equal(*outputs) and noisy(one)[0].plan.noise is PseudoNoise.UNIFORM
    assert not torch.equal(network(GaussWS())(x), outputs[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("noise=none", "DiffQ's noise is normal or uniform"),
        ("b_init=20", "1 <= b_min < b_init < b_max <= 15 is needed, got 2.0, 20.0, 15.0"),
        ("b_min=nan", "1 <= b_min < b_init"),
        ("penalty=nan", "at least 0 and finite"),
        ("form=matched,b_min=1", "b_init and b_target are between 2 and 25"),
        ("group=0", "group is at least 1"),
    ],
)
def test_bad_numbers(words: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        named(f"diffq,{words}")


def test_what_does_not_fit_a_model() -> None:
    with pytest.raises(ShapeError, match="0: groups of 7 do not divide its 6144 weights"):
        network(DiffQ(group=7))
    with pytest.raises(SpecError, match="no weight has 1.0 MB"):
        network(DiffQ(smallest=1.0))


def test_the_form_is_an_option() -> None:
    assert named("diffq,form=matched") == DiffQ(form=Form.MATCHED)


def test_compiled_the_noise_is_the_same() -> None:
    noise, w = noise_of(network(DiffQ(smallest=0.0))), torch.randn(96, 64)
    compiled = torch.compile(noise, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(w), noise(w)) and not torch.equal(noise(w), w)
