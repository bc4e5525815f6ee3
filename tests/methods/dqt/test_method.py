# SPDX-License-Identifier: Apache-2.0
"""The method, its meters, its ledger, ternary inference, and models that were never floats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowbits import models
from lowbits.analysis import measure_memory, predict_memory
from lowbits.errors import ConversionError, SpecError
from lowbits.methods import Position
from lowbits.methods._code_meter import CodeMeter
from lowbits.methods.bitnet import HYPER, BitNet, Published
from lowbits.methods.dqt import (
    DQT,
    Environment,
    Scope,
    States,
    alarms,
    codes_of,
    materialize_,
    occupancy,
    quantize_,
    rescale_,
    ternary_weights,
)
from lowbits.nn import (
    Grid,
    GridLinear,
    Packing,
    QParameter,
    StepInit,
    StepRule,
    normal_parameter,
    normal_values,
    quantize_parameter,
)
from lowbits.optim import AdamW, AdamW8bit
from lowbits.quantizers import Noise
from lowbits.study._methods import method_curves
from lowbits.study._records import read_run
from lowbits.train import train
from tests.train.tiny import log_lines, tiny_run, tokens


class Block(nn.Module):
    """A toy with the names of a Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 64)
        self.norm = nn.RMSNorm(64)
        self.up_proj, self.down_proj = nn.Linear(64, 96, bias=False), nn.Linear(96, 64, bias=False)
        self.lm_head = nn.Linear(64, 32, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        return self.lm_head(x + self.down_proj(self.up_proj(self.norm(x)).relu()))


def block() -> Block:
    torch.manual_seed(0)
    made = Block()
    for p in made.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.02)
    return made


