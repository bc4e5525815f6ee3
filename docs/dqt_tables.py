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
    "cpu": "CPU", "gpu": "H200", "memory": "memory, H200", "pretrain": "30B and more, H200",
    "update_time": "update, H200", "layer_time": "layer, H200", "ranks": "two H200",
}  # fmt: skip
NONE = "Not measured yet.\n"


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
    told = found.get("measured", found["provenance"])
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
    """Every run of the 130M shape."""
    found = results("gpu")
    if found is None:
        return NONE
    arms: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for key, run in found["runs"].items():
        name, lr, _, steps = key.split()
        arms.setdefault((name, lr, steps), []).append(run)
    rows = []
    for (name, lr, steps), runs in arms.items():
        one = {key: mean(run[key] for run in runs) for key in runs[0] if key in runs[-1]}
        rows.append([
            f"`{name}`", lr, steps, " ".join(f"{run['val']:.3f}" for run in runs), f"{one['val_ternary']:.3f}",
            f"{one['changed_at_peak']:.3%}", f"{one['changed_at_end']:.3%}", f"{one['tokens_per_second']:,.0f}",
            f"{one['resident_bytes'] / 2**30:.2f} / {one['peak_bytes'] / 2**30:.2f}",
        ])  # fmt: skip
    header = ["arm", "lr", "steps", "validation loss by seed", "with ternary weights", "changed at peak", "at the end",
              "tokens/s", "GiB between steps / at the peak"]  # fmt: skip
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
    return f"{table(header, rows)}\n{origin(found)}"


def largest() -> str:
    """The largest model of each way, and the run of 50 steps."""
    found, run = results("largest"), results("pretrain")
    text = ""
    if found is not None:
        rows = [
            [name, str(row["layers"]), f"{row['parameters'] / 1e9:.1f}B" if row["layers"] else "-",
             f"{row['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in row else row.get("not measured", "-")]
            for name, row in found["ways"].items()
        ]  # fmt: skip
        text += (
            f"{table(['weights, optimizer', 'layers of width 8192', 'parameters', 'peak GiB'], rows)}\n{origin(found)}"
        )
    if run is not None:
        losses = " ".join(f"{loss:.2f}" for loss in run["losses"][::5])
        text += (
            f"\n{run['parameters'] / 1e9:.1f}B parameters, {run['way']}, {len(run['losses'])} steps of "
            f"{run['sequences'] * run['length']:,} tokens, learning rate {run['lr']:g}; every fifth loss: {losses}. "
            f"{mean(run['step_seconds'][2:]):.1f} s a step, peak {run['peak_bytes'] / 2**30:.1f} GiB. {origin(run)}"
        )
    return text or NONE


def speed() -> str:
    """Milliseconds of updates and of a layer."""
    update, layer = results("update_time"), results("layer_time")
    text = ""
    if update is not None:
        rows = [[name, f"{row['median_ms']:.2f}", f"{row['lowest_ms']:.2f} to {row['highest_ms']:.2f}"]
                for name, row in update["ways"].items()]  # fmt: skip
        text += f"{table(['update of 1B parameters', 'ms', 'lowest to highest'], rows)}\n{origin(update)}\n"
    if layer is not None:
        rows = [[name, f"{row['forward_ms']:.2f}", f"{row['both_ms']:.2f}"] for name, row in layer["ways"].items()]
        header = ["layer of 4096 x 11008, 8192 tokens", "forward, ms", "with backward, ms"]
        text += f"{table(header, rows)}\n{origin(layer)}"
    return text or NONE


TABLES: dict[str, Callable[[], str]] = {
    "dqt checks": checks,
    "dqt cpu": cpu,
    "dqt gpu": gpu,
    "dqt memory": memory,
    "dqt largest": largest,
    "dqt speed": speed,
}
"""What a page may name."""
