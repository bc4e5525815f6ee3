# SPDX-License-Identifier: Apache-2.0
"""What a whole training step costs: forward, loss, backward, clipping, torch's fused AdamW on bfloat16 parameters.

    python benchmarks/train_step.py --widths 2048 --arms fp8_rowwise int8_rowwise --peers
    python benchmarks/train_step.py --widths 4096 --arms fp8_rowwise nvfp4 --modes eager compiled graphs
    python benchmarks/train_step.py --table shapes --shapes gpt2-small llama-8b
    python benchmarks/train_step.py --curves --data runs/data/text       # native beside simulated, see curves.py

Llamas of `transformers` with fresh weights from one seed, 8 x 2048 random tokens: width 2048, FFN 5632, 16 heads, 16
layers, vocabulary 32000, untied (953M parameters), and width 4096, FFN 14336, 32 heads, 4 layers (1,235M). Blocks are
compiled one by one; output head in bfloat16 and loss in float32, outside of them, in every arm. bf16 comes first in
every call: ratios are within a run, above 1 is faster, memory below 1 is less. `of bf16 GEMM`: six FLOPs a weight and
token, attention's besides, over the time, as a share of what a bf16 GEMM of 8192^3 reaches in this run.

`--table shapes`: few blocks of GPT-2's and Llama's sizes without embedding, head and loss (whose share would depend on
how few blocks there are); gradients of the last block's result are random normal.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import curves
import torch
from measuring import FAILURES, Report, Row, copy_gb_per_s, first_line, gemm_tflops, missing, number, parser
from peers import TORCHAO, Convert
from shapes import SHAPES, WIDTHS, Shape
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForCausalLM

from lowbits.nn import convert_, set_step_, weights_quantized_once
from lowbits.recipes import named

ARMS = ("fp8_rowwise", "fp8_tensorwise", "fp8_block", "int8_rowwise", "nvfp4", "w8a8_faithful", "w8a8_saved8")
SHAPE_ARMS = ("fp8_rowwise", "int8_rowwise", "nvfp4")
COMPILED = {"compiled": None, "graphs": "reduce-overhead"}
"""Modes that compile blocks, and what torch calls them; CUDA graphs take the host out of the time."""
GIB = 2**30


# --- a step ---------------------------------------------------------------------------------------------------------


def build(shape: Shape, device: torch.device) -> nn.Module:
    """The same weights in every arm."""
    torch.manual_seed(0)
    kind = AutoModelForCausalLM if shape.vocabulary else AutoModel
    with torch.device(device):
        return kind.from_config(shape.config(), dtype=torch.bfloat16, attn_implementation="sdpa").train()


def blocks(model: nn.Module) -> nn.ModuleList:
    """The list of a model's blocks."""
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def stepper(model: Any, shape: Shape, options: argparse.Namespace, device: torch.device) -> Callable[[], Tensor | None]:
    """Return a function that trains one step, on the same tokens every time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    params = list(model.parameters())
    draw = torch.Generator(device).manual_seed(1)
    size, parts = (options.batch, shape.length), options.micro_batches
    if shape.vocabulary:
        ids, targets = torch.randint(0, shape.vocabulary, (2, *size), device=device, generator=draw)
    else:
        x, g = torch.randn((2, *size, shape.width), device=device, dtype=torch.bfloat16, generator=draw)

    def with_head(ids: Tensor, targets: Tensor) -> Tensor:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        loss = cross_entropy(model.lm_head(hidden).float().flatten(0, 1), targets.flatten()) / parts
        loss.backward()
        return loss.detach()

    def alone(x: Tensor, g: Tensor) -> None:
        model(inputs_embeds=x, use_cache=False).last_hidden_state.backward(g)

    def step() -> Tensor | None:
        if device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # of no effect without graphs
        once = parts > 1 or device.type == "cuda"  # as `lowbits.train` does
        with weights_quantized_once(model) if once else contextlib.nullcontext():
            if shape.vocabulary:
                found = [with_head(*pair) for pair in zip(ids.chunk(parts), targets.chunk(parts), strict=True)]
            else:
                found = [alone(*pair) for pair in zip(x.chunk(parts), g.chunk(parts), strict=True)]
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(found).sum() if shape.vocabulary else None

    return step


def multiplied(model: nn.Module) -> int:
    """Weights of linear layers, the head among them."""
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in looked_up)


def recipe(name: str) -> Convert:
    """One of our recipes."""

    def convert(model: nn.Module) -> nn.Module:
        convert_(model, named(name), verbose=False)
        return model

    return convert


def counted(model: nn.Module, step: Callable[[], Tensor | None], stochastic: bool) -> Callable[[], Tensor | None]:
    """Set the counter of random bits before each step, as a training loop does."""
    if not stochastic:
        return step
    at = iter(range(10**9))

    def numbered() -> Tensor | None:
        set_step_(model, next(at))
        return step()

    return numbered


def measure(
    name: str, convert: Convert | None, shape: Shape, mode: str, options: argparse.Namespace, device: torch.device
) -> Row:
    """Train some steps of one arm."""
    left_over = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    model = build(shape, device)
    model = model if convert is None else convert(model)
    if mode in COMPILED:
        torch._dynamo.utils.counters.clear()
        for block in blocks(model):
            block.compile(dynamic=False, mode=COMPILED[mode])
    ours = convert is not None and name not in TORCHAO
    step = counted(model, stepper(model, shape, options, device), ours and named(name).stochastic)
    row = timed(step, options, device) | {"arm": name, "mode": mode, "left_over_gib": left_over / GIB}
    if mode in COMPILED:
        found = torch._dynamo.utils.counters
        row |= {"graphs": found["stats"]["unique_graphs"], "graph_breaks": sum(found["graph_break"].values())}
    tokens = options.batch * shape.length
    row |= {"tokens": tokens, "tokens_per_second": tokens / row["ms"] * 1e3}
    row |= {"parameters": sum(p.numel() for p in model.parameters()), "layers": shape.layers}
    row["tflops"] = shape.flops(tokens, multiplied(model)) / row["ms"] / 1e9
    if options.profile and device.type == "cuda":
        row["profile"] = profiled(step)
    return row


def timed(step: Callable[[], Tensor | None], options: argparse.Namespace, device: torch.device) -> Row:
    """Median of synchronised steps, and the largest memory that they held."""
    cuda = device.type == "cuda"
    losses, times, host = [], [], []
    for i in range(options.warm_up + (options.repeat or 12)):
        if i == options.warm_up and cuda:
            torch.cuda.reset_peak_memory_stats(device)
        if cuda:
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        losses.append(step())
        host.append((time.perf_counter() - begin) * 1e3)
        if cuda:
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - begin) * 1e3)
    known = [float(loss) for loss in losses if loss is not None]
    taken = times[options.warm_up :]
    waited = statistics.median(host[options.warm_up :])
    row: Row = {"ms": statistics.median(taken), "host_ms": waited, "all_ms": taken, "first_step_s": times[0] / 1e3}
    row["losses"] = [*known[:1], *known[-1:]]
    if cuda:
        row["peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
    return row


# --- where the time goes --------------------------------------------------------------------------------------------

# By parts of kernels' names, in this order: attention's kernels are made of GEMMs and their names say so.
FAMILIES = {
    "attention": ("flash", "fmha", "attention"),
    "quantize": ("amax", "quantize", "decode"),
    "gemm": ("gemm", "nvjet", "scaled", "xmma", "matmul", "splitk"),
    "optimizer": ("multi_tensor_apply",),
    "compiled": ("triton_",),
}


def family(kernel: str) -> str:
    """What a kernel is for; those of our GEMMs are called `scaled` and `blocks`."""
    low = kernel.lower()
    # Compiled code is named after what it does: a fused amax is no quantizer of ours.
    if low.startswith("triton_"):
        return "compiled"
    if low == "blocks":
        return "gemm"
    return next((name for name, parts in FAMILIES.items() if any(part in low for part in parts)), "other")


def profiled(step: Callable[[], object]) -> Row:
    """Milliseconds of one step's kernels by family, and the longest of them."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    times, calls = Counter[str](), Counter[str]()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Optimizer."):
            times[event.name] += event.device_time / 1e3  # type: ignore[assignment]
            calls[event.name] += 1
    by_family = Counter[str]()
    for kernel, ms in times.items():
        by_family[family(kernel)] += ms
    longest = [{"kernel": name[:120], "ms": ms, "calls": calls[name]} for name, ms in times.most_common(16)]
    return {"ms": dict(by_family.most_common()), "longest": longest}


