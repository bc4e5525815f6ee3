# SPDX-License-Identifier: Apache-2.0
"""The parts of the weight-noise experiments that can be wrong without anybody seeing it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.gaussian_weight_sampling import gpu_language, gpu_speed, language
from experiments.gaussian_weight_sampling.casting import FORMATS, cast_losses, ladder_losses
from lowbits.data import TokenData
from lowbits.methods import Method, named
from lowbits.methods.gaussws import GaussWS, noisy
from lowbits.models import size
from lowbits.nn import Recipe, convert_
from lowbits.train import Autocast, Compute, Device, Watching, train
from tests.train.tiny import tokens


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


def test_a_run_of_the_small_model(data: TokenData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "STEPS", 2)
    monkeypatch.setattr(language, "VAL_BATCHES", 1)
    found = language.measure(data, "GaussWS 6 to 4, fast bits", 0)
    assert 5 < found["loss"] < 6.5 and found["lowest"] <= found["bits"] <= found["highest"]
    assert "ladder by block" in found and set(FORMATS) < set(found)


def test_casts_of_a_finished_run(data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_language, "VAL_BATCHES", 1)
    run = replace(
        gpu_language.run_of("gpt2-pico", str(data.folder), 2), batch_size=2, block=16, method=named("gaussws"),
        compute=Compute(device=Device.CPU, autocast=Autocast.BF16), watching=Watching(eval_batches=1, errors_every=0),
    )  # fmt: skip
    result = train(run, tmp_path / "run")
    found = gpu_language.costs_of(run, "gaussws", 0, tmp_path / "run")
    assert found["loss"] == pytest.approx(result["val_loss_on"], abs=1e-3)
    assert found == gpu_language.costs_of(run, "gaussws", 0, tmp_path / "run") and 5.9 < found["bits"] < 6.1
    model = gpu_language.trained(run, "gaussws", 0, tmp_path / "run", data.vocab_size)
    assert len(noisy(model)) == 4 * 4 and not model.training


def test_every_arm_of_the_larger_models_exists() -> None:
    assert all(named(words) for words in gpu_language.ARMS.values())
    assert [size(name).family for name in gpu_language.MODELS] == ["gpt2", "llama"]
    row = {"loss": 4.0, **dict.fromkeys(FORMATS, 4.1)}
    costs = {arm: [dict(row), dict(row)] for arm in gpu_language.ARMS}
    assert sum(check.holds for check in gpu_language.checks(costs)) == 3  # equal costs are not smaller ones


def test_steps_that_are_timed_are_steps() -> None:
    """Both ways to train take the same tokens; a plain model is not converted."""
    ids = gpu_speed.tokens("cpu", 1, 16)
    losses = {}
    for name, method in {"bf16": Method(), **gpu_speed.ARMS}.items():
        made = gpu_speed.training(method, "llama-15m", compiled=False, device="cpu", layers=1)
        losses[name] = [made.take(ids).item() for _ in range(2)]
        assert made.step == 2 and len(noisy(made.model)) == (
            7 if name.startswith("GaussWS") or "matched" in name else 0
        )
    assert losses["GaussWS"] == losses["GaussWS, lean"] != losses["bf16"]
    assert all(after < before for before, after in losses.values())


def test_the_way_over_torch_randn_is_the_same_noise() -> None:
    w, b_i = torch.randn(512, 512), torch.ones(16, 16)
    moved = gpu_speed.by_randn(w, b_i).float() != w.bfloat16().float()
    assert float(moved.float().mean()) == pytest.approx(1 - 0.6827, abs=0.01)


def test_the_claims_of_the_gpu_can_hold_and_fail() -> None:
    key = "tile 4096, warps 4"
    row = {"forward_tb_s": 3.0, "backward_over_forward": 1.0}
    kernels = {
        "chosen": key,
        "tiles": {f"{key}, {d}": row for d in (torch.float32, torch.bfloat16)},
        "randn_over_ours": 9.0,
    }
    memory = {"bytes_a_parameter": {"bf16, eager": 0.0, "GaussWS, eager": 0.1, "GaussWS, lean, eager": -1.0}}
    found = {"kernels": kernels, "memory": memory, "step": {"GaussWS, compiled": {"overhead": 0.01}}}
    assert all(check.holds for check in gpu_speed.checks(found))  # type: ignore[arg-type]
    kernels["randn_over_ours"] = 2.0
    found["step"]["GaussWS, compiled"]["overhead"] = 0.02
    memory["bytes_a_parameter"]["GaussWS, lean, eager"] = 0.3
    assert sum(not check.holds for check in gpu_speed.checks(found)) == 3  # type: ignore[arg-type]
