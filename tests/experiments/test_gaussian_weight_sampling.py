# SPDX-License-Identifier: Apache-2.0
"""The parts of the weight-noise experiments that can be wrong without anybody seeing it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import checks as checks_file
from experiments.gaussian_weight_sampling import gpu_language, gpu_speed, language
from experiments.gaussian_weight_sampling.casting import FORMATS, cast_losses, ladder_losses
from experiments.gaussian_weight_sampling.training import Setting, measure
from lowbits.data import TokenData
from lowbits.errors import RunError
from lowbits.methods import Method, named
from lowbits.methods.gaussws import GaussWS, noisy
from lowbits.models import size
from lowbits.nn import Recipe, convert_
from tests.train.tiny import tokens

TINY = Setting(steps=2, warmup=1, batch=2, length=16, lr=1e-3, validation=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    return tokens(tmp_path_factory.mktemp("tiny"))


def test_a_cast_costs_what_the_weights_lose(data: TokenData) -> None:
    """Losses of copies: the model stays as it is, and the fewer the bits the farther the weights."""
    model = language.build(data.vocab_size, 0)
    convert_(model, Recipe(), verbose=False)
    GaussWS(b_init=4.0).prepare_(model, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def distance(other: torch.nn.Module) -> float:
        layer = other.transformer.h[0].mlp.c_fc  # type: ignore[union-attr, index]
        seen = layer.weight if layer.weight_fn is None else layer.weight_fn(layer.weight)  # type: ignore[operator]
        return float((seen.detach() - layer.weight.detach()).abs().mean()) + float(other.training)

    found = cast_losses(model, distance)
    assert list(found) == ["loss", *FORMATS]
    assert found["loss"] < found["FP8 e4m3"] < found["FP6 e3m2"] < found["FP4 e2m1"] < 1
    ladder = ladder_losses(model, distance)
    assert ladder["bits a weight, by block"] == pytest.approx(
        6, abs=0.1
    )  # FP6, an exponent, a format of 4 bits a block
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_small_models_claims_can_hold_and_fail() -> None:
    row = {"loss": 4.0, "bits": 5.9, "above the target": 0.9, **dict.fromkeys(FORMATS, 4.1)}
    runs = {name: [dict(row) for _ in range(3)] for name in language.ARMS}
    for found in runs["GaussWS 4"] + runs["GaussWS 3"]:
        found.update(dict.fromkeys(FORMATS, 4.01))
    assert all(check.holds for check in language.checks(runs))
    runs["GaussWS 9"][1]["loss"] = 4.05
    runs["GaussWS 4"][2]["FP6 e3m2"] = 4.2
    runs["GaussWS 6 to 4"] = [{**row, "bits": 6.1, "loss": 4.01}] * 3
    assert sum(not check.holds for check in language.checks(runs)) == 5
    for found in runs["bf16"]:
        found["FP6 e3m2"] = 3.9
    assert not language.checks(runs)[-1].holds  # a cast that helps bf16 is no reason to praise another


def test_a_run(data: TokenData) -> None:
    found = measure(language.build(data.vocab_size, 0), data, GaussWS(bit_lr=0.02, pull=1.0), 0, TINY)
    assert 5 < found["loss"] < 6.5 and found["lowest"] <= found["bits"] <= found["highest"] and found["bits"] < 6
    assert "ladder by block" in found and set(FORMATS) < set(found)
    assert "size, MB" in measure(language.build(data.vocab_size, 0), data, named("diffq,smallest=0"), 0, TINY)


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    setting = Setting(steps=100, warmup=10, batch=1, length=1, lr=1.0, validation=1)
    assert [round(setting.share(step), 3) for step in (0, 9, 10, 55, 99)] == [0.1, 1.0, 1.0, 0.55, 0.1]


def test_larger_models_go_on_where_they_were_stopped(
    data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file after every run, needed arms first, nothing twice, another setting aside."""
    monkeypatch.setattr(checks_file, "RESULTS", tmp_path)
    arms = ["DiffQ library", "bf16", "GaussWS"]

    def call(setting: Setting, seconds: float) -> dict[str, Any]:
        gpu_language.main(str(data.folder), ["gpt2-pico"], arms, 1, setting, seconds)
        (path,) = tmp_path.glob("*/gaussws_lm_gpt2-pico.json")
        return json.loads(path.read_text(encoding="utf-8"))

    first = call(TINY, 1e-3)  # the first run is always begun: nobody knows how long one takes
    assert list(first["costs"]) == [] and [arm for arm, found in first["runs"].items() if found] == ["bf16"]
    assert "are up; the same command goes on from here" in capsys.readouterr().out
    second = call(TINY, 1e3)
    assert second["runs"]["bf16"] == first["runs"]["bf16"] and set(second["costs"]) == set(arms)
    assert "bf16 0" not in capsys.readouterr().out
    third = call(replace(TINY, lr=2e-3), 1e-3)
    assert set(third["costs"]) == set() and list(tmp_path.glob("*/*.old"))


