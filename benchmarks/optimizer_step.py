# SPDX-License-Identifier: Apache-2.0
"""What one optimizer step costs: time, launches, bytes of state; beside torch's fused AdamW and a plain copy.

    python benchmarks/optimizer_step.py                     # on whatever device there is
    python benchmarks/optimizer_step.py --peers             # and bitsandbytes, torchao, flashoptim, where installed
    python benchmarks/optimizer_step.py --device cpu --parameters 50331648
    python benchmarks/optimizer_step.py --quick             # tiny: does it run?

CUDA: a Llama of 953.2M parameters in 147 tensors (width 2048, FFN 5632, 16 layers, vocabulary 32000, untied) and 2,000
small tensors, in bf16 and fp32, gradients in the parameter's dtype. Medians of CUDA-event times of 50 steps in a row,
and of the time until `step()` returns to the host. CPU: one step of every arm in turn, so that all meet the same
noise; all tensors are 2048x2048. `of_copy`: bytes that a step must move (parameters and states read and written,
gradients read) over its time, as a share of what a copy reaches in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lowbits import optim
from lowbits.analysis import provenance
from lowbits.optim import _compiled
from lowbits.quantizers import Rounding

RESULTS = Path(__file__).parent / "results"
HYPER = {"lr": 1e-3, "weight_decay": 0.1}
Shapes = list[tuple[int, ...]]


@dataclass(frozen=True)
class Arm:
    """An optimizer by module and class.

    Args:
        name: in the table.
        where: module.
        what: class or constructor in it.
        options: keyword arguments.
        dtypes: of parameters that it is measured with.
        eager: run lowbits' definition instead of its kernels.
    """

    name: str
    where: str
    what: str
    options: dict[str, object] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    eager: bool = False

    def build(self, params: list[Tensor]) -> torch.optim.Optimizer | None:
        """Construct it; None where it is not installed."""
        try:
            module = importlib.import_module(self.where)
        except ImportError:
            return None
        constructor = getattr(module, self.what, None)
        return None if constructor is None else constructor(params, **self.options)


def ours(name: str, what: str, **options: object) -> Arm:
    """An optimizer of lowbits that quantizes tensors of every size."""
    return Arm(name, optim.__name__, what, {"min_8bit_size": 0, **options})


TORCH = Arm("torch AdamW fused", "torch.optim", "AdamW", {**HYPER, "fused": True})
ADAMW8 = ours("AdamW8bit", "AdamW8bit", **HYPER)
STOCHASTIC = ours("AdamW8bit, stochastic", "AdamW8bit", rounding=Rounding.STOCHASTIC, **HYPER)
CUDA_ARMS = [
    TORCH,
    ADAMW8,
    replace(STOCHASTIC, dtypes=(torch.bfloat16,)),
    ours("AdamW8bit, clipped", "AdamW8bit", clip=optim.GlobalNorm(1.0), **HYPER),
    ours("AdamW, fp32 states", "AdamW", **HYPER),
    ours("AdamW4bit", "AdamW4bit", **HYPER),
    ours("Lion8bit", "Lion8bit", **HYPER),
    ours("SGD8bit, momentum", "SGD8bit", lr=1e-3, momentum=0.9),
    ours("AdEMAMix8bit", "AdEMAMix8bit", **HYPER),
]
CPU_ARMS = [TORCH, ADAMW8, CUDA_ARMS[4], replace(ADAMW8, name="AdamW8bit, eager", eager=True)]
PEERS = [
    Arm("bitsandbytes AdamW8bit", "bitsandbytes.optim", "AdamW8bit", HYPER),
    Arm("torchao AdamW8bit", "torchao.optim", "AdamW8bit", HYPER),
]
CUDA_PEERS = [
    Arm("bitsandbytes Lion8bit", "bitsandbytes.optim", "Lion8bit", HYPER),
    Arm("flashoptim AdamW", "flashoptim", "FlashAdamW", {**HYPER, "master_weight_bits": None}),
]


def llama(width: int, ffn: int, layers: int, vocabulary: int) -> Shapes:
    """Parameter shapes of an untied Llama without grouped queries."""
    block = [(width, width)] * 4 + [(ffn, width)] * 2 + [(width, ffn)] + [(width,)] * 2
    return [(vocabulary, width), *block * layers, (width,), (vocabulary, width)]


def workloads(device: torch.device, parameters: int | None, quick: bool) -> dict[str, Shapes]:
    """What is stepped, by name."""
    if device.type == "cpu" or parameters:
        count = 70_000 if quick else parameters or 12 * 2**22
        tensor = 2**15 if quick else 2**22
        whole, rest = divmod(count, tensor)
        return {f"{count / 1e6:.1f}M": [(2048, tensor // 2048)] * whole + [(rest,)] * bool(rest)}
    if quick:
        return {"llama": llama(256, 640, 2, 1000), "small": [(64, 32), (32,)] * 10}
    return {"llama": llama(2048, 5632, 16, 32000), "small": [(512, 256)] * 1000 + [(256,)] * 1000}


def make(shapes: Shapes, dtype: torch.dtype, device: torch.device, like: list[Tensor] | None = None) -> list[Tensor]:
    """Parameters with gradients; those of `like` are shared."""
    params = []
    for i, shape in enumerate(shapes):
        p = torch.nn.Parameter(torch.randn(shape, device=device, dtype=dtype) * 0.02)
        p.grad = torch.randn_like(p) * 1e-3 if like is None else like[i].grad
        params.append(p)
    return params


def storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Yield the storages behind a tensor, also behind one that wraps others."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from storages(getattr(tensor, name))
    else:
        yield tensor.untyped_storage()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that the states really hold on to; what several share counts once."""
    found = {}
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                found |= {storage.data_ptr(): storage.nbytes() for storage in storages(value) if storage.nbytes()}
    return sum(found.values())


