# SPDX-License-Identifier: Apache-2.0
"""Four stages around real optimizers: exact sparsity, bits in range, frozen units, resumed runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from lowbits.errors import CheckpointError, SpecError
from lowbits.methods import geta
from lowbits.methods.geta._saliency import lowest, saliency, unit_sums
from lowbits.optim import AdamW8bit
from tests.methods.geta.zoo import example
from tests.oracles import geta as oracle

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, 3e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.1),
    "adamw8bit": lambda p: AdamW8bit(p, 3e-3, min_8bit_size=0),
}
TARGET = geta.Target(0.5, 3, 6)
SCHEDULE = geta.Schedule(4, 12, 11, 5, periods=3)


class Net(nn.Module):
    """A residual block, a product of two branches, a sigmoid: rows and columns that are zeroed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 12), nn.BatchNorm1d(12)
        self.inner, self.back = nn.Linear(12, 20, bias=False), nn.Linear(20, 12)
        self.a, self.b = nn.Linear(12, 14), nn.Linear(12, 14)
        self.head = nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.back(torch.sigmoid(self.inner(x)))
        return self.head(torch.relu(self.a(x)) * torch.tanh(self.b(x)))


def batches() -> list[tuple[Tensor, Tensor]]:
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(SCHEDULE.steps + 4, 16, 6, generator=noise)
    return [(part, (part[:, 0] > 0).long() + (part[:, 1] > 0.5).long()) for part in x]


@cache
def traced() -> geta.Graph:
    return geta.trace(Net(), (torch.ones(2, 6),))


def prepared(activations: bool = False) -> tuple[nn.Module, geta.Graph]:
    torch.manual_seed(0)
    model, graph = Net(), traced()
    geta.quantize_(model, activations=activations)
    if activations:
        geta.calibrate_(model, [x for x, _ in batches()[:2]])
    return model, graph


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in data:
        cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("activations", [False, True], ids=["weights", "activations"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sparsity_is_exact_and_bits_stay_in_range_at_every_step(name: str, activations: bool) -> None:
    """A8, A9, A10, A5."""
    model, graph = prepared(activations=activations)
    optimizer = OPTIMIZERS[name](model.parameters())
    qasso = geta.Qasso(model, graph, TARGET, SCHEDULE)
    qasso.attach(optimizer)
    counts, stages = [], []
    for step, batch in enumerate(batches()[: SCHEDULE.steps]):
        train(model, optimizer, [batch])
        at = qasso.moment
        assert at == SCHEDULE.at(step, TARGET)
        counts.append(int(qasso.progress.pruned.sum()))
        stages.append(at.stage)
        high = 16 if at.stage is geta.Stage.WARM_UP else qasso.ceiling(at)
        assert all(3 - 1e-3 <= bits <= high + 1e-3 for bits in qasso.bits.values())
        masked = copy.deepcopy(model)
        graph.zero_(masked, qasso.keep)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), masked.parameters(), strict=True))
    units = sum(dimension.size for dimension in graph.dimensions)
    assert units == graph.units == 12 + 20 + 14 and counts[-1] == math.floor(units / 2)
    assert sorted(set(counts)) == [0, 7, 14, 23] and counts == sorted(counts)
    assert list(dict.fromkeys(stages)) == list(geta.Stage)
    assert all(bits == pytest.approx(round(bits), abs=1e-4) and 3 <= round(bits) <= 6 for bits in qasso.bits.values())
    assert int(qasso.progress.chosen) > 0 and int(qasso.progress.climbed) == 0
    small = geta.construct(graph, model, qasso.keep)
    x = batches()[0][0]
    torch.testing.assert_close(small(x), model.eval()(x), rtol=1e-5, atol=1e-5)
    assert small.sparsity == pytest.approx(23 / 46)


def test_no_optimizer_needs_to_know() -> None:
    """Distilling from the dense network, with clipping and accumulation, in a loop of the user's own."""
    model, graph = prepared()
    teacher = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "quantizer" not in n], 1e-3)
    qasso = geta.Qasso(model, graph, TARGET, SCHEDULE)
    for x, _ in batches()[: SCHEDULE.steps]:
        for part in x.split(8):
            loss = kl_div(
                log_softmax(model(part), 1), log_softmax(teacher(part), 1), reduction="batchmean", log_target=True
            )
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        qasso.before_step_()
        optimizer.step()
        qasso.after_step_()
        optimizer.zero_grad()
    assert int((~qasso.keep).sum()) == 23
    geta.construct(graph, model, qasso.keep)


