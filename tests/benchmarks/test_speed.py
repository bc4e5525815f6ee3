# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of speed run, keep what they measured, and their tables say what the rows say."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbits.errors import NativeError
from tests.train.tiny import tokens

Run = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repository: Path) -> Run:
    """Return a function that runs a script on the CPU and returns the rows of its results file by key."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))

    def call(name: str, *arguments: str, file: str = "", exits: int = 0) -> dict[str, dict[str, Any]]:
        given = [f"{name}.py", "--device", "cpu", "--repeat", "1", "--results", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", given)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(repository / "benchmarks" / f"{name}.py"), run_name="__main__")
        assert ended.value.code == exits
        (path,) = tmp_path.glob(f"*/{file or name}.json")
        content = json.loads(path.read_text(encoding="utf-8"))
        assert {row["run"] for row in content["rows"]} == set(content["runs"])
        assert all(told["provenance"]["versions"]["torch"] for told in content["runs"].values())
        return {row["key"]: row for row in content["rows"]}

    return call


def test_gemms_are_close_to_float64(run: Run) -> None:
    rows = run("gemm", "--sizes", "64x32x48", "--only", "int8 row", "bf16 torch")
    assert set(rows) == {"64x32x48 bf16 torch", "64x32x48 int8 row, lowbits"}
    for row in rows.values():
        assert 0 < row["error"] < 2**-8
        assert row["tflops"] == pytest.approx(2 * 64 * 32 * 48 / row["ms"] / 1e9)
    assert max(row["of_best"] for row in rows.values()) == 1


def test_a_second_call_adds_to_the_first(run: Run) -> None:
    before = run("gemm", "--sizes", "32x32x32", "--only", "_int_mm")
    after = run("gemm", "--sizes", "32x32x64", "--only", "_int_mm")
    assert set(before) < set(after)
    assert {key: after[key] for key in before} == before
    assert set(run("gemm", "--sizes", "32x32x64", "--only", "bf16 torch", "--fresh")) == {"32x32x64 bf16 torch"}


def test_quantizers_count_the_bytes_that_must_move(run: Run) -> None:
    rows = run("quantize", "--sizes", "64x256", "--recipes", "nvfp4", "fp8_block")
    x = 64 * 256 * 2
    codes, scale = 64 * 256, 4
    assert rows["64x256 int8 row, along k"]["bytes"] == x + codes + 64 * scale
    assert rows["64x256 int8 row, both"]["bytes"] == 2 * x + 2 * codes + (64 + 256) * scale
    assert rows["64x256 fp8 tensor, along r"]["bytes"] == 2 * x + codes + scale
    assert rows["64x256 fp8 1x128, along k"]["bytes"] == x + codes + 64 * 2 * scale
    assert rows["64x256 nvfp4 x along r rotated, pack"]["bytes"] == 2 * x + codes // 2 + codes // 16 + 4
    assert not [key for key in rows if " w" in key]


def test_a_layer_is_compared_with_bf16_of_its_shape(run: Run) -> None:
    rows = run("linear", "--shapes", "32x48", "--tokens", "64", "--arms", "int8_rowwise", "nvfp4")
    base = rows["32x48 eager bf16"]
    for arm in ("int8_rowwise", "nvfp4"):
        row = rows[f"32x48 eager {arm}"]
        assert row["ms_over_bf16"] == pytest.approx(base["ms"] / row["ms"])
        assert (row["advice"] == "leave in bf16") == (row["ms_over_bf16"] < 1)
    assert "native" in rows["32x48 eager int8_rowwise"]["runs"]


TINY_STEP = ("--widths", "256", "--layers", "1", "--length", "16", "--vocabulary", "32", "--warm-up", "1")


def test_arms_of_a_step_start_from_the_same_weights(run: Run) -> None:
    rows = run("train_step", *TINY_STEP, "--arms", "int8_rowwise", "w8a8_faithful")
    assert [row["arm"] for row in rows.values()] == ["bf16", "int8_rowwise", "w8a8_faithful"]
    first = [row["losses"][0] for row in rows.values()]
    assert max(first) - min(first) < 0.01 * min(first)
    assert all(row["losses"][-1] < row["losses"][0] for row in rows.values())
    # 2 x 32 x 256 of embedding and head; four squares and three FFN matrices; three norms.
    assert rows["256, 1 layers, 1 x 16, eager: bf16"]["parameters"] == 2 * 32 * 256 + 4 * 256**2 + 3 * 256 * 704 + 768


def test_blocks_alone_have_no_head(run: Run) -> None:
    rows = run("train_step", "--table", "shapes", "--shapes", "tiny", "--layers", "1", "--length", "16", "--arms",
               "int8_rowwise", file="train_shapes")  # fmt: skip
    assert {row["arm"] for row in rows.values()} == {"bf16", "int8_rowwise"}
    flops = 16 * (6 * 12 * 64**2 + 6 * 16 * 64)
    assert all(row["tflops"] == pytest.approx(flops / row["ms"] / 1e9) for row in rows.values())


def test_an_arm_that_cannot_run_says_so(run: Run) -> None:
    rows = run("train_step", *TINY_STEP, "--arms", "fp8_rowwise_native", exits=1)
    assert rows["256, 1 layers, 1 x 16, eager: fp8_rowwise_native"]["failed"].startswith(NativeError.__name__)
    assert rows["256, 1 layers, 1 x 16, eager: bf16"]["ms"] > 0


def test_native_and_simulated_runs_are_closer_than_seeds(run: Run, tmp_path: Path) -> None:
    data = tokens(tmp_path / "text").folder
    rows = run("train_step", "--curves", "--data", str(data), "--steps", "3", "--curve-model", "32", "64", "2", "1",
               "--curve-batch", "2", "16", "--curve-recipes", "int8_rowwise", file="native_curves")  # fmt: skip
    assert rows["bf16 and again, seed 0"]["largest"] == 0
    assert len(rows["int8_rowwise native, seed 1"]["losses"]) == 3
    same, other = rows["int8_rowwise, native and simulated, seed 0"], rows["int8_rowwise native, seeds 0 and 1"]
    assert same["largest"] < other["largest"] / 10


def test_kernels_are_sorted_by_what_they_do(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    family = runpy.run_path(str(repository / "benchmarks" / "train_step.py"))["family"]
    assert family("nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_TNT") == family("blocks") == family("scaled") == "gemm"
    assert family("void pytorch_flash::flash_bwd_kernel<cutlass::bfloat16_t>") == "attention"
    assert family("triton_red_fused_amax_0") == "compiled"
    assert family("quantize") == "quantize"
    assert family("Memcpy DtoD") == "other"


def test_the_page_shows_what_was_measured(repository: Path, tmp_path: Path) -> None:
    page = runpy.run_path(str(repository / "docs" / "speed_tables.py"))
    steps = page["TABLES"]["speed steps 2048"]
    steps.func.__globals__["RESULTS"] = tmp_path / "benchmarks" / "results"
    assert steps() == page["TABLES"]["speed gemm"]() == "Not measured yet.\n"
    file = tmp_path / "benchmarks" / "results" / "nvidia-h200" / "train_step.json"
    file.parent.mkdir(parents=True)
    told = {"provenance": {"versions": {"torch": "2.11"}, "commit": "abc"}, "ceilings": {"copy_gb_per_s": 4200.0}}
    rows = [
        {"key": "2048, ...: bf16", "arm": "bf16", "mode": "compiled", "ms": 100.0, "tokens_per_second": 9e4,
         "of_bf16_gemm": 0.5, "peak_gib": 28.0, "run": "1"},
        {"key": "2048, ...: fp8_rowwise", "arm": "fp8_rowwise", "mode": "compiled", "ms": 80.0, "over_bf16": 1.25,
         "tokens_per_second": 1.1e5, "of_bf16_gemm": 0.6, "peak_gib": 21.0, "memory_over_bf16": 0.75, "run": "1"},
        {"key": "2048, ...: fp8_rowwise", "arm": "fp8_rowwise", "mode": "eager", "ms": 100.0, "run": "1"},
        {"key": "2048, ...: other", "arm": "torchao fp8 tensorwise", "mode": "compiled", "ms": 77.0, "over_bf16": 1.3,
         "tokens_per_second": 1.2e5, "of_bf16_gemm": 0.6, "run": "1"},
        {"key": "2048, ...: w8a8_faithful", "arm": "w8a8_faithful", "mode": "compiled", "ms": 90.0, "over_bf16": 1.1,
         "tokens_per_second": 1e5, "of_bf16_gemm": 0.6, "memory_over_bf16": 0.8, "run": "1"},
        {"key": "2048, ...: w8a8_saved8", "arm": "w8a8_saved8", "mode": "compiled", "ms": 90.0, "over_bf16": 1.1,
         "tokens_per_second": 1e5, "of_bf16_gemm": 0.6, "memory_over_bf16": 0.7, "run": "1"},
        {"key": "2048, ...: peer", "failed": "ImportError: no", "run": "1"},
    ]  # fmt: skip
    file.write_text(json.dumps({"runs": {"1": told}, "rows": rows}), encoding="utf-8")
    checks = page["TABLES"]["speed checks"]()
    assert (
        "| fp8_rowwise, width 2048: tokens/s over bf16, beside torchao fp8 tensorwise | 1.25 | >= 1.30 | **no** |"
        in checks
    )
    assert "| w8a8_faithful, width 2048: peak memory over bf16 | 0.80 | <= 0.75 | **no** |" in checks
    assert "| w8a8_saved8, width 2048: peak memory over bf16 | 0.70 | <= 0.75 | yes |" in checks
    assert "| fp8_rowwise | 110,000 | 1.25 | 21.0 | 0.75 | 60% | 1.25 |" in steps()
    assert "torch 2.11; commit abc; file: `benchmarks/results/nvidia-h200/train_step.json`" in steps()


def test_sizes_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    measuring = runpy.run_path(str(repository / "benchmarks" / "measuring.py"))
    assert measuring["sizes"](["16x32"], 2) == [(16, 32)]
    with pytest.raises(SystemExit, match="2 numbers with an x between them, got 16x32x8"):
        measuring["sizes"](["16x32x8"], 2)