def needed_bytes(arm: Arm, params: list[Tensor], states: int) -> int:
    """Bytes that a step has to move."""
    passes = 4 if "clip" in arm.options else 3  # the norm reads the gradients once more
    return passes * sum(p.nbytes for p in params) + 2 * states


@contextlib.contextmanager
def definition(arm: Arm) -> Iterator[None]:
    """Let an eager arm do without kernels."""
    if not arm.eager:
        yield
        return
    with mock.patch.object(_compiled, "update_", lambda optimizer, work: work):
        yield


def row(arm: Arm, params: list[Tensor], states: int, ms: float, copy: float) -> dict[str, object]:
    """What every row says, whatever the device."""
    count = sum(p.numel() for p in params)
    moved = needed_bytes(arm, params, states)
    rate = moved / ms / 1e6
    return {
        "ms": ms, "state_bytes_per_parameter": states / count, "bytes": moved, "gb_per_s": rate, "of_copy": rate / copy,
    }  # fmt: skip


# --- CUDA -----------------------------------------------------------------------------------------------------------


def event_ms(work: Callable[[], object], repeats: int) -> float:
    """Median device time of calls in a row."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in pairs:
        start.record()
        work()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in pairs)


def host_ms(work: Callable[[], object], repeats: int) -> float:
    """Median time until a call returns, the device idle before it."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e3)
    torch.cuda.synchronize()
    return statistics.median(times)


