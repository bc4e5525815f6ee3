# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/speed.md, for `docs/generate.py`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
DEVICE = "nvidia-h200"
Row = dict[str, Any]
NOT_YET = "Not measured yet.\n"
SIZES = ("16384x2048x5632", "16384x4096x14336", "8192x8192x8192")


def results(name: str, device: str = DEVICE) -> tuple[list[Row], str]:
    """The rows that were measured, and a line that says where; nothing while there is no file."""
    path = RESULTS / device / f"{name}.json"
    if not path.is_file():
        return [], ""
    found = json.loads(path.read_text(encoding="utf-8"))
    told = [run["provenance"] for run in found["runs"].values()]
    versions, commits = ({v: 0 for v in values} for values in (
        (f"torch {t['versions']['torch']}" for t in told), (str(t["commit"]) for t in told),
    ))  # fmt: skip
    rates = [rate for run in found["runs"].values() if (rate := run["ceilings"].get("copy_gb_per_s"))]
    span = " to ".join(dict.fromkeys(f"{rate:,.0f}" for rate in (min(rates), max(rates)))) if rates else ""
    copy = f" A copy reached {span} GB/s." if rates else ""
    file = path.relative_to(RESULTS.parents[1]).as_posix()
    words = f"{', '.join(versions)}; commit {', '.join(commits)}; file: `{file}`.{copy}"
    return [row for row in found["rows"] if "failed" not in row], words


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def crossed(rows: list[Row], words: str, columns: Sequence[str], show: Callable[[Row], str]) -> str:
    """A table of arms by sizes, from rows whose keys are `size arm`."""
    by = {tuple(row["key"].split(" ", 1)): row for row in rows}
    known = [size for size in columns if any(size == one for one, _ in by)]
    if not known:
        return NOT_YET
    arms = dict.fromkeys(arm for size, arm in by if size in known)
    lines = [[arm, *(show(by[size, arm]) if (size, arm) in by else "-" for size in known)] for arm in arms]
    return f"{table(['', *known], lines)}\n{words}\n"


def gemms() -> str:
    """TFLOP/s of every GEMM, and its share of the fastest of that size."""
    rows, words = results("gemm")
    return crossed(rows, words, SIZES, tera)


def cpu_gemms() -> str:
    """The same on a CPU."""
    rows, words = results("gemm", "cpu-x86_64")
    return crossed(rows, words, list(dict.fromkeys(row["size"] for row in rows)), tera)


def tera(row: Row) -> str:
    form = ",.0f" if row["tflops"] >= 10 else ".2f"
    return f"{format(row['tflops'], form)} ({row.get('of_best', 0):.0%})"


def quantizers() -> str:
    """Milliseconds and TB/s of every quantizer."""
    rows, words = results("quantize")
    columns = dict.fromkeys(row["size"] for row in rows)
    return crossed(rows, words, list(columns), lambda row: f"{row['ms']:.3f} ms, {row['gb_per_s'] / 1000:.2f} TB/s")


def layers(mode: str) -> str:
    """Times of bf16 over times of a recipe, layer by layer."""
    rows, words = results("linear")
    rows = [row for row in rows if row["mode"] == mode]
    if not rows:
        return NOT_YET
    by = {tuple(row["key"].split(f" {mode} ")): row for row in rows}
    shapes, arms = (list(dict.fromkeys(key[i] for key in by)) for i in (0, 1))
    others = [arm for arm in arms if arm != "bf16"]
    lines = [[shape, f"{by[shape, 'bf16']['ms']:.2f}", *(ratio(by.get((shape, arm)), mode) for arm in others)]
             for shape in shapes if (shape, "bf16") in by]  # fmt: skip
    return f"{table(['layer, inputs x outputs', 'bf16, ms', *others], lines)}\n{words}\n"


def ratio(row: Row | None, mode: str) -> str:
    """Compiled, the device decides; eagerly, whichever of host and device is slower."""
    if row is None:
        return "-"
    keys = ("device_ms_over_bf16", "ms_over_bf16") if mode == "compiled" else ("ms_over_bf16",)
    value = next((row[key] for key in keys if key in row), None)
    return "-" if value is None else f"{value:.2f}" + (" leave in bf16" if value < 1 else "")