# --- the tables -----------------------------------------------------------------------------------------------------


def finish(row: Row, base: Row | None, gemm: float) -> Row:
    """Add ratios to bf16."""
    row["of_bf16_gemm"] = row["tflops"] / gemm
    if base is not None:
        row["over_bf16"] = row["tokens_per_second"] / base["tokens_per_second"]
        row["advice"] = "" if row["over_bf16"] >= 1 else "leave in bf16"
        if "peak_gib" in row:
            row["memory_over_bf16"] = row["peak_gib"] / base["peak_gib"]
    return row


def chosen(options: argparse.Namespace) -> Iterator[tuple[str, Shape]]:
    """The models that were asked for, by name."""
    known, asked = (SHAPES, options.shapes) if options.table == "shapes" else (WIDTHS, options.widths)
    for name in asked:
        if name not in known:
            raise SystemExit(f"no shape is called {name}; there are {', '.join(known)}")
        shape = known[name]
        changes = {key: value for key in ("layers", "length", "vocabulary") if (value := getattr(options, key))}
        yield name, replace(shape, **changes)


def arms(options: argparse.Namespace) -> dict[str, tuple[Convert | None, bool]]:
    """What is measured, and whether it is a peer's; bf16 always, first."""
    found: dict[str, tuple[Convert | None, bool]] = {"bf16": (None, False)}
    found |= {name: (recipe(name), False) for name in options.arms if name != "bf16" and name not in TORCHAO}
    asked = [name for name in options.arms if name in TORCHAO] + list(TORCHAO) * options.peers
    if asked and not missing("torchao"):
        found |= {name: (TORCHAO[name], True) for name in asked}
    return found


