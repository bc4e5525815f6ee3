# SPDX-License-Identifier: Apache-2.0
"""`speed`: what the noise costs on one GPU: the kernels, a whole Llama step, memory, and the same bits twice.

Two ways to train are timed in turns, in the same process, on the same tokens: the clock of a GPU drifts by more than
what is to be measured.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from experiments.eightbit_optimizers.runs import Check
from experiments.gaussian_weight_sampling.results import write
from lowbits import models
from lowbits.methods import Method, Position
from lowbits.methods._pseudo_noise import _launch
from lowbits.methods.diffq import DiffQ, Form
from lowbits.methods.gaussws import GaussWS, Plan, PseudoNoise, Resample
from lowbits.nn import Recipe, convert_

ROOT = Path(__file__).parents[2]
BATCH, LENGTH = 8, 2048  # 16k tokens a step
ROUNDS, STEPS, WARMUP = 12, 5, 4
MATCHED = DiffQ(form=Form.MATCHED, noise=PseudoNoise.UNIFORM, b_init=6.0, b_min=4.0, bit_lr=None)
ARMS: dict[str, Method] = {
    "GaussWS": GaussWS(),
    "GaussWS, lean": GaussWS(lean=True),
    "DiffQ matched": MATCHED,
    "DiffQ library": DiffQ(),
}


@dataclass
class Training:
    """A model that can take steps."""

    method: Method
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    step: int = 0
    losses: list[float] = field(default_factory=list)

    def take(self, ids: Tensor) -> Tensor:
        """Take one step in bfloat16 and return the loss."""
        if type(self.method) is not Method:
            self.method.before_forward_(self.model, Position(self.step, 1 << 30, self.step))
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = self.method.loss(self.model, ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach()


def training(method: Method, size: str, *, compiled: bool, device: str = "cuda", layers: int | None = None) -> Training:
    """Build a Llama with random weights; `Method()` is a plain model of transformers, not converted."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    config = models.config(size, 32_000, LENGTH)
    config.num_hidden_layers = layers or config.num_hidden_layers
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    if type(method) is not Method:
        convert_(model, Recipe(), verbose=False)
        method.prepare_(model, 0)
    if compiled:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.compile()
    groups = method.param_groups(model, 0.1)
    return Training(method, model, torch.optim.AdamW(groups, lr=1e-4, fused=device == "cuda"))


def tokens(device: str = "cuda", batch: int = BATCH, length: int = LENGTH) -> Tensor:
    """Random tokens: the time of a step does not depend on them."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(32_000, (batch, length), generator=generator).to(device)


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the time of one call, on the device's own clock."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def in_turns(one: Training, other: Training, ids: Tensor) -> dict[str, object]:
    """Time two trainings in turns; the overhead is the median over rounds of the ratio of neighbours."""
    for _ in range(WARMUP):
        one.take(ids), other.take(ids)
    times = [(seconds(lambda: one.take(ids), STEPS), seconds(lambda: other.take(ids), STEPS)) for _ in range(ROUNDS)]
    ratios = sorted(b / a - 1 for a, b in times)
    return {
        "bf16_ms": 1e3 * statistics.median(a for a, _ in times),
        "ms": 1e3 * statistics.median(b for _, b in times),
        "overhead": statistics.median(ratios),
        "overhead_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
    }


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def steps(size: str = "llama-1b") -> dict[str, object]:
    """Overhead of a whole step, compiled and not, of every arm against bf16."""
    found: dict[str, object] = {}
    for compiled in (True, False):
        for name, method in ARMS.items():
            torch._dynamo.reset()
            one, other = (training(m, size, compiled=compiled) for m in (Method(), method))
            key = f"{name}, {'compiled' if compiled else 'eager'}"
            found[key] = in_turns(one, other, tokens())
            print(key, found[key], flush=True)
            del one, other
            release()
    return found


def peaks(size: str = "llama-1b") -> dict[str, object]:
    """Peak of allocated memory in a step, and bytes a parameter above bf16's."""
    found: dict[str, float] = {}
    arms = {"bf16": Method(), **ARMS, "GaussWS, one draw a step": GaussWS(resample=Resample.STEP)}
    parameters = 0
    for compiled in (True, False):
        for name, method in arms.items():
            torch._dynamo.reset()
            made, ids = training(method, size, compiled=compiled), tokens()
            for _ in range(2):
                made.take(ids)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            made.take(ids)
            torch.cuda.synchronize()
            key = f"{name}, {'compiled' if compiled else 'eager'}"
            found[key] = float(torch.cuda.max_memory_allocated())
            parameters = parameters or sum(p.numel() for p in made.model.parameters())
            print(key, found[key] / 2**30, "GiB", flush=True)
            del made, ids
            release()
    extra = {key: (peak - found[f"bf16, {key.rpartition(', ')[2]}"]) / parameters for key, peak in found.items()}
    return {"parameters": parameters, "peak_bytes": found, "bytes_a_parameter": extra}