def loss(model: nn.Module, seed: int) -> torch.Tensor:
    ids = torch.randint(0, 32, (4, 9), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def trained(method: DQT, steps: int = 5, lr: float = 1e-2) -> tuple[nn.Module, AdamW]:
    model = block()
    method.prepare_(model, 0)
    optimizer = AdamW(method.param_groups(model, 0.01), lr=lr)
    for step in range(steps):
        loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step_(model, Position(step, steps, step, lr, 1.0))
    return model, optimizer


def test_scope_says_what_is_codes() -> None:
    linear = block()
    assert quantize_(linear, Grid.of(8)) == ["up_proj.weight", "down_proj.weight"]
    every = block()
    assert len(quantize_(every, Grid.of(8), scope=Scope.ALL)) == len(list(every.parameters())) == 5
    loss(every, 0).backward()
    assert all(p.grad is not None for p in every.parameters())
    assert "norm.weight.codes" in every.state_dict() and "embedding.weight.codes" in every.state_dict()
    with pytest.raises(ConversionError, match="no linear layers"):
        quantize_(nn.Sequential(nn.LayerNorm(3)), Grid.of(8))


def test_environment_is_the_dtype_of_gradients() -> None:
    for environment in Environment:
        model = block()
        quantize_(model, Grid.of(8), environment=environment)
        loss(model, 0).backward()
        assert model.up_proj.weight.grad.dtype == environment.dtype  # type: ignore[union-attr]


@pytest.mark.parametrize("states", States)
def test_groups_carry_the_codecs_and_the_rate_of_codes(states: States) -> None:
    model, optimizer = trained(DQT(states=states, codes_lr=3e-3, codes_per_byte=2, bits=4), steps=1)
    groups = [g for g in optimizer.param_groups if any(isinstance(p, QParameter) for p in g["params"])]
    assert len(groups) == 1 and groups[0]["lr"] == 3e-3
    state = optimizer.state[model.up_proj.weight]
    size = sum(t.untyped_storage().nbytes() for name, t in state.items() if "." in name) / model.up_proj.weight.numel()
    assert size == pytest.approx({States.FLOAT32: 8, States.EIGHT: 2.03125, States.FOUR: 1.0625}[states], rel=0.01)


def test_fields_that_contradict_are_refused() -> None:
    with pytest.raises(SpecError, match="codes_per_byte is one of"):
        DQT(codes_per_byte=3)
    with pytest.raises(SpecError, match="do not fit a byte"):
        DQT(bits=8, codes_per_byte=4)
    with pytest.raises(SpecError, match="at least 0"):
        DQT(rescale_every=-1)
    assert DQT(bits=1.58, codes_per_byte=5).grid == Grid.of(1.58, Packing.FIVE)


def test_frozen_codes_stay() -> None:
    model, _ = trained(DQT(frozen=True))
    fresh = block()
    DQT(frozen=True).prepare_(fresh, 0)
    assert all(torch.equal(p.codes, codes_of(fresh)[n].codes) for n, p in codes_of(model).items())
    assert not torch.equal(model.embedding.weight, fresh.embedding.weight)  # type: ignore[union-attr]


def test_the_meter_counts_what_changed() -> None:
    """Against codes that were moved by hand: 10 of 256 by one, then the same back, and 5 by three."""
    p = QParameter.of(torch.zeros(16, 16, dtype=torch.int8), torch.tensor(0.1), Grid.of(8))
    meter, codes = CodeMeter(p), torch.zeros(256, dtype=torch.int8)
    codes[:10] = 1
    p.store_(codes.view(16, 16))
    meter.update_(p)
    codes[:10] = 0
    codes[20:25] = 3
    p.store_(codes.view(16, 16))
    meter.update_(p)
    read = meter.read_(p)
    assert read["changed"] == pytest.approx((10 + 15) / 2 / 256) and read["jumped"] == pytest.approx(5 / 2 / 256)
    assert read["pace"] == pytest.approx((10 + 10 + 15) / 2 / 256)
    assert read["drift"] == pytest.approx(45 / (10 + 10 + 45)) and read["zero"] == pytest.approx(251 / 256)
    assert meter.read_(p)["changed"] == 0 and alarms("w", meter.read_(p))  # no code at the top


def test_drift_is_the_number_of_updates_where_codes_only_drift() -> None:
    p = QParameter.of(torch.zeros(16, 16, dtype=torch.int8), torch.tensor(0.1), Grid.of(8))
    meter = CodeMeter(p)
    for step in range(1, 6):
        p.store_(torch.full((16, 16), step, dtype=torch.int8))
        meter.update_(p)
    assert meter.read_(p)["drift"] == 5


def test_alarms_name_what_is_wrong() -> None:
    grid = Grid.of(8)
    p = QParameter.of(torch.full((16, 16), 3, dtype=torch.int8), torch.tensor(0.1), grid)
    meter = CodeMeter(p)
    for _ in range(120):
        meter.update_(p)
    assert "does not learn" in " ".join(alarms("w", meter.read_(p)))
    p.store_(torch.full((16, 16), 127, dtype=torch.int8))
    meter.update_(p)
    assert "widen the range" in " ".join(alarms("w", meter.read_(p)))


def test_occupancy_is_of_all_codes() -> None:
    found = occupancy(quantize_parameter(torch.randn(768, 768) * 0.02, Grid.of(1.58)))
    assert sum(found.shares) == pytest.approx(1) and len(found.shares) == 3
    assert found.zero == pytest.approx(0.31, abs=0.005) and found.top == pytest.approx(0.345, abs=0.005)


def test_metrics_and_tables() -> None:
    method = DQT(rescale_every=2, init=StepRule.ABSMAX)
    model, _ = trained(method)
    told = method.metrics(model)
    assert told["changed"] > 0.5 and told["alarms"] >= 0
    steps = [float(p.step) for p in codes_of(model).values()]  # of two weights of one size
    assert told["lr_in_codes"] == pytest.approx(1e-2 * sum(1 / step for step in steps) / 2)
    (table,) = method.tables(model)
    assert [row[0] for row in table.rows] == ["up_proj.weight", "down_proj.weight"]
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_an_event_gives_a_new_step_and_keeps_the_mean() -> None:
    p = quantize_parameter(torch.randn(200, 200) * 0.02, Grid.of(4), StepInit(StepRule.SIGMA, sigmas=8))
    before = p.dequantize()
    factor = rescale_(p, StepInit(StepRule.ABSMAX), Noise.of(0, "w", "rescale"), 3)
    assert float(factor) < 1
    # Four standard errors of the mean of 40,000 roundings, each of variance at most D^2 / 4.
    assert abs(float((p.dequantize() - before).mean())) < 4 * float(p.step) / 2 / 200


def test_ternary_weights_come_and_go() -> None:
    model, _ = trained(DQT(bits=8))
    before = {name: p.codes.clone() for name, p in codes_of(model).items()}
    plain = loss(model, 9)
    with ternary_weights(model):
        assert all(p.grid == Grid.of(1.58) for p in codes_of(model).values())
        ternary = loss(model, 9)
    assert ternary != plain and loss(model, 9) == plain
    assert all(torch.equal(p.codes, before[name]) for name, p in codes_of(model).items())


def test_the_ledger_counts_real_bytes() -> None:
    """U14: weights, states and buffers by storage; gradients by the dtype that they have."""
    model = block()
    quantize_(model, Grid.of(1.58), environment=Environment.BF16)
    optimizer = AdamW8bit(model.parameters(), lr=1e-3)
    loss(model, 0).backward()
    optimizer.step()
    memory = measure_memory(model, optimizer, loss, 1).measured
    floats = (32 * 64 * 2 + 64) * 4
    assert memory.weights == floats + 64 * 24 + 96 * 16 + 2 * 4
    assert memory.gradients == floats + 2 * 64 * 96 * 2
    assert memory.optimizer == sum(t.untyped_storage().nbytes() for s in optimizer.state.values() for t in s.values())


def test_the_ledger_predicts_no_codes() -> None:
    """Its shapes are those of float weights: a wrong number is worse than none."""
    model = models.build("gpt2-pico", 64, 32, seed=0)
    quantize_(model, Grid.of(8))
    with pytest.raises(SpecError, match="measure_memory"):
        predict_memory(model, 1, 32)


@pytest.mark.parametrize("packing", [None, Packing.FIVE])
def test_a_model_that_was_never_floats(packing: Packing | None) -> None:
    """The same distribution as from floats, the same draws in any chunks, and it trains."""
    grid = Grid.of(1.58, packing)
    with torch.device("meta"):
        model = Block()
    assert materialize_(model, grid, "cpu", dtype=torch.float32) == ["up_proj.weight", "down_proj.weight"]
    assert isinstance(model.up_proj, GridLinear) and not any(p.is_meta for p in model.parameters())
    found = occupancy(model.up_proj.weight)
    assert found.top == pytest.approx(0.345, abs=0.025)  # four standard errors of 6144 draws
    assert float(model.embedding.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        losses.append(loss(model, 0))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(ConversionError, match="meta"):
        materialize_(model, grid, "cpu")


def test_the_ends_of_the_draws_are_finite_and_symmetric(monkeypatch: pytest.MonkeyPatch) -> None:
    """One draw in 2^24 is the largest: in a large model it comes."""
    draws = torch.tensor([0.0, 1 - 2.0**-24, 0.5 - 2.0**-24, 0.5, 2.0**-24])
    monkeypatch.setattr(Noise, "uniform", lambda *_, **__: draws)
    x = normal_values((5,), 1.0, Noise.of(0, "w", "start"), torch.device("cpu"))
    assert x.isfinite().all() and x[0] == -x[1] == x.min() and 5 < float(x[1]) < 5.6
    assert x[2] == -x[3] and x[0] < x[4] < x[2] < 0


@pytest.mark.parametrize("per_channel", [False, True])
def test_drawn_codes_do_not_depend_on_chunks(per_channel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    noise, init = Noise.of(0, "w", "start"), StepInit(per_channel=per_channel)
    whole = normal_parameter((32, 64), Grid.of(8), 0.02, noise, init=init)
    monkeypatch.setattr("lowbits.nn._steps_of_weights._CHUNK", 64 * 5)
    parts = normal_parameter((32, 64), Grid.of(8), 0.02, noise, init=init)
    assert torch.equal(whole.codes, parts.codes) and whole.per_channel == per_channel
    assert float(whole.dequantize().std()) == pytest.approx(0.0124, rel=0.05)  # spec, 2.2: 42 % of it is cut off
    assert normal_parameter((7,), Grid.of(2), 0.02, noise).shape == (7,)
    with pytest.raises(SpecError, match="sigma"):
        normal_parameter((2, 2), Grid.of(8), 0.0, noise)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokens(tmp_path_factory.mktemp("tiny")).folder


def test_the_log_has_the_loss_of_ternary_weights(data: Path, tmp_path: Path) -> None:
    """Of 8-bit codes; ternary ones have no other form. And the report has its curve."""
    for bits in (8, 1.58):
        out = tmp_path / f"run-{bits}"
        train(tiny_run(data, recipe="bf16", steps=2, method=DQT(bits=bits, sub_norms=False)), out)
        (line,) = [line for line in log_lines(out) if line["kind"] == "eval"]
        assert ("loss_ternary" in line) == (bits == 8)
        curves = method_curves([read_run(out, 0)])
        if bits == 8:
            assert line["loss_ternary"] > 0 and line["loss_ternary"] != line["loss_on"]
            assert curves["validation loss, ternary"].mean == (line["loss_ternary"],)
        assert "pace" in curves and ("validation loss, ternary" in curves) == (bits == 8)


def test_bitnet_trains_with_a_published_set(data: Path, tmp_path: Path) -> None:
    """The second half has the second peak, and no decay; norms never decay."""
    seen: list[list[dict[str, float]]] = []

    class Watched(BitNet):
        def before_update_(self, groups: Sequence[dict[str, Any]], at: Position) -> None:
            super().before_update_(groups, at)
            keys = ("lr", "weight_decay", "eps")
            seen.append([{key: group[key] / (at.share if key == "lr" else 1) for key in keys} for group in groups])

    run = tiny_run(data, recipe="bitnet_b158", steps=4, method=Watched(Published.OFFICIAL_700M))
    train(run, tmp_path / "run")
    first, last = seen[0], seen[-1]
    assert [group["lr"] for group in first] == pytest.approx([1.5e-3] * 2)
    assert [group["lr"] for group in last] == pytest.approx([1e-3] * 2)
    assert sorted(group["weight_decay"] for group in first) == [0.0, 0.1]
    assert [group["weight_decay"] for group in last] == [0.0, 0.0] and first[0]["eps"] == 1e-8


def test_bitnet_has_both_published_sets() -> None:
    assert HYPER["dqt"].at(0, 100) == HYPER["dqt"].at(99, 100) == (5e-4, 0.01)
    assert HYPER["official-700m"].at(49, 100) == (1.5e-3, 0.1) and HYPER["official-700m"].at(50, 100) == (1e-3, 0.0)
    model = block()
    BitNet().prepare_(model, 0)
    assert hasattr(model.down_proj, "sub_norm")
