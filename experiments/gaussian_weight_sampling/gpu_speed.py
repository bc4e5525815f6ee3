# SPDX-License-Identifier: Apache-2.0
"""`speed`: what the noise costs on one GPU: a whole Llama step and its memory, the kernels, the same bits twice.

Two ways to train are timed in turns, in the same process, on the same tokens: the clock of a GPU drifts by more than
what is to be measured. The results file of a part is written after every arm.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from experiments.checks import Check
from experiments.gaussian_weight_sampling.results import save, write
from lowbits import models
from lowbits.errors import RunError
from lowbits.methods import Method, Position
from lowbits.methods._pseudo_noise import _launch
from lowbits.methods.diffq import DiffQ, Form
from lowbits.methods.gaussws import GaussWS, Plan, PseudoNoise
from lowbits.nn import Recipe, convert_, quantized_layers
from lowbits.train._determinism import determinism

ROOT = Path(__file__).parents[2]
STEPS, WARMUP, VOCABULARY = 4, 3, 32_000
PROCESSES = 6  # of the cases that compare bits: compiling takes nearly all of their time
ARMS: dict[str, Method] = {
    "GaussWS": GaussWS(),
    "GaussWS, lean": GaussWS(lean=True),
    "DiffQ matched": DiffQ(form=Form.MATCHED, noise=PseudoNoise.UNIFORM, b_init=6.0, b_min=4.0, bit_lr=None),
    "DiffQ library": DiffQ(),
}
TILES = ((2048, 2048), (1024, 1024), (2048, 1024), (4096, 2048))
"""Elements of a program and of a warp of it; the first is what the library launches."""
LAYERS = ((2048, 2048), (5632, 2048))
Found = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """What is timed.

    Args:
        model: a size of `lowbits.models`.
        layers: of it; None for all.
        batch: sequences a step.
        rounds: of steps in turns.
        compiled: torch.compile on every block.
        device: as torch says it.
        length: tokens of a sequence.
    """

    model: str
    layers: int | None
    batch: int
    rounds: int
    compiled: bool
    device: str
    length: int = 2048


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
        self.method.before_forward_(self.model, Position(self.step, 1 << 30, self.step))
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = self.method.loss(self.model, ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach()


def training(method: Method, size: Size) -> Training:
    """Build a Llama with random weights; `Method()` is a plain model of transformers, not converted."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    config = models.config(size.model, VOCABULARY, size.length)
    config.num_hidden_layers = size.layers or config.num_hidden_layers
    torch.manual_seed(0)
    with torch.device(size.device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    if type(method) is not Method:
        convert_(model, Recipe(), verbose=False)
        method.prepare_(model, 0)
    if size.compiled:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.compile()
    groups = method.param_groups(model, 0.1)
    return Training(method, model, torch.optim.AdamW(groups, lr=1e-4, fused=size.device == "cuda"))


def tokens(size: Size) -> Tensor:
    """Random tokens: the time of a step does not depend on them."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (size.batch, size.length), generator=generator).to(size.device)


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the time of one call, on the device's own clock."""
    if not torch.cuda.is_available():
        begun = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - begun) / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak(made: Training, ids: Tensor, before: int) -> int:
    """Warm up, then return the peak of a step's memory above what there was before the model was built."""
    for _ in range(WARMUP):
        made.take(ids)
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    made.take(ids)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def in_turns(one: Training, other: Training, ids: Tensor, rounds: int) -> Found:
    """Time two trainings in turns; the overhead is the median over rounds of the ratio of neighbours."""
    times = [(seconds(lambda: one.take(ids), STEPS), seconds(lambda: other.take(ids), STEPS)) for _ in range(rounds)]
    ratios = sorted(b / a - 1 for a, b in times)
    return {
        "bf16_ms": 1e3 * statistics.median(a for a, _ in times),
        "ms": 1e3 * statistics.median(b for _, b in times),
        "overhead": statistics.median(ratios),
        "overhead_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
    }


def step(size: Size, arms: Sequence[str], until: float) -> Iterable[Found]:
    """Time and peak memory of a whole step of every arm beside bf16; yields what there is after each."""
    ids = tokens(size)
    _ = torch.ones(64, 64, device=size.device, dtype=torch.bfloat16).matmul(
        torch.ones(64, 64, device=size.device).bfloat16()
    )
    before = allocated()  # the workspace of GEMMs is nobody's
    plain = training(Method(), size)
    parameters = sum(p.numel() for p in plain.model.parameters())
    found: Found = {
        "setting": {"model": size.model, "layers": plain.model.config.num_hidden_layers, "compiled": size.compiled,
                    "tokens": ids.numel(), "parameters": parameters, "rounds": size.rounds},
        "peak_bytes": {"bf16": peak(plain, ids, before)}, "bytes_a_parameter": {}, "arms": {},
    }  # fmt: skip
    for name in arms:
        if time.perf_counter() > until:
            break
        release()
        before = allocated()
        other = training(ARMS[name], size)
        noise = sum(layer.weight.numel() for layer in quantized_layers(other.model).values() if layer.weight_fn)
        found["setting"]["weights with noise"] = noise
        found["peak_bytes"][name] = peak(other, ids, before)
        extra = found["peak_bytes"][name] - found["peak_bytes"]["bf16"]
        found["bytes_a_parameter"][name] = extra / noise
        found["arms"][name] = in_turns(plain, other, ids, size.rounds)
        print(name, found["arms"][name], f"{extra / noise:+.2f} bytes a weight", flush=True)
        del other
        yield found


