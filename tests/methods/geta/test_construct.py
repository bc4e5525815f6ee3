# SPDX-License-Identifier: Apache-2.0
"""A network whose units are cut computes what it computes with them set to zero."""

from __future__ import annotations

import copy

import pytest
import torch

from lowbits.errors import ConversionError, SpecError
from lowbits.methods import geta
from tests.methods.geta.zoo import ZOO, example, outputs, random_keep


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 12), marks=pytest.mark.slow)], ids=["2", "10"])
@pytest.mark.parametrize("name", ZOO)
def test_cut_networks_equal_masked_ones(name: str, seeds: range) -> None:
    """A4: random choices of units, batch and length other than the traced ones."""
    model, graph, inputs = example(name)
    for seed in seeds:
        keep = random_keep(graph, seed)
        small = geta.construct(graph, model, keep)
        masked = copy.deepcopy(model)
        graph.zero_(masked, keep)
        want, got = outputs(masked, inputs(seed)), outputs(small, inputs(seed))
        assert (want - got).abs().max() <= 1e-5 * max(1.0, float(want.abs().max()))
        before = sum(p.numel() for p in model.parameters())
        assert sum(p.numel() for p in small.parameters()) < before
        assert not torch.allclose(want, outputs(model, inputs(seed)))  # something was cut that mattered


@pytest.mark.parametrize("name", ZOO)
def test_with_quantizers_as_well(name: str) -> None:
    model, graph, inputs = example(name)
    model = copy.deepcopy(model)
    geta.quantize_(model, bits=5)
    keep = random_keep(graph, 3)
    graph.zero_(model, keep)
    small = geta.construct(graph, model, keep)
    want, got = outputs(model, inputs(3)), outputs(small, inputs(3))
    assert (want - got).abs().max() <= 1e-5 * max(1.0, float(want.abs().max()))
    assert set(small.bits.values()) == {5} and len(small.bits) == len(geta.quantized_layers(model))


@pytest.mark.parametrize("name", ["vgg", "llama"])
def test_a_network_of_halves(name: str) -> None:
    """Masked and cut networks in bfloat16 differ by roundings alone; weights come out in bfloat16."""
    model = copy.deepcopy(example(name).model).bfloat16()
    first = {key: v.bfloat16() if v.is_floating_point() else v for key, v in example(name).inputs(0).items()}
    graph = geta.trace(model, (), {key: v[:2] for key, v in first.items()})
    geta.quantize_(model, bits=6)
    keep = random_keep(graph, 3)
    small = geta.construct(graph, model, keep)
    graph.zero_(model, keep)
    want, got = outputs(model, first), outputs(small, first)
    assert got.dtype == torch.bfloat16 and (want - got).abs().max() <= 0.02 * want.abs().max()


@pytest.mark.parametrize("name", ["mixed", "llama", "bert"])
def test_input_quantizers_come_along(name: str) -> None:
    model, graph, inputs = example(name)
    model = copy.deepcopy(model)
    geta.quantize_(model, activations=True, bits=8)
    geta.calibrate_(model, [inputs(seed) for seed in range(3)], bits=8)
    keep = random_keep(graph, 3)
    graph.zero_(model, keep)
    small = geta.construct(graph, model, keep)
    want, got = outputs(model, inputs(3)), outputs(small, inputs(3))
    # Rounding may tip over where sums are taken in another order: one step of 8 bits, seldom.
    assert (want - got).abs().max() <= 2e-2 * want.abs().max()
    assert (want - got).abs().median() <= 1e-4 * want.abs().max()
    assert sum(key.endswith(".input") for key in small.bits) == len(geta.quantized_layers(model))


@pytest.mark.parametrize("name", ZOO)
def test_every_member_is_needed(name: str) -> None:
    """A6: a graph that forgets one member of a unit gives wrong numbers or wrong shapes."""
    model, graph, _ = example(name)
    checked = 0
    for dimension in graph.dimensions[:2]:
        keep = torch.cat([torch.arange(d.size) > 0 if d is dimension else torch.ones(d.size).bool()
                          for d in graph.dimensions])  # fmt: skip
        for member in dimension.members:
            if member.name.endswith("inv_freq") or not member.zeroed:
                continue
            slices = graph.kept_slices(keep)
            assert not slices[member.name][member.axis].all()
            slices[member.name][member.axis] = torch.ones_like(slices[member.name][member.axis])
            with pytest.raises((RuntimeError, ConversionError)):
                geta.construct(_Forgetful(graph, slices), model, keep)
            checked += 1
    assert checked


class _Forgetful(geta.Graph):
    """A graph that returns given slices."""

    def __init__(self, graph: geta.Graph, slices: dict[str, list[torch.Tensor]]) -> None:
        self.__dict__.update(vars(graph), slices=slices)

    def kept_slices(self, keep: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        return self.__dict__["slices"]


def test_wrong_choices_are_named() -> None:
    model, graph, _ = example("vgg")
    with pytest.raises(SpecError, match=rf"bool \[{graph.units}\]"):
        geta.construct(graph, model, torch.ones(3).bool())
    with pytest.raises(ConversionError, match="none of its 8 units is left"):
        geta.construct(graph, model, torch.arange(graph.units) >= 8)
    quantized = copy.deepcopy(model)
    layers = geta.quantize_(quantized)
    next(iter(layers.values())).weight_quantizer.set_bits_(5.5)
    with pytest.raises(SpecError, match=r"5\.500 bits"):
        geta.construct(graph, quantized, torch.ones(graph.units).bool())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8, 9, 16])
def test_packed_weights_give_back_their_integers(bits: int) -> None:
    most = 2 ** (bits - 1) - 1
    codes = torch.randint(-most, most + 1, (7, 5), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    packed = geta.PackedWeight(codes, torch.tensor(0.25), bits)
    assert torch.equal(packed.integers().int(), codes) and torch.equal(packed(), codes * 0.25)
    container = next(c for c in (2, 4, 8, 16) if c >= bits)
    assert packed.codes.nbytes == -(-35 * container // 8)
    with pytest.raises(SpecError, match=f"do not fit {bits} bits"):
        geta.PackedWeight(codes + 2 * most, torch.tensor(0.25), bits)