def kernels(rows: int = 16384, columns: int = 8192) -> dict[str, object]:
    """Bandwidth of both kernels, every tile that may be chosen, and the way over torch.randn."""
    found: dict[str, object] = {}
    counter = torch.tensor([1, 2, 3], device="cuda")
    chosen = _launch._TILE, _launch._WARPS
    for tile, warps in [chosen, (1024, 1), (2048, 2), (2048, 4), (4096, 8), (8192, 8)]:
        _launch._TILE, _launch._WARPS = tile, warps
        for dtype in (torch.float32, torch.bfloat16):
            found[f"tile {tile}, warps {warps}, {dtype}"] = one_kernel(rows, columns, dtype, counter)
            print(tile, warps, dtype, found[f"tile {tile}, warps {warps}, {dtype}"], flush=True)
    _launch._TILE, _launch._WARPS = chosen
    w, b_i = torch.randn(rows, columns, device="cuda"), torch.ones(rows // 32, columns // 32, device="cuda")
    ours = seconds(lambda: _launch.add_noise(w, b_i, counter, Plan(), (0, 0), torch.bfloat16), 20)
    theirs = seconds(lambda: by_randn(w, b_i), 20)
    return {"chosen": f"tile {chosen[0]}, warps {chosen[1]}", "tiles": found, "randn_ms": 1e3 * theirs,
            "ms": 1e3 * ours, "randn_over_ours": theirs / ours}  # fmt: skip


def by_randn(w: Tensor, b_i: Tensor) -> Tensor:
    """The same noise from torch's normal numbers."""
    blocks = w.view(w.shape[0] // 32, 32, w.shape[1] // 32, 32)
    delta = blocks.abs().amax((1, 3), keepdim=True) * 2 ** (1 - (4 + 2 * b_i))[:, None, :, None]
    return (blocks + (torch.randn_like(blocks) / 2).round() * delta).to(torch.bfloat16).view(w.shape)


def one_kernel(rows: int, columns: int, dtype: torch.dtype, counter: Tensor) -> dict[str, float]:
    """Time and bandwidth of the forward kernel (reads W, writes W^) and of the backward one (reads G, writes dL/dW)."""
    w, b_i = torch.randn(rows, columns, device="cuda").to(dtype), torch.ones(rows // 32, columns // 32, device="cuda")
    y, slopes = _launch.add_noise(w, b_i, counter, Plan(), (0, 0), torch.bfloat16)
    _launch.gradients(y, counter, slopes, Plan(), (0, 0), dtype)
    forward = seconds(lambda: _launch.add_noise(w, b_i, counter, Plan(), (0, 0), torch.bfloat16), 20)
    backward = seconds(lambda: _launch.gradients(y, counter, slopes, Plan(), (0, 0), dtype), 20)
    return {
        "forward_ms": 1e3 * forward,
        "forward_tb_s": w.numel() * (w.element_size() + 2) / forward / 1e12,
        "backward_ms": 1e3 * backward,
        "backward_over_forward": backward / forward,
    }


def repeated(size: str = "llama-1b") -> dict[str, object]:
    """Losses of two runs of one seed, and of one whose noisy weights are made again in the backward pass."""
    losses = {}
    for name, method in {"first": GaussWS(), "again": GaussWS(), "lean": GaussWS(lean=True)}.items():
        made, ids = training(method, size, compiled=False, layers=2), tokens(batch=2)
        losses[name] = [made.take(ids).item() for _ in range(6)]
        del made, ids
        release()
    return {"losses": losses, "equal": losses["first"] == losses["again"] == losses["lean"], "shards": shards()}


def shards(size: int = 4096) -> bool:
    """Whether two halves of a weight, by rows and by columns, get the noise of the whole, bit for bit."""
    w, b_i = torch.randn(size, size, device="cuda"), torch.ones(size // 32, size // 32, device="cuda")
    counter, half, blocks = torch.tensor([1, 2, 3], device="cuda"), size // 2, size // 64
    whole, _ = _launch.add_noise(w, b_i, counter, Plan(), (0, 0), torch.bfloat16)
    below, _ = _launch.add_noise(w[half:], b_i[blocks:], counter, Plan(), (blocks, 0), torch.bfloat16)
    right, _ = _launch.add_noise(
        w[:, half:].contiguous(), b_i[:, blocks:].contiguous(), counter, Plan(), (0, blocks), torch.bfloat16
    )
    return torch.equal(below, whole[half:]) and torch.equal(right, whole[:, half:])


def equal_bits() -> dict[str, object]:
    """Run the cases that hold the kernels to the definition."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.methods.gaussws_launches"]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr[-2000:], flush=True)
    return {"cases": done.stdout.splitlines(), "equal": done.returncode == 0}


PARTS: dict[str, Callable[[], dict[str, object]]] = {
    "bits": equal_bits, "kernels": kernels, "step": steps, "memory": peaks, "repeat": repeated
}  # fmt: skip


def checks(found: dict[str, dict[str, object]]) -> list[Check]:
    """D1 to D6 and D8 of the specification, of the parts that were measured."""
    told: list[Check] = []
    if "bits" in found:
        told.append(Check("D1", "kernels equal the definition bit for bit", "; ".join(found["bits"]["cases"]),  # type: ignore[arg-type]
                          bool(found["bits"]["equal"])))  # fmt: skip
    if "kernels" in found:
        part = found["kernels"]
        for dtype, least in ((torch.float32, 2.8), (torch.bfloat16, 2.4)):
            row = part["tiles"][f"{part['chosen']}, {dtype}"]  # type: ignore[index]
            told.append(Check("D2", f"forward at least {least} TB/s, {dtype} masters", f"{row['forward_tb_s']:.2f}",
                              row["forward_tb_s"] >= least))  # fmt: skip
            ratio = row["backward_over_forward"]
            told.append(Check("D3", f"backward at most 1.2 of forward, {dtype} masters", f"{ratio:.2f}", ratio <= 1.2))
        ratio = part["randn_over_ours"]
        told.append(Check("D8", "at least 4 times as fast as by torch.randn", f"{ratio:.1f}", float(ratio) >= 4))  # type: ignore[arg-type]
    for name, row in found.get("step", {}).items():
        over = row["overhead"]  # type: ignore[index]
        if name.startswith("GaussWS,"):
            told.append(Check("D4", f"{name}: overhead at most 1.4 %", f"{100 * over:.2f} %", over <= 0.014))
        else:
            told.append(Check("D4", f"{name}: for comparison", f"{100 * over:.2f} %", True))
    extra = found.get("memory", {}).get("bytes_a_parameter", {})
    for name, value in extra.items():  # type: ignore[attr-defined]
        if name.startswith("GaussWS"):
            most = 0.2 if "lean" in name else 2.1
            told.append(
                Check("D5", f"{name}: at most {most} bytes a parameter above bf16", f"{value:+.2f}", value <= most)
            )
    if "repeat" in found:
        told.append(Check("D6", "the same losses twice, and in lean mode", str(found["repeat"]["losses"]),
                          bool(found["repeat"]["equal"])))  # fmt: skip
        told.append(Check("D6", "shards of a weight get the noise of the whole", str(found["repeat"]["shards"]),
                          bool(found["repeat"]["shards"])))  # fmt: skip
    return told


def main(parts: Sequence[str] | None) -> None:
    """Measure what was asked for; each part has a results file of its own."""
    for name in parts or PARTS:
        found = PARTS[name]()
        write(f"speed_{name}", {name: found}, checks({name: found}), torch.device("cuda"))
