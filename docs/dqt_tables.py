# SPDX-License-Identifier: Apache-2.0
"""Tables of docs/papers/direct-quantized-training.md, from results files; `docs/generate.py` writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PLACES = {
    "cpu": "CPU", "gpu": "H200", "gpu_speed": "H200", "memory": "memory, H200", "pretrain": "30B and more, H200",
    "update_time": "update, H200", "layer_time": "layer, H200", "ranks": "two H200",
}  # fmt: skip
NONE = "Not measured yet.\n"
SEARCHED = "100"  # the seed of runs that searched for rates


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def results(name: str) -> dict[str, Any] | None:
    """A results file of experiments/direct_quantized_training; None while there is none."""
    files = sorted((ROOT / "benchmarks" / "results").glob(f"*/dqt_{name}.json"))
    if not files:
        return None
    return {**json.loads(files[0].read_text(encoding="utf-8")), "path": files[0].relative_to(ROOT).as_posix()}


def origin(found: dict[str, Any]) -> str:
    told = found["provenance"]
    return f"{told['device']}, torch {told['versions']['torch']}; file: `{found['path']}`.\n"


def checks() -> str:
    """Every claim that was checked."""
    rows = [
        [where, c["id"], c["statement"], c["measured"], "yes" if c["holds"] else "**no**"]
        for name, where in PLACES.items()
        for c in (results(name) or {"checks": []})["checks"] if c["id"] != "best"
    ]  # fmt: skip
    return table(["where", "check", "claim", "measured", "holds"], rows) if rows else NONE


def cpu() -> str:
    """Every arm of the CPU runs, by seed."""
    found = results("cpu")
    if found is None:
        return NONE
    rows = []
    for name, run in found["runs"].items():
        arm, lr = name.split()
        codes = "-" if run["lr_in_codes"] is None else f"{run['lr_in_codes']:.3g}"
        rows.append([
            f"`{arm}`", lr, codes, " ".join(f"{v:.3f}" for v in run["val"]),
            f"{mean(run['val']):.3f} ± {stdev(run['val']):.3f}", f"{mean(run['val_ternary']):.3f}",
            f"{run['changed_at_peak']:.3%}", f"{run['changed_at_end']:.3%}",
        ])  # fmt: skip
    header = ["arm", "lr", "in codes", "validation loss by seed", "mean", "with ternary weights", "changed at peak",
              "at the end"]  # fmt: skip
    return f"{table(header, rows)}\n{origin(found)}"


def gpu() -> str:
    """Every run of the 130M shape, those that searched for rates too."""
    found = results("gpu")
    if found is None:
        return NONE
    arms: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for key, run in found["runs"].items():
        name, lr, seed, steps = key.split()
        arms.setdefault((name, lr, steps + ", search" * (seed == SEARCHED)), []).append(run)
    rows = []
    for (name, lr, steps), runs in sorted(arms.items(), key=lambda item: ("search" in item[0][2], item[0])):
        one = {key: mean(run[key] for run in runs) for key in runs[0] if key in runs[-1]}
        rows.append([
            f"`{name}`", lr, steps, " ".join(f"{run['val']:.3f}" for run in runs), f"{one['val_ternary']:.3f}",
            f"{one['changed_at_peak']:.3%}", f"{one['changed_at_end']:.3%}",
        ])  # fmt: skip
    header = ["arm", "lr", "steps", "validation loss by seed", "with ternary weights", "changed at peak", "at the end"]
    setting = found["setting"]
    told = f"{setting['batch']} sequences of {setting['length']} tokens a step. "
    return f"{table(header, rows)}\n{told}{origin(found)}"


def gpu_speed() -> str:
    """Memory and speed of the 130M shape, an arm at a time."""
    found = results("gpu_speed")
    if found is None:
        return NONE
    rows = [
        [f"`{name}`", f"{row['tokens_per_second']:,.0f}", f"{row['step_ms']:.1f}",
         *(f"{row[key] / 2**20:,.0f}" for key in ("weight_bytes", "resident_bytes", "peak_bytes"))]
        for name, row in found["ways"].items()
    ]  # fmt: skip
    header = ["arm", "tokens/s", "ms a step", "MiB of linear weights", "MiB between steps", "MiB at the peak"]
    return f"{table(header, rows)}\n{origin(found)}"


def memory() -> str:
    """Bytes a parameter, ours and peers'."""
    found = results("memory")
    if found is None:
        return NONE
    rows = [
        [name, row.get("not measured", f"{row.get('bytes_a_parameter', 0):.2f}"),
         f"{row['resident_bytes_a_parameter']:.2f}" if "resident_bytes_a_parameter" in row else "-"]
        for name, row in found["ways"].items()
    ]  # fmt: skip
    header = ["weights, optimizer", "bytes a parameter at the peak of a step", "between steps"]
    size = max((row.get("parameters", 0) for row in found["ways"].values()), default=0) / 1e9
    return f"{table(header, rows)}\n{size:.1f} billion parameters; {origin(found)}"