@pytest.mark.parametrize("stop", [2, 9, 18, 21, 29])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_run_resumed_in_any_stage_is_the_same_run(name: str, stop: int) -> None:
    """A17, bit for bit."""

    def start() -> tuple[nn.Module, torch.optim.Optimizer, geta.Qasso]:
        model, graph = prepared()
        optimizer = OPTIMIZERS[name](model.parameters())
        qasso = geta.Qasso(model, graph, TARGET, SCHEDULE)
        qasso.attach(optimizer)
        return model, optimizer, qasso

    data = batches()[: SCHEDULE.steps]
    model, optimizer, _ = start()
    train(model, optimizer, data)
    first, first_optimizer, first_qasso = start()
    train(first, first_optimizer, data[:stop])
    again, again_optimizer, again_qasso = start()
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    again_optimizer.load_state_dict(copy.deepcopy(first_optimizer.state_dict()))
    again_qasso.load_state_dict(first_qasso.state_dict())
    train(again, again_optimizer, data[stop:])
    for p, q in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(p, q)
    other, graph = prepared()
    wrong = geta.Qasso(other, graph, TARGET, SCHEDULE).state_dict() | {"pruned": torch.zeros(3, dtype=torch.bool)}
    with pytest.raises(CheckpointError, match=r"pruned is \[3\] instead of \[46\]"):
        again_qasso.load_state_dict(wrong)


def test_replicas_take_the_choice_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, told = [], torch.arange(46) % 6 == 5

    def broadcast(units: Tensor, source: int) -> None:
        assert source == 0
        mine.append(units.bool())
        units.copy_(told)

    model, graph = prepared()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    qasso = geta.Qasso(model, graph, TARGET, SCHEDULE)
    qasso.attach(optimizer)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    train(model, optimizer, batches()[: SCHEDULE.warm_up + SCHEDULE.projection + 1])
    assert len(mine) == 1 and int(mine[0].sum()) == 7 and not torch.equal(mine[0], told)
    assert torch.equal(qasso.progress.doomed, told)