def kernels(size: Size, arms: Sequence[str], until: float) -> Iterable[Found]:
    """Bandwidth of both kernels on weights of a model's layers and on a large one, every tile, and torch's own way."""
    found: Found = {"chosen": words(*TILES[0]), "tiles": {}, "layers": {}}
    large = (16384, 8192) if size.device == "cuda" else (64, 64)
    for shape in (*LAYERS, large) if size.device == "cuda" else (large,):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{shape[0]} x {shape[1]}, {dtype}".replace("torch.", "")
            found["layers"][name] = one_kernel(shape, dtype)
            print(name, found["layers"][name], flush=True)
        yield found
    chosen = _launch._TILE, _launch._ELEMENTS_A_WARP
    assert chosen == TILES[0]
    for tile in TILES:
        if time.perf_counter() > until:
            break
        _launch._TILE, _launch._ELEMENTS_A_WARP = tile
        found["tiles"][words(*tile)] = one_kernel(LAYERS[-1] if size.device == "cuda" else large, torch.float32)
        print(words(*tile), found["tiles"][words(*tile)], flush=True)
    _launch._TILE, _launch._ELEMENTS_A_WARP = chosen
    w, b_i = torch.randn(large, device=size.device), torch.ones(large[0] // 32, large[1] // 32, device=size.device)
    found["randn_ms"] = 1e3 * seconds(lambda: by_randn(w, b_i), 10)
    found["randn_over_ours"] = found["randn_ms"] / found["layers"][f"{large[0]} x {large[1]}, float32"]["forward_ms"]
    yield found


def words(tile: int, warp: int) -> str:
    return f"{tile} of a program, {warp} of a warp"


def by_randn(w: Tensor, b_i: Tensor) -> Tensor:
    """The same noise from torch's normal numbers."""
    blocks = w.view(w.shape[0] // 32, 32, w.shape[1] // 32, 32)
    delta = blocks.abs().amax((1, 3), keepdim=True) * 2 ** (1 - (4 + 2 * b_i))[:, None, :, None]
    return (blocks + (torch.randn_like(blocks) / 2).round() * delta).to(torch.bfloat16).view(w.shape)


def one_kernel(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, float]:
    """Time and bandwidth of the forward kernel (reads W, writes W^), of the backward one (reads G in bfloat16, writes
    dL/dW in the type of W) and of the casts that autocast makes in their place; the cache holds nothing of a weight.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counter, plan = torch.tensor([1, 2, 3], device=device), Plan()
    weights = [
        torch.randn(shape, device=device).to(dtype) for _ in range(min(32, max(2, (1 << 27) // (shape[0] * shape[1]))))
    ]
    b_i = torch.ones(shape[0] // 32, shape[1] // 32, device=device)
    add, turn = (_launch.add_noise, _launch.gradients) if device == "cuda" else (by_definition, by_definition)
    y, slopes = add(weights[0], b_i, counter, plan, (0, 0), torch.bfloat16)
    gradients = [torch.randn_like(y) for _ in weights]
    count = shape[0] * shape[1]
    forward = replayed([lambda w=w: add(w, b_i, counter, plan, (0, 0), torch.bfloat16) for w in weights])
    backward = replayed([lambda g=g: turn(g, counter, slopes, plan, (0, 0), dtype) for g in gradients])
    cast = replayed([lambda w=w: w.to(torch.bfloat16, copy=True) for w in weights])
    back = replayed([lambda g=g: g.to(dtype, copy=True) for g in gradients])
    return {
        "forward_ms": 1e3 * forward,
        "forward_tb_s": count * (dtype.itemsize + 2) / forward / 1e12,
        "cast_ms": 1e3 * cast,
        "backward_ms": 1e3 * backward,
        "backward_over_forward": backward / forward,
        "cast_back_ms": 1e3 * back if dtype == torch.float32 else 0.0,  # bfloat16 needs none
    }


def by_definition(*_: object) -> tuple[Tensor, Tensor]:
    """Stands for the kernels where there is no GPU: a dry run."""
    return torch.ones(64, 64, dtype=torch.bfloat16), torch.ones(2, 2)


def replayed(calls: Sequence[Callable[[], object]]) -> float:
    """Return the time of one call, all of them in one CUDA graph: launching would take longer than the kernels."""
    for call in calls[:2]:
        call()
    if not torch.cuda.is_available():
        return seconds(lambda: [call() for call in calls], 2) / len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return seconds(graph.replay, 10) / len(calls)


def repeat(size: Size, arms: Sequence[str], until: float) -> Iterable[Found]:
    """Losses of two runs of one seed, and of one whose noisy weights are made again in the backward pass."""
    small, losses = replace(size, layers=2, batch=min(2, size.batch), compiled=False), {}
    # What is compared is our part: sums in attention and embeddings are otherwise in the order in which they come, and
    # warnings alone would leave those of attention's backward pass as they are.
    with determinism(True):
        for name, method in {"first": GaussWS(), "again": GaussWS(), "lean": GaussWS(lean=True)}.items():
            made, ids = training(method, small), tokens(small)
            losses[name] = [made.take(ids).item() for _ in range(6)]
            del made, ids
            release()
    same = losses["first"] == losses["again"] == losses["lean"]
    yield {"losses": losses, "equal": same, "shards": shards() if size.device == "cuda" else None}


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


def bits(size: Size, arms: Sequence[str], until: float) -> Iterable[Found]:
    """Run the cases that hold the kernels to the definition, in a few processes."""
    from tests.methods.gaussws_launches import CASES

    names = list(CASES)
    command = [sys.executable, "-W", "ignore", "-m", "tests.methods.gaussws_launches"]
    started = [
        subprocess.Popen([*command, *names[i::PROCESSES]], cwd=ROOT, env=dict(os.environ), text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for i in range(PROCESSES)
    ]  # fmt: skip
    told = [(process.communicate()[0], process.returncode) for process in started]
    print(*(text for text, _ in told), sep="", flush=True)
    lines = [line for text, _ in told for line in text.splitlines()]
    yield {"cases": lines, "equal": not any(code for _, code in told) and len(lines) == len(names)}


PARTS: dict[str, Callable[[Size, Sequence[str], float], Iterable[Found]]] = {
    "step": step, "kernels": kernels, "repeat": repeat, "bits": bits
}  # fmt: skip


def checks(part: str, found: Found) -> list[Check]:
    """D1 to D6 and D8 of the specification, of one part."""
    return {"bits": bit_checks, "kernels": kernel_checks, "step": step_checks, "repeat": repeat_checks}[part](found)


def bit_checks(found: Found) -> list[Check]:
    different = [case for case in found["cases"] if not case.endswith(": equal")]
    told = "; ".join(different) or f"{len(found['cases'])} cases, all equal"
    return [Check("D1", "kernels equal the definition bit for bit", told, found["equal"])]


def kernel_checks(found: Found) -> list[Check]:
    told = []
    for name, row in found["layers"].items():
        if name.startswith("16384"):
            least = 2.8 if name.endswith("float32") else 2.4
            rate, ratio = row["forward_tb_s"], row["backward_over_forward"]
            told.append(Check("D2", f"{name}: forward at least {least} TB/s", f"{rate:.2f}", rate >= least))
            told.append(Check("D3", f"{name}: backward at most 1.2 of forward", f"{ratio:.2f}", ratio <= 1.2))
    ratio = found.get("randn_over_ours")
    return (
        told if ratio is None else [*told, Check("D8", "4 times as fast as by torch.randn", f"{ratio:.1f}", ratio >= 4)]
    )


def step_checks(found: Found) -> list[Check]:
    told = []
    for name, row in found["arms"].items():
        ours = name.startswith("GaussWS")
        measured = f"{100 * row['overhead']:.2f} %"
        claim = f"{name}: overhead at most 1.4 %" if ours else f"{name}: for comparison"
        told.append(Check("D4", claim, measured, not ours or row["overhead"] <= 0.014))
        value, most = found["bytes_a_parameter"][name], 0.2 if "lean" in name else 2.1
        if ours:
            told.append(
                Check("D5", f"{name}: at most {most} bytes a weight above bf16", f"{value:+.2f}", value <= most)
            )
    return told


def repeat_checks(found: Found) -> list[Check]:
    shared = found["shards"]
    told = "; ".join(f"{way} {' '.join(f'{x:.6f}' for x in losses)}" for way, losses in found["losses"].items())
    return [
        Check("D6", "the same losses twice, and in lean mode", told, found["equal"]),
        Check("D6", "shards of a weight get the noise of the whole", str(shared), bool(shared)),
    ]


def main(size: Size, parts: Sequence[str], arms: Sequence[str], seconds_: float) -> None:
    """Measure what was asked for; each part has a results file of its own."""
    for what, wanted, there in (("part", parts, PARTS), ("arm", arms, ARMS)):
        unknown = [name for name in wanted if name not in there]
        if unknown:
            raise RunError(f"speed: there is no {what} {unknown[0]!r}; there are {', '.join(there)}.")
    until = time.perf_counter() + seconds_
    for part in parts:
        if time.perf_counter() > until:
            print(f"{seconds_:.0f} seconds are up before {part}; `--part {part}` measures it alone", flush=True)
            return
        found: Found = {}
        for found in PARTS[part](size, arms, until):
            save(f"speed_{part}", {part: found}, checks(part, found), size.device)
        release()
        if found:
            write(f"speed_{part}", {part: found}, checks(part, found), size.device)