def largest() -> str:
    """The largest model of each way, and the runs of 50 steps."""
    found, runs = results("largest"), results("pretrain")
    text = ""
    if found is not None:
        rows = []
        for name, row in found["ways"].items():
            if "layers" not in row:
                rows.append([name, "-", row.get("not measured", "-"), "-", "-"])
                continue
            more = "" if row["found"] else " or more"
            rows.append([name, f"{row['layers']}{more}", f"{row['parameters'] / 1e9:.1f}B{more}",
                         f"{row['peak_bytes'] / 2**30:.1f}", f"{row['step_seconds']:.1f}"])  # fmt: skip
        header = ["weights, optimizer", "layers of width 8192", "parameters", "peak GiB", "s a step"]
        tokens = found["setting"]["tokens"] - 1
        text += f"{table(header, rows)}\nSteps of {tokens:,} tokens, blocks recomputed. {origin(found)}"
    for name, run in (runs or {"ways": {}})["ways"].items():
        seconds = mean(run["step_seconds"][2:] or run["step_seconds"])
        peak, built = run["peak_bytes"] / 2**30, run["built_peak_bytes"] / 2**30
        text += (
            f"\n**{name}**: {run['parameters']:,} parameters, {len(run['losses'])} steps of "
            f"{run['sequences'] * run['length']:,} tokens, learning rate {run['lr']:g} of codes, {run['other_lr']:g} "
            f"of the rest; {seconds:.1f} s a step, peak {peak:.1f} GiB; made in {run['built_in_seconds']:.0f} s, peak "
            f"{built:.1f} GiB. Every fifth loss: {' '.join(f'{loss:.2f}' for loss in run['losses'][::5])}.\n"
        )
    return text + (f"\n{origin(runs)}" if runs is not None else "") or NONE


def summary() -> str:
    """The largest models, in a sentence."""
    found, runs = results("largest"), results("pretrain")
    if found is None or runs is None:
        return NONE
    known = {name: row["parameters"] / 1e9 for name, row in found["ways"].items() if "parameters" in row}
    sizes = [f"{name} {known[name]:.1f}" for name in sorted(known, key=known.__getitem__, reverse=True)]
    trained = max(run["parameters"] for run in runs["ways"].values()) / 1e9
    return (
        f"The largest Llama whose full training steps one H200 holds, billions of parameters: {'; '.join(sizes)}. Two "
        f"steps each; {trained:.1f} were trained for 50 steps. `python -m experiments.direct_quantized_training "
        f"largest`, [more](docs/papers/direct-quantized-training.md). {origin(found)}"
    )


def speed() -> str:
    """Milliseconds of updates and of a layer."""
    update, layer = results("update_time"), results("layer_time")
    text = ""
    if update is not None:
        rows = [[name, f"{row['median_ms']:.2f}", f"{row['lowest_ms']:.2f} to {row['highest_ms']:.2f}"]
                for name, row in update["ways"].items()]  # fmt: skip
        size = update["setting"]["parameters"] / 1e9
        text += f"{table([f'update of {size:.2f}B parameters', 'ms', 'lowest to highest'], rows)}\n{origin(update)}\n"
    if layer is not None:
        rows = [[name, f"{row['forward_ms']:.2f}", f"{row['both_ms']:.2f}"] for name, row in layer["ways"].items()]
        told = layer["setting"]
        header = [f"layer of {told['in']} x {told['out']}, {told['tokens']} tokens", "forward, ms", "with backward, ms"]
        text += f"{table(header, rows)}\n{origin(layer)}"
    return text or NONE


TABLES: dict[str, Callable[[], str]] = {
    "dqt checks": checks,
    "dqt cpu": cpu,
    "dqt gpu": gpu,
    "dqt gpu speed": gpu_speed,
    "dqt memory": memory,
    "dqt largest": largest,
    "dqt speed": speed,
    "dqt summary": summary,
}
"""What a page may name."""
