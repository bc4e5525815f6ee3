# SPDX-License-Identifier: Apache-2.0
"""What belongs together, what cannot be cut and why; random networks; operators that nobody knows."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lowbits.errors import ConversionError, UnknownNameError
from lowbits.methods import geta
from lowbits.methods.geta import _axes as axes
from tests.methods.geta.zoo import built, example, outputs, random_keep

# --- axes ---


def test_axes_follow_each_other_through_refinement() -> None:
    whole, heads, size = axes.Axis(24), axes.Axis(4), axes.Axis(6)
    axes.unify(whole, axes.product([heads, size]), "view")
    left, right = axes.split(whole, 12)
    axes.unify(left, right, "rotate")  # the two halves of the heads are one
    assert [leaf.size for leaf in axes.leaves(whole)] == [2, 6]
    masks = {axes.leaves(whole)[0]: torch.tensor([True, False]), axes.leaves(whole)[1]: torch.arange(6) != 3}
    want = [h % 2 == 0 and d != 3 for h in range(4) for d in range(6)]
    assert axes.kept(whole, masks).tolist() == want
    assert axes.index_of(whole, axes.leaves(whole)[1]).tolist() == list(range(6)) * 4


def test_products_meet_at_common_factors_and_halves() -> None:
    a, b = [axes.Axis(n) for n in (4, 6)], [axes.Axis(n) for n in (8, 3)]
    axes.unify(axes.product(a), axes.product(b), "view")
    assert [[leaf.size for leaf in axes.leaves(x)] for x in (*a, *b)] == [[4], [2, 3], [4, 2], [3]]
    pair = axes.product([axes.Axis(2), axes.Axis(5)])
    halves = axes.concatenation([axes.Axis(5), axes.Axis(5)])
    axes.unify(pair, halves, "rotate")
    assert [leaf.size for leaf in axes.leaves(pair)] == [5]


def test_what_does_not_fit_is_fixed_with_the_reason() -> None:
    a, b = axes.product([axes.Axis(4), axes.Axis(3)]), axes.concatenation([axes.Axis(5), axes.Axis(7)])
    axes.unify(a, b, "somewhere")
    assert all("somewhere" in (leaf.fixed or "") for x in (a, b) for leaf in axes.leaves(x))
    known = axes.Axis(6)
    axes.fix(known, "first")
    axes.fix(known, "second")
    other = axes.product([axes.Axis(2), axes.Axis(3)])
    axes.unify(known, other, "view")
    assert [leaf.fixed for leaf in axes.leaves(other)] == ["first", "first"]


# --- architectures ---


@pytest.mark.parametrize("name, sizes", [
    ("llama", [3, 2, 4, 8, 40, 3, 2, 8, 40]),  # kv heads, queries a head, rotary pairs of all layers, v, feed-forward
    ("gpt2", [3, 8, 8, 96] * 2),  # heads, q and k, v, feed-forward
    ("bert", [3, 8, 8, 40] * 2 + [24]),  # and the pooler
    ("vit", [3, 8, 8, 40] * 2),
    ("vgg", [8, 16, 24, 20]),
])  # fmt: skip
def test_dimensions(name: str, sizes: list[int]) -> None:
    _, graph, _ = example(name)
    assert [dimension.size for dimension in graph.dimensions] == sizes and graph.units == sum(sizes)


def test_members_and_reasons() -> None:
    _, graph, _ = example("llama")
    gate = graph.dimension("model.layers.1.mlp.gate_proj")
    found = [(m.name.rpartition("mlp.")[2], m.axis, m.zeroed) for m in gate.members]
    assert found == [("gate_proj.weight", 0, True), ("up_proj.weight", 0, True), ("down_proj.weight", 1, False)]
    (pairs,) = [d for d in graph.dimensions if any(m.name.endswith("inv_freq") for m in d.members)]
    rows = next(m for m in pairs.members if m.name.endswith("layers.0.self_attn.q_proj.weight"))
    assert rows.index[:8].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]  # i and i + D/2
    groups = graph.dimension("model.layers.0.self_attn.q_proj[0]")
    index = {m.name.rpartition("self_attn.")[2]: m.index for m in groups.members}
    assert index["q_proj.weight"].tolist() == [i // 16 for i in range(48)]
    assert index["k_proj.weight"].tolist() == [i // 8 for i in range(24)]
    reasons = {(kept.name, kept.size): kept.reason for kept in graph.kept}
    assert (
        "statistic" in reasons["model.embed_tokens", 24] and "looked up by number" in reasons["model.embed_tokens", 32]
    )
    assert "output" in reasons["lm_head", 32] and "node" in reasons["model.embed_tokens", 24]
    with pytest.raises(UnknownNameError, match="did you mean 'model.layers.1.mlp.gate_proj'"):
        graph.dimension("model.layers.1.mlp.gate")


def test_tied_weights_are_one_tensor() -> None:
    model, graph, _ = example("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight  # type: ignore[union-attr]
    assert not any("wte" in m.name or "lm_head" in m.name for d in graph.dimensions for m in d.members)
    assert sum(kept.size == 32 and "looked up" in kept.reason for kept in graph.kept) == 1


def test_columns_are_zeroed_only_where_something_between_does_not_keep_zero() -> None:
    _, graph, _ = example("mixed")
    zeroed = {(m.name, m.axis): m.zeroed for d in graph.dimensions for m in d.members}
    assert zeroed["left.weight", 1] and zeroed["right.weight", 1]  # behind a sigmoid
    assert not zeroed["grouped.weight", 1]  # behind a batch norm whose scale and shift are zero
    assert zeroed["norm.bias", 0] and not zeroed["norm.running_mean", 0]


def test_the_model_is_left_as_it_was() -> None:
    model = built("vgg").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model[0].eval()
    geta.trace(model, (torch.ones(2, 3, 8, 8),))
    assert model.training and not model[0].training and model[1].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_shall_be_kept_is_kept() -> None:
    model = built("vgg")
    graph = geta.trace(model, (torch.ones(2, 3, 8, 8),), keep=["4.*"])
    assert [d.size for d in graph.dimensions] == [24, 20]
    assert any("asked to be kept (4.*)" in kept.reason for kept in graph.kept)
    with pytest.raises(UnknownNameError, match="no parameter is called '99.weight'"):
        geta.trace(model, (torch.ones(2, 3, 8, 8),), keep=["99.weight"])


# --- quantizers in the graph ---


def units(graph: geta.Graph) -> set[frozenset[tuple[str, int, tuple[int, ...]]]]:
    return {frozenset((m.name, m.axis, tuple(m.index.tolist())) for m in d.members) for d in graph.dimensions}


@torch.library.custom_op("lowbits_test::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, step: Tensor) -> Tensor:
    return torch.round(x / step) * step


@fake_quantize.register_fake
def _(x: Tensor, step: Tensor) -> Tensor:
    return torch.empty_like(x)


class Opaque(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias, self.layer = layer.weight, layer.bias, [layer]
        self.step = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer[0]._conv_forward(
            fake_quantize(x, self.step), fake_quantize(self.weight, self.step), self.bias
        )


def test_quantizers_in_the_model_change_no_unit() -> None:
    """A7: as plain operators, for weights and inputs, and as an operator that torch cannot look into."""
    model, plain, inputs = example("mixed")
    model, x = copy.deepcopy(model), inputs(0)["x"][:2]
    for name in ("point", "left", "right"):
        setattr(model, name, Opaque(getattr(model, name)))
    with pytest.raises(ConversionError, match=r"operator lowbits_test::fake_quantize.*Treat.ELEMENTWISE"):
        geta.trace(model, (x,))
    opaque = geta.trace(model, (x,), rules={"lowbits_test::fake_quantize": geta.Treat.ELEMENTWISE})
    assert units(opaque) == units(plain)
    whole = geta.trace(model, (x,), rules={"lowbits_test::fake_quantize": geta.Treat.WHOLE})
    assert 0 < len(whole.dimensions) < len(plain.dimensions)
    model = copy.deepcopy(example("mixed").model)
    geta.quantize_(model, activations=True)
    assert units(geta.trace(model, (x,))) == units(plain)


# --- what cannot be traced ---


class Sorting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).roll(1, -1))


class Deciding(Sorting):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if x.sum() > 0 else x


def test_errors_name_the_node_and_the_remedy() -> None:
    with pytest.raises(
        ConversionError, match=r"node roll, operator roll: no rule.*rules=\{'roll': Treat.ELEMENTWISE\}"
    ):
        geta.trace(Sorting(), (torch.ones(2, 4),))
    with pytest.raises(ConversionError, match="nothing in it can be cut. For example a: no rule says"):
        geta.trace(Sorting(), (torch.ones(2, 4),), rules={"roll": geta.Treat.WHOLE})
    with pytest.raises(ConversionError, match="cannot be traced by torch.export"):
        geta.trace(Deciding(), (torch.ones(2, 4),))
    with pytest.raises(ConversionError, match="nothing in it can be cut"):
        geta.trace(nn.Linear(3, 2), (torch.ones(2, 3),))


def test_a_wrong_rule_is_found_out() -> None:
    """The proof on the example catches an operator that was declared to be what it is not."""
    model = Sorting()
    graph = geta.trace(model, (torch.randn(2, 4),), rules={"roll": geta.Treat.ELEMENTWISE})
    with pytest.raises(ConversionError, match="differs from the masked model"):
        geta.construct(graph, model, torch.arange(6) != 2)


# --- random networks ---


class Random(nn.Module):
    """A network of random blocks: each takes an earlier tensor of its resolution."""

    def __init__(self, plan: list[tuple[int, int, int]]) -> None:
        super().__init__()
        self.plan = plan
        self.layers = nn.ModuleList()
        widths = [3]
        for kind, width, source in plan:
            inputs = widths[source % len(widths)]
            self.layers.append(self._layer(kind, inputs, width))
            widths.append({1: inputs, 2: inputs + width, 3: inputs}.get(kind, width))
        self.head = nn.Linear(widths[-1], 2)

    @staticmethod
    def _layer(kind: int, inputs: int, width: int) -> nn.Module:
        if kind == 1:  # residual
            return nn.Sequential(
                nn.Conv2d(inputs, width, 1), nn.BatchNorm2d(width), nn.SiLU(), nn.Conv2d(width, inputs, 1)
            )
        if kind == 3:  # grouped, as many groups as fit
            return nn.Conv2d(inputs, inputs, 3, padding=1, groups=math.gcd(inputs, 6), bias=width % 2 == 0)
        return nn.Conv2d(inputs, width, 3 if kind == 0 else 1, padding=int(kind == 0))

    def forward(self, x: Tensor) -> Tensor:
        tensors = [x]
        for (kind, _, source), layer in zip(self.plan, self.layers, strict=True):
            y = tensors[source % len(tensors)]
            z = layer(y)
            if kind == 1:
                z = z + y
            elif kind == 2:
                z = torch.cat([y, z], 1)
            elif kind == 4:
                z = torch.relu(z) * torch.sigmoid(z)
            elif kind == 5 and tensors[-1].shape == z.shape:
                z = z + tensors[-1]
            tensors.append(z)
        return self.head(tensors[-1].mean((2, 3)))


BLOCKS = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from([4, 6, 6, 6]), st.integers(0, 9)), min_size=2, max_size=6
)


@settings(max_examples=10)
@given(BLOCKS, st.integers(0, 1000))
def test_random_networks_are_cut_exactly(plan: list[tuple[int, int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    model = Random([(0, 6, 0), *plan, (0, 6, len(plan) + 1)]).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    graph = geta.trace(model, (torch.randn(2, 3, 4, 4),))
    keep = random_keep(graph, seed)
    small = geta.construct(graph, model, keep)
    graph.zero_(model, keep)
    x = {"x": torch.randn(3, 3, 4, 4)}
    want = outputs(model, x)
    assert (want - outputs(small, x)).abs().max() <= 1e-5 * max(1.0, float(want.abs().max()))