def test_flipping_the_signs_of_the_weights_changes_no_forgetting_rate() -> None:
    """A11: the authors' code looks at a signed mean, and forgets groups of negative mean at once."""
    found = []
    for sign in (1.0, -1.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False))  # odd functions
        graph = geta.trace(model, (torch.ones(2, 4),))
        with torch.no_grad():
            model[0].weight.abs_().mul_(sign)
            model[2].weight.mul_(sign)
        geta.quantize_(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        qasso = geta.Qasso(model, graph, geta.Target(0.5, 4, 16), geta.Schedule(0, 1, 20, 1, periods=1))
        qasso.attach(optimizer)
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
        track = []
        for _ in range(15):
            loss = (model(x) - x[:, :2]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            track.append(float(model[0].weight.detach().abs().sum()))
        found.append(track)
    assert found[0] == found[1]


def test_layers_of_very_different_ranges_in_one_unit_stay_in_range() -> None:
    """A12: one step for all layers, from the largest range, would leave the smaller one with 1.5 bits."""
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.b.weight.mul_(16.0)
    geta.quantize_(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    qasso = geta.Qasso(model, traced(), geta.Target(0.4, 4, 8), SCHEDULE)
    qasso.attach(optimizer)
    for batch in batches()[: SCHEDULE.steps]:
        train(model, optimizer, [batch])
        if qasso.moment.stage is not geta.Stage.WARM_UP:
            assert min(qasso.bits.values()) >= 4 - 1e-3


def test_steps_that_were_skipped_hurt_nothing() -> None:
    """A gradient that is not finite: the optimizer steps on NaN, the quantizers do not."""
    model, graph = prepared()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    qasso = geta.Qasso(model, graph, TARGET, SCHEDULE)
    qasso.attach(optimizer)
    for x, y in batches()[:20]:
        (cross_entropy(model(x), y) * (torch.nan if qasso.progress.count == 18 else 1.0)).backward()
        for p in model.parameters():  # what a loop does that skips the update
            if p.grad is not None and not p.grad.isfinite().all() and p.ndim:
                p.grad.zero_()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.isfinite().all() for p in model.parameters())


# --- selection ---


@given(st.integers(0, 1000))
def test_saliency_is_the_oracles(seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    x, u = (torch.randn(7, 5, generator=noise, dtype=torch.float64) for _ in range(2))
    want = oracle.saliency(x.tolist(), u.tolist())
    count = torch.full((7,), 5.0, dtype=torch.float64)
    found = saliency(x.square().sum(1), (x * u).sum(1), u.square().sum(1), count)
    assert found.tolist() == pytest.approx(want, rel=1e-9)


@given(st.integers(0, 1000), st.floats(0.0, 0.9), st.integers(0, 20))
def test_selection_is_the_oracles(seed: int, floor: float, number: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    sizes = [3, 8, 1, 12]
    scores = torch.rand(24, generator=noise)
    live = torch.rand(24, generator=noise) < 0.8
    target = geta.Target(0.5, floor=floor)
    want = oracle.lowest(scores.tolist(), live.tolist(), sizes, [target.stays(size) for size in sizes], number)
    assert lowest(scores, live, sizes, target, number).nonzero().squeeze(1).tolist() == want


def test_the_lowest_go_even_where_pruned_units_score_low() -> None:
    """The authors' code sorts by index before it truncates, and took units 2 and 3 instead of 4 and 2."""
    scores = torch.tensor([0.9, 0.0, 0.3, 0.5, 0.2, 0.8])
    live = torch.tensor([True, False, True, True, True, True])
    chosen = lowest(scores, live, [6], geta.Target(0.5, floor=0.0), 2)
    assert chosen.nonzero().squeeze(1).tolist() == [2, 4]


def test_sums_over_units_are_those_of_their_slices() -> None:
    model, graph, _ = example("llama")
    products = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    found = unit_sums(graph, products).split([d.size for d in graph.dimensions])
    for dimension, sums in zip(graph.dimensions, found, strict=True):
        for unit in range(0, dimension.size, 5):
            want = sum(
                products[m.name].index_select(m.axis, (m.index == unit).nonzero().squeeze(1)).sum()
                for m in dimension.members if m.zeroed
            )  # fmt: skip
            torch.testing.assert_close(sums[unit], want, rtol=1e-4, atol=1e-4)


# --- what cannot be ---


def test_targets_out_of_reach_are_named_before_training() -> None:
    """A8."""
    for arguments, words in (
        ({"sparsity": 1.0}, "share from 0 to 0.999"),
        ({"sparsity": 0.5, "lowest": 8, "highest": 4}, "upside down"),
        ({"sparsity": 0.5, "lowest": 1}, "bits are between 2 and 16"),
        ({"sparsity": 0.5, "lowest": 4.2, "highest": 4.8}, "no whole number"),
        ({"sparsity": 0.5, "floor": 1.5}, "floor is a share"),
    ):
        with pytest.raises(SpecError, match=words):
            geta.Target(**arguments)
    model, graph = prepared()
    with pytest.raises(SpecError, match=r"ask for at most 0\.\d+, or give a smaller floor"):
        geta.Qasso(model, graph, geta.Target(0.5, floor=0.6), SCHEDULE)
    for schedule, words in (
        (geta.Schedule(1, 2, 20, 1), "give it 5 steps"),
        (geta.Schedule(1, 10, 3, 1, periods=4), "4 pruning periods in 3 steps"),
        (geta.Schedule(1, 10, 30, 0), "cool_down has 0 steps"),
        (geta.Schedule(-1, 10, 30, 1), "warm_up has -1 steps"),
    ):
        with pytest.raises(SpecError, match=words):
            geta.Qasso(model, graph, geta.Target(0.5), schedule)
    with pytest.raises(SpecError, match="too few"):
        geta.Schedule.of(5)
    with pytest.raises(SpecError, match="no quantizers"):
        geta.Qasso(Net(), graph, TARGET, SCHEDULE)
    other = nn.Sequential(nn.Linear(2, 2))
    geta.quantize_(other)
    with pytest.raises(SpecError, match="another model"):
        geta.Qasso(other, graph, TARGET, SCHEDULE)


def test_gradients_that_are_gone_are_named() -> None:
    model, graph = prepared()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    qasso = geta.Qasso(model, graph, TARGET, SCHEDULE)
    with pytest.raises(SpecError, match="without before_step_"):
        qasso.after_step_()
    train(model, optimizer, [])
    qasso.progress.count.fill_(SCHEDULE.warm_up + SCHEDULE.projection + 1)
    qasso.progress.doomed[:3] = True
    qasso.before_step_()
    with pytest.raises(SpecError, match="has no gradient at the optimizer's step"):
        qasso.after_step_()


@given(st.integers(10, 400), st.floats(2, 16), st.integers(1, 10))
def test_every_step_has_its_place(steps: int, highest: float, periods: int) -> None:
    target = geta.Target(0.3, 2, highest)
    schedule = geta.Schedule.of(steps, min(periods, 3 * steps // 10))
    if schedule.projection < len(target.ceilings()):
        return
    schedule.check(target)
    moments = [schedule.at(step, target) for step in range(schedule.steps)]
    assert len(moments) == steps and target.ceilings()[-1] == highest
    for stage, length, number in (
        (geta.Stage.PROJECTION, schedule.projection, len(target.ceilings())),
        (geta.Stage.JOINT, schedule.joint, schedule.periods),
    ):
        own = [m for m in moments if m.stage is stage]
        assert len(own) == length and {m.period for m in own} == set(range(number))
        assert sum(m.index == m.length - 1 for m in own) == number == sum(m.index == 0 for m in own)
