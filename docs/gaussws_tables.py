# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/papers/gaussian-weight-sampling.md, from the results files of its experiments."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
FORMATS = ("FP8 e4m3", "FP6 e3m2", "FP6 e2m3", "FP4 e2m1")
ON_CPU = ("lm_cpu", "instructions")
ABSENT = "Not measured yet.\n"


def found(name: str) -> dict[str, Any] | None:
    """A results file; None while there is none."""
    files = sorted(RESULTS.glob(f"{'cpu' if name in ON_CPU else 'nvidia'}-*/gaussws_{name}.json"))
    if not files:
        return None
    return {
        **json.loads(files[0].read_text(encoding="utf-8")),
        "path": f"benchmarks/results/{files[0].parent.name}/{files[0].name}",
    }


def table(header: Sequence[str], rows: Iterable[Sequence[str]], rule: str = "---") -> str:
    lines = [header, [rule] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def origin(told: dict[str, Any]) -> str:
    """Where a results file comes from."""
    made = told["provenance"]
    return f"{made['device']}, torch {made['versions']['torch']}; file: `{told['path']}`."


WHERE = {
    "lm_cpu": "LM, CPU", "speed_bits": "H200", "speed_kernels": "H200", "speed_step": "H200", "speed_repeat": "H200",
    "lm_gpt2-small": "GPT-2 small, H200", "lm_llama-134m": "Llama-134M, H200",
}  # fmt: skip


def checks() -> str:
    """Every claim that was checked, and whether it holds."""
    rows = [
        [where, c["id"], c["statement"], c["measured"], "yes" if c["holds"] else "**no**"]
        for name, where in WHERE.items()
        for c in (found(name) or {"checks": []})["checks"]
        if c["statement"].rpartition(": ")[2] != "for comparison"
    ]
    return table(["where", "check", "claim", "measured", "holds"], rows)


def losses(runs: dict[str, list[dict[str, float]]]) -> str:
    """Every arm: loss by seed, gap to bf16, bits, and what casts add, in thousandths of a nat."""
    base = [row["loss"] for row in runs["bf16"]]
    rows = []
    for name, by_seed in runs.items():
        gap = fmean(row["loss"] - b for row, b in zip(by_seed, base, strict=True))
        bits = f"{fmean(row['bits'] for row in by_seed):.2f}" if "bits" in by_seed[0] else "-"
        costs = [f"{1e3 * fmean(row[fmt] - row['loss'] for row in by_seed):+.2f}" for fmt in FORMATS]
        ladder = "-"
        if "ladder by block" in by_seed[0]:
            cost = 1e3 * fmean(row["ladder by block"] - row["loss"] for row in by_seed)
            ladder = f"{cost:+.2f} at {fmean(row['bits a weight, by block'] for row in by_seed):.2f} bits"
        rows.append(
            [f"`{name}`", " ".join(f"{row['loss']:.4f}" for row in by_seed), f"{gap:+.4f}", bits, *costs, ladder]
        )
    header = ["arm", "validation loss by seed", "gap to bf16", "mean bits at the end", *FORMATS, "own ladder"]
    return table(header, rows)


def lm_cpu() -> str:
    """The small language model."""
    told = found("lm_cpu")
    if told is None:
        return ABSENT
    made = told["setting"]
    words = (
        f"{made['parameters']:,} parameters, {made['steps']} steps of {made['tokens_a_step']} tokens; standard "
        f"deviation of the bf16 runs {made['spread']:.4f}. Casts: loss added, in thousandths of a nat, mean of the "
        "seeds. "
    )
    return f"{losses(told['runs'])}\n{words}{origin(told)}\n"


def lm_gpu(name: str) -> str:
    """A larger model on the GPU."""
    told = found(f"lm_{name}")
    if told is None or not told["costs"]:
        return ABSENT
    run = told["run"]
    size, vocabulary = run["batch"] * run["length"], run["vocabulary"]
    words = f"{run['steps']} steps of {size:,} tokens, of {vocabulary:,} different ones; casts as above. "
    return f"{losses(told['costs'])}\n{words}{origin(told)}\n"


def kernels() -> str:
    """Time and bandwidth of the kernels, beside the casts that autocast makes in their place."""
    told = found("speed_kernels")
    if told is None:
        return ABSENT
    part = told["kernels"]
    rows = [
        [name, f"{1e3 * row['forward_ms']:.1f}", f"{row['forward_tb_s']:.2f}", f"{1e3 * row['cast_ms']:.1f}",
         f"{1e3 * row['backward_ms']:.1f}", f"{row['backward_over_forward']:.2f}", f"{1e3 * row['cast_back_ms']:.1f}"]
        for name, row in part["layers"].items()
    ]  # fmt: skip
    header = ["weight", "forward, us", "TB/s", "a cast, us", "backward, us", "over forward", "a cast back, us"]
    tiles = "; ".join(
        f"{name}: {1e3 * row['forward_ms']:.1f} and {1e3 * row['backward_ms']:.1f} us"
        for name, row in part["tiles"].items()
    )
    words = f"Elements {part['chosen']} are what is launched; others, on a layer of 5,632 x 2,048: {tiles}. "
    if "randn_over_ours" in part:
        words += f"By torch.randn {part['randn_over_ours']:.1f} times as long. "
    return f"{table(header, rows, '---:')}\n{words}{origin(told)}\n"


def step() -> str:
    """Overhead of a whole step."""
    told = found("speed_step")
    if told is None:
        return ABSENT
    rows = (
        [name, f"{row['bf16_ms']:.1f}", f"{row['ms']:.1f}", f"{100 * row['overhead']:+.2f} %",
         " to ".join(f"{100 * q:+.2f}" for q in row["overhead_quartiles"])]
        for name, row in told["step"]["arms"].items()
    )  # fmt: skip
    header = ["arm", "bf16, ms a step", "arm, ms a step", "overhead, median", "quartiles, %"]
    return f"{table(header, rows)}\n{setting(told)}{origin(told)}\n"


def setting(told: dict[str, Any]) -> str:
    """What was timed."""
    made = told["step"]["setting"]
    how = "compiled blocks" if made["compiled"] else "eager"
    return (
        f"{made['model']}, {made['layers']} blocks, {made['parameters'] / 1e9:.2f} B parameters, {made['tokens']:,} "
        f"tokens a step, {how}. "
    )


def memory() -> str:
    """Peak memory of a step."""
    told = found("speed_step")
    if told is None:
        return ABSENT
    part = told["step"]
    rows = (
        [name, f"{peak / 2**30:.2f}", f"{part['bytes_a_parameter'].get(name, 0.0):+.2f}"]
        for name, peak in part["peak_bytes"].items()
    )
    words = f"{part['setting'].get('weights with noise', 0) / 1e9:.2f} B weights have noise. "
    return f"{table(['arm', 'peak, GiB', 'bytes a weight above bf16'], rows)}\n{words}{origin(told)}\n"


def instructions() -> str:
    """Instructions and bytes a weight, and what they would take."""
    told = found("instructions")
    if told is None:
        return ABSENT
    rows = [
        [name.replace(", add_noise", ", forward").replace(", gradients", ", backward"), f"{row['all']:.1f}",
         f"{row['integer']:.1f}", f"{row['bytes']:.0f}", f"{row['arithmetic_ps']:.2f}", f"{row['memory_ps']:.2f}"]
        for name, row in told["rows"].items()
    ]  # fmt: skip
    header = ["kernel", "instructions", "on the integer pipe", "bytes", "arithmetic, ps", "memory, ps"]
    words = (
        f"A weight of 5,632 x 2,048, machine code of {told['target']}; 132 multiprocessors at {told['ghz']} GHz, "
        f"copies at {told['copy_tb_s']} TB/s: a model, not a measurement. Triton "
    )
    versions = f"{told['provenance']['versions']['triton']}; file: `{told['path']}`."
    return f"{table(header, rows, '---:')}\n{words}{versions}\n"


TABLES = {
    "gaussws checks": checks,
    "gaussws lm": lm_cpu,
    "gaussws gpt2": lambda: lm_gpu("gpt2-small"),
    "gaussws llama": lambda: lm_gpu("llama-134m"),
    "gaussws instructions": instructions,
    "gaussws kernels": kernels,
    "gaussws step": step,
    "gaussws memory": memory,
}