def launches(work: Callable[[], object]) -> dict[str, int]:
    """Kernels and copies that one call launches."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    on_device = [e for e in events if not e.name.startswith("Optimizer.")]  # torch's own mark around a step
    copies = sum(e.name.startswith(("Memcpy", "Memset")) for e in on_device)
    return {"kernels": len(on_device) - copies, "copies": copies}


def cuda_rows(shapes: Shapes, dtype: torch.dtype, arms: list[Arm], repeats: int, copy: float) -> Iterator[dict]:
    """One arm after the other, each with parameters and states of its own."""
    device = torch.device("cuda")
    for arm in arms:
        if dtype not in arm.dtypes:
            continue
        params = make(shapes, dtype, device)
        optimizer = arm.build(params)
        if optimizer is None:
            print(f"{arm.name}: not installed", flush=True)
            continue
        start = time.perf_counter()
        optimizer.step()
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        for _ in range(2):
            optimizer.step()
        rough = event_ms(optimizer.step, 3)
        often = repeats if rough < 20 else max(repeats // 10, 3)  # a slow one is as certain after fewer steps
        for _ in range(often // 5):
            optimizer.step()
        ms, host = event_ms(optimizer.step, often), host_ms(optimizer.step, max(often // 3, 3))
        yield {
            "name": arm.name, **row(arm, params, state_bytes(optimizer), ms, copy), "host_ms": host,
            "first_step_s": first, **launches(optimizer.step),
        }  # fmt: skip
        del optimizer, params
        gc.collect()
        torch.cuda.empty_cache()


def cuda_copy(quick: bool) -> float:
    """GB/s, read and written, of a device-to-device copy of 2 GiB."""
    source = torch.empty(2**24 if quick else 2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    for _ in range(5):
        target.copy_(source)
    return 2 * source.nbytes / event_ms(lambda: target.copy_(source), 20) / 1e6


# --- CPU ------------------------------------------------------------------------------------------------------------


def cpu_rows(shapes: Shapes, dtype: torch.dtype, arms: list[Arm], repeats: int) -> tuple[list[dict], float]:
    """One step of every arm and a copy in turn, `repeats` times; also GB/s of the copy."""
    gradients = make(shapes, dtype, torch.device("cpu"))
    count = sum(p.numel() for p in gradients)
    source, target = (torch.ones(count, dtype=dtype) for _ in range(2))
    work: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    made = {}
    for arm in arms:
        params = make(shapes, dtype, torch.device("cpu"), like=gradients)
        if dtype in arm.dtypes and (optimizer := arm.build(params)):
            work[arm.name], made[arm.name] = optimizer.step, (arm, params, optimizer)
        else:
            print(f"{arm.name}: not installed", flush=True)
    eager = {arm.name: arm for arm in arms if arm.eager}
    times: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):  # the first one is for warming up
        for name, step in work.items():
            if name in eager and repeat > 2:  # seconds each
                continue
            with definition(eager[name]) if name in eager else contextlib.nullcontext():
                start = time.perf_counter()
                step()
                if repeat:
                    times[name].append((time.perf_counter() - start) * 1e3)
    copy = 2 * source.nbytes / statistics.median(times["copy"]) / 1e6
    rows = [
        {
            "name": name, **row(arm, params, state_bytes(optimizer), statistics.median(times[name]), copy),
            "all_ms": times[name],
        }
        for name, (arm, params, optimizer) in made.items()
    ]  # fmt: skip
    return rows, copy


# --- the report -----------------------------------------------------------------------------------------------------


def finish(title: str, rows: list[dict], copy: float) -> dict[str, object]:
    """Add ratios to torch's fused step, print and return a workload."""
    base = next((r["ms"] for r in rows if r["name"] == TORCH.name), None)
    print(f"\n{title}; a copy reaches {copy:.0f} GB/s")
    print(f"{'':28}{'ms':>9}{'/ fused':>9}{'of copy':>9}{'B/param':>9}", end="")
    print(f"{'host ms':>9}{'kernels':>9}" if "kernels" in rows[0] else "")
    for r in rows:
        r["over_torch_fused"] = r["ms"] / base if base else None
        line = f"{r['name']:28}{r['ms']:9.3f}{r['over_torch_fused'] or 0:9.2f}{r['of_copy']:9.1%}"
        line += f"{r['state_bytes_per_parameter']:9.3f}"
        print(line + (f"{r['host_ms']:9.3f}{r['kernels']:6d}+{r['copies']}" if "kernels" in r else ""), flush=True)
    return {"copy_gb_per_s": copy, "rows": rows}


def measure(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, dict[str, object]]]:
    """All workloads, each as soon as it is measured."""
    dtypes = (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,)
    for name, shapes in workloads(device, options.parameters, options.quick).items():
        count = sum(torch.Size(shape).numel() for shape in shapes)
        for dtype in dtypes:
            what = f"{name}, {str(dtype).removeprefix('torch.')}"
            title = f"{what}: {count / 1e6:.1f}M parameters in {len(shapes)} tensors"
            if device.type == "cuda":
                copy = cuda_copy(options.quick)
                arms = CUDA_ARMS + (PEERS + CUDA_PEERS if options.peers else [])
                rows = list(cuda_rows(shapes, dtype, arms, options.repeats, copy))
            else:
                arms = CPU_ARMS + (PEERS if options.peers else [])
                rows, copy = cpu_rows(shapes, dtype, arms, options.repeats)
            yield title, {"parameters": count, "tensors": len(shapes), **finish(title, rows, copy)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--peers", action="store_true", help="measure the peers that are installed, too")
    parser.add_argument("--parameters", type=int, help="this many instead of the named shapes")
    parser.add_argument("--repeats", type=int, help="steps that are timed; default 50 on CUDA, 7 on a CPU")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few repeats, nothing written")
    options = parser.parse_args()
    options.repeats = options.repeats or (3 if options.quick else 50 if options.device == "cuda" else 7)
    device = torch.device(options.device)
    told = provenance(device)
    path = RESULTS / str(told["device"]) / "optimizer_step.json"
    found: dict[str, object] = {}
    for title, result in measure(options, device):
        found[title] = result
        if not options.quick:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = {"provenance": told, "repeats": options.repeats, "workloads": found}
            path.write_text(json.dumps(content, indent=1) + "\n")
    if not options.quick:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