def test_names_that_there_are_not(data: TokenData) -> None:
    with pytest.raises(RunError, match="no arm 'x'; there are bf16, GaussWS"):
        gpu_language.main(str(data.folder), ["gpt2-pico"], ["x"], 1, TINY, 1)
    tiny = gpu_speed.Size("llama-15m", 1, 1, 1, False, "cpu", 16)
    with pytest.raises(RunError, match="no part 'x'; there are step, kernels, repeat, bits"):
        gpu_speed.main(tiny, ["x"], ["GaussWS"], 1)


def test_every_arm_of_the_larger_models_exists() -> None:
    assert all(named(words) for words in gpu_language.ARMS.values())
    assert [size(name).family for name in gpu_language.MODELS] == ["gpt2", "llama"]
    row = {"loss": 4.0, **dict.fromkeys(FORMATS, 4.1)}
    costs = {arm: [dict(row), dict(row)] for arm in gpu_language.ARMS}
    assert sum(check.holds for check in gpu_language.checks(costs)) == 3  # equal costs are not smaller ones
    assert gpu_language.checks({"bf16": [row]}) == []


def test_steps_that_are_timed_are_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to train take the same tokens; a plain model is not converted."""
    monkeypatch.setattr(gpu_speed, "VOCABULARY", 128)
    tiny = gpu_speed.Size("llama-15m", 1, 1, 1, False, "cpu", 16)
    ids, losses = gpu_speed.tokens(tiny), {}
    for name, method in {"bf16": Method(), **gpu_speed.ARMS}.items():
        made = gpu_speed.training(method, tiny)
        losses[name] = [made.take(ids).item() for _ in range(2)]
        assert made.step == 2 and len(noisy(made.model)) == (
            7 if name.startswith("GaussWS") or "matched" in name else 0
        )
    assert losses["GaussWS"] == losses["GaussWS, lean"] != losses["bf16"]
    assert all(after < before for before, after in losses.values())


def test_the_tile_that_is_launched_is_the_first_of_those_that_are_timed() -> None:
    *_, last = gpu_speed.kernels(gpu_speed.Size("llama-15m", 1, 1, 1, False, "cpu"), [], 0.0)
    assert last["chosen"] == "2048 of a program, 2048 of a warp" and last["tiles"] == {} and last["layers"]


def test_the_way_over_torch_randn_is_the_same_noise() -> None:
    w, b_i = torch.randn(512, 512), torch.ones(16, 16)
    moved = gpu_speed.by_randn(w, b_i).float() != w.bfloat16().float()
    assert float(moved.float().mean()) == pytest.approx(1 - 0.6827, abs=0.01)


def test_the_claims_of_the_gpu_can_hold_and_fail() -> None:
    row = {"forward_tb_s": 3.0, "backward_over_forward": 1.0}
    kernels: dict[str, Any] = {
        "layers": {"16384 x 8192, float32": row, "5632 x 2048, float32": {}},
        "randn_over_ours": 9.0,
    }
    arms = {"GaussWS": {"overhead": 0.01}, "GaussWS, lean": {"overhead": 0.01}, "DiffQ library": {"overhead": 0.5}}
    step = {"arms": arms, "bytes_a_parameter": {"GaussWS": 2.0, "GaussWS, lean": -1.0, "DiffQ library": 9.0}}
    repeat = {"losses": {}, "equal": True, "shards": True}
    parts = {"kernels": kernels, "step": step, "repeat": repeat, "bits": {"cases": ["a: equal"], "equal": True}}

    def failures() -> int:
        return sum(not check.holds for part, found in parts.items() for check in gpu_speed.checks(part, found))

    assert failures() == 0
    kernels["randn_over_ours"] = 2.0
    row["forward_tb_s"] = 2.7
    arms["GaussWS"]["overhead"] = 0.02
    step["bytes_a_parameter"]["GaussWS, lean"] = 0.3
    repeat["shards"] = False
    assert failures() == 5


def test_instructions_are_counted_by_thread() -> None:
    pytest.importorskip("triton", reason="the gpu extra is not installed")
    from experiments.gaussian_weight_sampling import instructions

    code = "/*0000*/ LOP3.LUT R1, R2 ;\n/*0010*/ @!P0 FADD R1, R2 ;\n/* 0x0004 */\n/*0020*/ NOP ;\n/*0030*/ SEL R1 ;"
    found = instructions.counted(code, 64, 1)
    assert found == {"all": 1.5, "integer": 1.0}
    told = instructions.modelled(found, 6)
    assert told["arithmetic_ps"] == pytest.approx(1e3 / 64 / (132 * 1.755)) and told["memory_ps"] == 6 / 4.2