def steps(width: str) -> str:
    """Whole training steps at one width: speed, memory, and what eager mode costs."""
    rows, words = results("train_step")
    rows = [row for row in rows if row["key"].startswith(f"{width},")]
    compiled, eager = ({row["arm"]: row for row in rows if row["mode"] == mode} for mode in ("compiled", "eager"))
    if not compiled:
        return NOT_YET
    lines = [
        [arm, f"{row['tokens_per_second']:,.0f}", shown(row, "over_bf16"), shown(row, "peak_gib", ".1f"),
         shown(row, "memory_over_bf16"), f"{row['of_bf16_gemm']:.0%}",
         f"{eager[arm]['ms'] / row['ms']:.2f}" if arm in eager else "-"]
        for arm, row in compiled.items()
    ]  # fmt: skip
    header = ["", "tokens/s", "over bf16", "peak GiB", "of bf16's", "of bf16 GEMM", "eager / compiled, time"]
    return f"{table(header, lines)}\n{words}\n"


def summary() -> str:
    """Whole compiled training steps at both widths, in a sentence."""
    rows, words = results("train_step")
    by = {(row["key"].split(",")[0], row["arm"]): row for row in rows if row["mode"] == "compiled"}
    widths, arms = (list(dict.fromkeys(key[i] for key in by)) for i in (0, 1))
    arms.sort(key=lambda arm: by.get((widths[-1], arm), {}).get("over_bf16") or 0.0, reverse=True)
    told = [
        f"`{arm}` {' and '.join(shown(by.get((width, arm), {}), 'over_bf16') for width in widths)}"
        for arm in arms if arm != "bf16"
    ]  # fmt: skip
    where = f"Speed of a training step over bf16's in the same run on one H200, at widths {' and '.join(widths)}"
    return f"{where}: {', '.join(told)}; `python benchmarks/train_step.py`, [more](docs/speed.md). {words}\n"


def shown(row: Row, key: str, form: str = ".2f") -> str:
    return format(row[key], form) if row.get(key) is not None else "-"


def shapes() -> str:
    """A few blocks of every size: tokens a second over bf16's."""
    rows, words = results("train_shapes")
    if not rows:
        return NOT_YET
    by = {(row["key"].split(",")[0], row["arm"]): row for row in rows if row["mode"] == "compiled"}
    arms = dict.fromkeys(arm for _, arm in by if arm != "bf16")
    names = dict.fromkeys(name for name, _ in by)
    lines = [[name, shown(by[name, "bf16"], "tokens_per_second", ",.0f"),
              *(ratio(renamed(by.get((name, arm))), "eager") for arm in arms)]
             for name in names if (name, "bf16") in by]  # fmt: skip
    return f"{table(['blocks of', 'bf16, tokens/s', *arms], lines)}\n{words}\n"


def renamed(row: Row | None) -> Row | None:
    return None if row is None else {"ms_over_bf16": row["over_bf16"]}


def curves() -> str:
    """How far native, simulated and differently seeded runs are apart."""
    rows, words = results("native_curves")
    rows = [row for row in rows if "largest" in row]
    if not rows:
        return NOT_YET
    lines = [[row["key"], *(f"{row[key]:.4f}" for key in ("largest", "mean", "tail"))] for row in rows]
    return f"{table(['two runs', 'largest distance', 'mean', 'of the last steps'], lines)}\n{words}\n"


# --- what the figures have to be -------------------------------------------------------------------------------------

Check = tuple[str, float, str, float]  # what, measured, `>=` or `<=`, limit


def step_checks(width: str, faster: dict[str, float], slower: dict[str, float]) -> list[Check]:
    """Whole compiled steps against bf16 of the same run, in tokens a second or in time."""
    rows, _ = results("train_step")
    of = {row["arm"]: row for row in rows if row["key"].startswith(f"{width},") and row["mode"] == "compiled"}
    eager = {row["arm"]: row for row in rows if row["key"].startswith(f"{width},") and row["mode"] == "eager"}
    found: list[Check] = [
        (f"{arm}, width {width}: tokens/s over bf16", of[arm]["over_bf16"], ">=", limit)
        for arm, limit in faster.items() if arm in of
    ]  # fmt: skip
    for better, than in (
        ("fp8_rowwise", "torchao fp8 tensorwise"), ("fp8_rowwise_fast", "torchao fp8 tensorwise"),
        ("fp8_tensorwise", "fp8_rowwise"),
    ):  # fmt: skip
        if better in of and than in of and of[better]["run"] == of[than]["run"]:
            what = f"{better}, width {width}: tokens/s over bf16, beside {than}"
            found.append((what, of[better]["over_bf16"], ">=", of[than]["over_bf16"]))
    for arm, limit in slower.items():
        if arm in of:
            found.append((f"{arm}, width {width}: time over bf16", 1 / of[arm]["over_bf16"], "<=", limit))
    for arm in ("w8a8_faithful", "w8a8_saved8"):  # inputs of linear layers in 8 bits, and all that is saved
        if width == "2048" and "memory_over_bf16" in of.get(arm, {}):
            found.append((f"{arm}, width 2048: peak memory over bf16", of[arm]["memory_over_bf16"], "<=", 0.75))
    if width == "4096":
        names = [arm for arm in eager if arm in of and "torchao" not in arm]
        found += [
            (f"{a}, width 4096: eager over compiled, time", eager[a]["ms"] / of[a]["ms"], "<=", 1.5) for a in names
        ]
    return found


