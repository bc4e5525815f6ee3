# SPDX-License-Identifier: Apache-2.0
"""Training under noise: what is drawn when, what the log and the report say, and that it learns (B13)."""

from __future__ import annotations

import json
import lzma
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lowbits.errors import FormatError, RunError, UnknownNameError
from lowbits.methods import Method, Position, named
from lowbits.methods.gaussws import (
    GaussWS,
    PseudoNoise,
    Regulariser,
    Resample,
    Storage,
    load_ladder,
    noisy,
)
from lowbits.nn import Recipe, convert_
from lowbits.optim import AdamW
from lowbits.study import write_report
from lowbits.study._compare import _jobs_of
from lowbits.study._plan import plan
from lowbits.train import Run, train
from tests.methods.test_contract import data  # noqa: F401  a fixture
from tests.train.tiny import tiny_run


def prepared(method: Method) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64))
    convert_(model, Recipe(), verbose=False)
    method.prepare_(model, 0)
    return model


@pytest.mark.parametrize(("resample", "draws"), [(Resample.MICRO, [0, 1, 2, 3]), (Resample.STEP, [0, 0, 1, 1])])
def test_noise_is_drawn_for_every_micro_batch_or_step(resample: Resample, draws: list[int]) -> None:
    method = GaussWS(resample=resample)
    model = prepared(method)
    seen = []
    for draw in range(4):
        method.before_forward_(model, Position(step=draw // 2, steps=2, draw=draw))
        seen.append(noisy(model)[0].counter[0].item())
    assert seen == draws


def test_values_from_words() -> None:
    method = named("gaussws,b_init=5,noise=uniform,bit_lr=0.01,lean=true,storage=e3m2")
    assert method == GaussWS(b_init=5.0, noise=PseudoNoise.UNIFORM, bit_lr=0.01, lean=True, storage=Storage.E3M2)
    assert named("gaussws,bit_lr=none") == GaussWS()
    with pytest.raises(RunError, match="gaussws: noise cannot be 'pink'; it is rounded_normal, uniform, normal, none"):
        named("gaussws,noise=pink")
    with pytest.raises(RunError, match="gaussws: b_init cannot be 'many'; it is float"):
        named("gaussws,b_init=many")


def test_arms_with_methods_are_runs_with_them(tmp_path: Path) -> None:
    arms = plan(["bf16", "bf16+gaussws,bit_lr=0.1", "w8a8+diffq", "null"], [0, 1])
    assert [(arm.recipe, arm.method) for arm in arms] == [
        ("bf16", ""), ("bf16", "gaussws,bit_lr=0.1"), ("w8a8", "diffq"), ("bf16", "")
    ]  # fmt: skip
    assert arms[1].quantizes == "nothing, with gaussws"
    jobs = _jobs_of(arms, Run(method=GaussWS(b_init=5.0)), tmp_path)
    assert jobs[0].run.method == GaussWS(b_init=5.0)  # what all arms have in common that name none
    assert jobs[1].run.method == GaussWS(bit_lr=0.1) and jobs[1].out.parent.name == "bf16+gaussws,bit_lr=0.1"
    with pytest.raises(UnknownNameError, match="no method is called 'gausws'; did you mean 'gaussws'"):
        plan(["bf16", "bf16+gausws"], [0])


def test_the_report_of_a_run(data: Path, tmp_path: Path) -> None:  # noqa: F811
    run = tiny_run(data, recipe="bf16", steps=6, method=GaussWS(bit_lr=0.1))
    train(run, tmp_path / "bf16+gaussws" / "seed-0")
    (gaussws,) = write_report(tmp_path).arms
    bits = gaussws.method_curves["bits"].mean
    assert len(bits) == 6 and bits[-1] < bits[0] <= 6
    titles = [table["title"] for table in gaussws.method_tables]
    assert titles == ["bits and noise by layer", "bit-width map", "size on the ladder of formats"]
    layers, shares, sizes = gaussws.method_tables
    assert len(layers["rows"]) == 8
    assert all(math.isclose(sum(v or 0 for v in row[1:]), 1.0, rel_tol=1e-6) for row in shares["rows"])
    total = {row[0]: row[3] for row in sizes["rows"]}
    assert total["all"] == sum(total[name] for name in list(total)[:7]) < total["all in bf16"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "bit-width map" in page and 'id="method-blocks at a bound"' in page
    config = json.loads((tmp_path / "bf16+gaussws" / "seed-0" / "config.json").read_text())
    assert config["method"]["name"] == "gaussws" and config["method"]["bit_lr"] == 0.1
    exported(tmp_path / "bf16+gaussws" / "seed-0", total["all"])


def exported(run: Path, total: float) -> None:
    """A finished run leaves a file whose weights have the bytes that the report says, and its loss is in the log."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    (evaluated,) = [line for line in lines if line["kind"] == "eval" and line["step"] == 6]
    assert 0 < abs(evaluated["loss_ladder"] - evaluated["loss_on"]) < 0.05
    path, (*_, checkpoint) = run / "ladder.safetensors", sorted((run / "checkpoints").iterdir())
    with safe_open(path, "pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    assert sum(size for name, size in sizes.items() if name.endswith((".rungs", ".exponents", ".codes"))) == total
    state, before = load_ladder(path), load_file(checkpoint / "model.safetensors")
    assert "lm_head.weight" in state and "lm_head.weight" not in sizes  # tied: stored once
    assert set(state) - {"lm_head.weight"} == {name for name in before if not name.endswith("b_i")}
    for name, tensor in ((name, state[name]) for name in set(state) & set(before)):
        assert torch.allclose(tensor.float(), before[name], rtol=0.26, atol=before[name].abs().max().item() / 8)


def test_a_broken_weight_is_named_in_the_log_on_any_device() -> None:
    method = GaussWS()
    model = prepared(method)
    assert set(method.metrics(model)) == {"bits", "bits, lowest", "bits, highest", "blocks at a bound"}
    model[0].weight.data[3, 40] = math.inf  # type: ignore[index, union-attr]
    with pytest.raises(FormatError, match=r"0: block \(0, 1\)"):
        method.metrics(model)
    without = GaussWS(noise=PseudoNoise.NONE)
    assert without.metrics(prepared(without)) == {} and without.tables(prepared(without)) == ()


def characters(folder: Path) -> Tensor:
    """Tiny Shakespeare as bytes."""
    with lzma.open(folder / "tinyshakespeare" / "input.txt.xz") as file:
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()


def final_loss(text: Tensor, method: Method, steps: int = 300) -> tuple[float, list[float]]:
    """Train a byte model of four layers of width 64; return the validation loss and the mean bits over training."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_layer": 4, "n_embd": 64, "n_head": 4, "vocab_size": 128, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None))
    convert_(model, Recipe(), verbose=False)
    method.prepare_(model, 0)
    optimizer = AdamW(method.param_groups(model, 0.1), lr=3e-3)
    generator, bits = torch.Generator().manual_seed(0), []
    train, held_out = text[:-20_000].clamp(max=127), text[-20_000:].clamp(max=127)
    for step in range(steps):
        starts = torch.randint(len(train) - 64, (16,), generator=generator)
        method.before_forward_(model, Position(step, steps, step))
        with torch.autocast("cpu", torch.bfloat16):
            loss = method.loss(model, torch.stack([train[s : s + 64] for s in starts]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bits.append(method.metrics(model).get("bits", math.nan))
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return method.loss(model, held_out[: 64 * 300].view(300, 64)).item(), bits


@cache
def base_loss(folder: Path) -> float:
    return final_loss(characters(folder), Method())[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "behind"),
    [(GaussWS(), 0.03), (GaussWS(b_init=4.0), 0.06), (GaussWS(b_init=9.0, b_target=9.0), 0.03)],
    ids=["6 to 4", "4", "9"],
)
def test_b13_a_character_model_learns_as_well(shared_data: Path, method: GaussWS, behind: float) -> None:
    """At most 0.03 nats behind bfloat16, which fixed 4 bits miss: 0.01 to 0.04 in four seeds. The bits fall."""
    loss, bits = final_loss(characters(shared_data / "text"), method)
    if method.b_init == 6:
        assert bits[-1] < bits[len(bits) // 2] < 6  # where they begin
    assert math.isfinite(loss) and loss <= base_loss(shared_data / "text") + behind


def test_regularisers_of_the_loss_pull_the_bits() -> None:
    for regulariser in (Regulariser.LOSS, Regulariser.LOSS_BY_SIZE):
        method = GaussWS(regulariser=regulariser, pull=1.0)
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16))
        convert_(model, Recipe(), verbose=False)
        method.prepare_(model, 0)
        method.before_forward_(model, Position(0, 1, 0))
        ids = torch.arange(32).view(2, 16)
        torch.manual_seed(0)
        with_term = method.loss(model, ids)
        torch.manual_seed(0)
        without = GaussWS().loss(model, ids)
        assert with_term.item() - without.item() == pytest.approx(4 * 2.0, abs=1e-4)  # four layers, |6 - 4| each
        with_term.backward()
        assert all(bool((w.b_i.grad > 0).all()) for w in noisy(model))  # type: ignore[union-attr]
