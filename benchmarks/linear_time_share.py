# SPDX-License-Identifier: Apache-2.0
"""Which share of a GPT-2 block's time do its linear layers take, and how does it move with width and length?

One block, forward and backward, bf16, batch 32 or what fits, after one pass of warm-up; total device time by family of
operations over the repeats. On a CPU a small part of the grid runs.

    python benchmarks/linear_time_share.py [--sizes gpt2-small ...] [--lengths 256 ...] [--batch 32] [--repeats 10]

Writes benchmarks/results/<device>/linear_time_share.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from lowbits import models
from lowbits.analysis import Family, TimeShare, device_name, linear_flops_share, provenance, time_share

RESULTS = Path(__file__).parent / "results"
CUDA_GRID = {
    "sizes": ["gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl"],
    "lengths": [256, 512, 1024, 2048, 4096, 8192],
    "batch": 32,
    "repeats": 10,
}
CPU_GRID = {"sizes": ["gpt2-small", "gpt2-medium"], "lengths": [256, 1024], "batch": 1, "repeats": 2}


def block_pass(config: PretrainedConfig, batch: int, length: int, device: torch.device) -> Callable[[], object]:
    """Return one forward and backward pass through a fresh block."""
    config._attn_implementation = "sdpa"
    block = GPT2Block(config, layer_idx=0).to(device, torch.bfloat16)
    x = torch.randn(batch, length, config.n_embd, device=device, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn_like(x)

    def run() -> None:
        y = block(x)
        (y if isinstance(y, torch.Tensor) else y[0]).backward(gradient)  # transformers < 5 returned a tuple
        block.zero_grad(set_to_none=True)
        x.grad = None

    return run


def measure(size: str, batch: int, length: int, repeats: int, device: torch.device) -> tuple[TimeShare, int]:
    """Profile a block, halving the batch until it fits."""
    config = models.config(size, vocab_size=8, block=8)  # a block knows neither vocabulary nor positions
    for dropout in ("resid_pdrop", "attn_pdrop", "embd_pdrop"):
        setattr(config, dropout, 0.0)
    while True:
        try:
            return time_share(block_pass(config, batch, length, device), device, repeats), batch
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            torch.cuda.empty_cache()
            batch //= 2


def row(size: str, length: int, batch: int, share: TimeShare) -> dict[str, object]:
    width = models.config(size, vocab_size=8, block=8).n_embd
    return {
        "size": size,
        "width": width,
        "length": length,
        "batch": batch,
        "linear_flops_share": linear_flops_share(width, length),
        "share": {family.value: share.share(family) for family in Family},
        "milliseconds": {family.value: share.milliseconds[family] for family in Family},
        "unclassified_ms": dict(list(share.unclassified.items())[:10]),
    }


def verdict(rows: list[dict[str, object]]) -> dict[str, object]:
    """H6: the linear share falls with length and rises with width; little is left unclassified."""
    shares = {(r["size"], r["length"]): r["share"]["linear"] for r in rows}  # type: ignore[index]
    sizes, lengths = (list(dict.fromkeys(key[i] for key in shares)) for i in (0, 1))
    down = all(shares[s, a] > shares[s, b] for s in sizes for a, b in zip(lengths, lengths[1:], strict=False))
    up = all(shares[a, n] < shares[b, n] for n in lengths for a, b in zip(sizes, sizes[1:], strict=False))
    other = max(r["share"]["other"] for r in rows)  # type: ignore[index]
    return {"falls_with_length": down, "rises_with_width": up, "largest_other_share": other}


def print_table(rows: list[dict[str, object]], device: torch.device) -> None:
    table = Table(title=f"time of one GPT-2 block, forward and backward, bf16, {device_name(device)}")
    for column in ("size", "length", "batch", "FLOPs linear", *(family.value for family in Family), "ms"):
        table.add_column(column, justify="right")
    for r in rows:
        shares = [f"{r['share'][family.value]:.1%}" for family in Family]  # type: ignore[index]
        total = f"{sum(r['milliseconds'].values()):.2f}"  # type: ignore[attr-defined]
        flops = f"{r['linear_flops_share']:.1%}"
        table.add_row(str(r["size"]), str(r["length"]), str(r["batch"]), flops, *shares, total)
    Console(width=120).print(table)


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    grid = CUDA_GRID if device.type == "cuda" else CPU_GRID
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", nargs="+", default=grid["sizes"])
    parser.add_argument("--lengths", nargs="+", type=int, default=grid["lengths"])
    parser.add_argument("--batch", type=int, default=grid["batch"])
    parser.add_argument("--repeats", type=int, default=grid["repeats"])
    options = parser.parse_args()
    rows = []
    for size in options.sizes:
        for length in options.lengths:
            share, batch = measure(size, options.batch, length, options.repeats, device)
            rows.append(row(size, length, batch, share))
    print_table(rows, device)
    summary = verdict(rows)
    print(", ".join(f"{key}: {value}" for key, value in summary.items()))
    path = RESULTS / device_name(device) / "linear_time_share.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"provenance": provenance(device), "dtype": "bfloat16", "repeats": options.repeats} | summary
    path.write_text(json.dumps(content | {"rows": rows}, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