def other_checks() -> list[Check]:
    """The slowest of NVFP4's quantizers on activations, and curves."""
    found: list[Check] = []
    rates = {row["key"]: row["gb_per_s"] / 1000 for row in results("quantize")[0] if " nvfp4 " in row["key"]}
    rates = {key: rate for key, rate in rates.items() if key.startswith("16384x") and "torchao" not in key}
    if rates:
        slowest = min(rates, key=lambda key: rates[key])
        found.append((f"slowest NVFP4 kernel ({slowest}): TB/s", rates[slowest], ">=", 2.5))
    apart = {row["key"]: row["tail"] for row in results("native_curves")[0] if "tail" in row}
    for key, value in apart.items():
        name = key.split(",")[0]
        seeds = [other for words, other in apart.items() if words.startswith(f"{name} native, seeds")]
        if "native and simulated" in key and seeds:
            found.append((f"{key}: distance of the last losses, beside other seeds'", value, "<=", max(seeds)))
    return found


def checks() -> str:
    """What was demanded before anything was measured."""
    found = [
        *step_checks("2048", {"fp8_block": 1.15, "int8_rowwise": 1.10}, {"nvfp4": 1.7}),
        *step_checks("4096", {"fp8_block": 1.30, "int8_rowwise": 1.25}, {"nvfp4": 1.35}),
        *other_checks(),
    ]
    lines = []
    for what, value, relation, limit in found:
        form = ".4f" if "distance" in what else ".2f"
        holds = value >= limit if relation == ">=" else value <= limit
        lines.append([what, format(value, form), f"{relation} {limit:{form}}", "yes" if holds else "**no**"])
    return table(["", "measured", "demanded", "holds"], lines) if lines else NOT_YET


def saved() -> str:
    """What activations saved in 8 bits cost: each recipe's losses, beside the first recipe's of the same seed."""
    rows, words = results("saved_activations", "cpu-x86_64")
    rows = [row for row in rows if "loss" in row]
    if not rows:
        return NOT_YET
    first, lines = rows[0]["arm"], []
    base = {row["seed"]: row["loss"] for row in rows if row["arm"] == first}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of = [row for row in rows if row["arm"] == arm]
        apart = [row["loss"] - base[row["seed"]] for row in of]
        error, share = (statistics.fmean(row[key] for row in of) for key in ("relative_error", "saved_over_first"))
        losses = " ".join(f"{row['loss']:.4f}" for row in of)
        lines.append([f"`{arm}`", losses, f"{statistics.fmean(apart):+.4f}", f"{error:.4f}", f"{share:.2f}"])
    heads = ["recipe", "loss, by seed", f"beside `{first}`", "error of the gradient", "bytes saved"]
    told = f"{rows[0]['model']}, {rows[0]['steps']} steps. {words}"
    return f"{table(heads, lines)}\n\n{told}\n"


def cpu_layers() -> str:
    """int8 on a CPU: the layers of `make bench`."""
    rows, words = results("linear", "cpu-x86_64")
    lines = [[row["key"], f"{row['ms']:.2f}", ratio(row, "eager")] for row in rows]
    return f"{table(['layer, mode, recipe', 'ms', 'over bf16'], lines)}\n{words}\n" if lines else NOT_YET


TABLES: dict[str, Callable[[], str]] = {
    "speed gemm": gemms,
    "speed quantize": quantizers,
    "speed linear compiled": partial(layers, "compiled"),
    "speed linear eager": partial(layers, "eager"),
    "speed steps 2048": partial(steps, "2048"),
    "speed steps 4096": partial(steps, "4096"),
    "speed checks": checks,
    "speed summary": summary,
    "speed shapes": shapes,
    "speed curves": curves,
    "speed saved": saved,
    "speed cpu": cpu_layers,
    "speed cpu gemm": cpu_gemms,
}