def table(options: argparse.Namespace, device: torch.device) -> int:
    columns: dict[str, Callable[[Row], str]] = {
        "tokens/s": number("tokens_per_second", ",.0f"), "over bf16": number("over_bf16", ".3f"),
        "peak GiB": number("peak_gib", ".1f"), "of bf16's": number("memory_over_bf16"), "ms": number("ms", ".1f"),
        "of bf16 GEMM": number("of_bf16_gemm", ".0%"), "first step, s": number("first_step_s", ".0f"),
        "": lambda row: row.get("advice", ""),
    }  # fmt: skip
    rates = gemm_tflops(device)
    ceilings = {"copy_gb_per_s": copy_gb_per_s(device), "gemm_tflops": rates}
    name = "train_step" if options.table == "steps" else "train_shapes"
    report = Report(name, device, options, ceilings, columns)
    for (label, shape), mode in itertools.product(chosen(options), options.modes):
        base: Row | None = None
        for arm, (convert, peer) in arms(options).items():
            parts = f" in {options.micro_batches}" * (options.micro_batches > 1)
            key = f"{label}, {shape.layers} layers, {options.batch} x {shape.length}{parts}, {mode}: {arm}"
            if arm != "bf16" and not report.wants(key):
                continue
            task = functools.partial(measure, arm, convert, shape, mode, options, device)
            row = report.measure(key, lambda task=task, base=base: finish(task(), base, rates["bf16"]), may_fail=peer)
            base = row if arm == "bf16" else base
            for what, ms in (row or {}).get("profile", {}).get("ms", {}).items():
                print(f"    {what}: {ms:.1f} ms", flush=True)
            gc.collect()
    return report.show("A training step" if options.table == "steps" else "Blocks alone, forward, backward, optimizer")


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    made = parser(__doc__)
    made.add_argument(
        "--table", choices=("steps", "shapes"), default="steps", help="whole steps, or blocks of many sizes"
    )
    made.add_argument("--widths", nargs="+", metavar="WIDTH", help=", ".join(WIDTHS))
    made.add_argument("--shapes", nargs="+", metavar="NAME", help=", ".join(SHAPES))
    made.add_argument("--arms", nargs="+", metavar="NAME", help=f"recipes; peers: {', '.join(TORCHAO)}")
    made.add_argument("--modes", nargs="+", choices=(*COMPILED, "eager"), help="default: compiled; eager on a CPU")
    made.add_argument("--batch", type=int, help="sequences a step")
    made.add_argument("--micro-batches", type=int, default=1, help="parts of a batch, whose gradients are added up")
    made.add_argument("--length", type=int, help="tokens a sequence")
    made.add_argument("--layers", type=int, help="blocks")
    made.add_argument("--vocabulary", type=int, help="tokens that the model knows")
    made.add_argument("--warm-up", type=int, help="steps before the timed ones")
    made.add_argument("--profile", action="store_true", help="where a step's time goes, by kernels (CUDA)")
    curves.add_options(made)
    options = made.parse_args(arguments)
    cuda = options.device == "cuda"
    options.widths = options.widths or (["2048", "4096"] if cuda else ["256"])
    options.shapes = options.shapes or ([name for name in SHAPES if name != "tiny"] if cuda else ["tiny"])
    default = SHAPE_ARMS if options.table == "shapes" else ARMS
    options.arms = options.arms or (default if cuda else ("int8_rowwise", "nvfp4", "w8a8_faithful", "w8a8_saved8"))
    options.modes = options.modes or ["compiled" if cuda else "eager"]
    options.batch = options.batch or (8 if cuda else 1)
    options.warm_up = options.warm_up if options.warm_up is not None else 4 if cuda else 1
    options.repeat = options.repeat or (12 if cuda else 3)
    return options


def main() -> int:
    options = options_of()
    device = torch.device(options.device)
    return curves.table(options, device) if options.curves else table(options, device)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except FAILURES as failure:
        raise SystemExit(first_line(failure)) from failure
