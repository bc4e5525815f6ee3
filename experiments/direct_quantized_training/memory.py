# SPDX-License-Identifier: Apache-2.0
"""`memory`: bytes a parameter of a real step, by CUDA's allocator; `largest`: the largest model that one GPU trains.

A step of few tokens, so that activations are nothing beside weights, gradients and states: what the allocator held at
the peak, over the number of parameters. Includes every temporary of a layer and of the update.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.direct_quantized_training.model import Llama, Shape
from experiments.direct_quantized_training.results import Check, write
from lowbits.data import TokenData
from lowbits.errors import LowbitsError
from lowbits.methods.dqt import materialize_
from lowbits.nn import Execution, Grid
from lowbits.optim import AdamW4bit, AdamW8bit, CodecOptimizer, Lion8bit, StepInBackward, step_in_backward
from lowbits.quantizers import Rounding

MIDDLE = Shape(32_000, 4096, 11_008, 32, 32, recompute=True, sub_norms=False)
"""Llama 7B: embedding and head, which stay bfloat16, are 4 % of it."""
WIDE = Shape(32_000, 8192, 22_016, 1, 64, recompute=True, sub_norms=False)
"""The width of a 65B model; `largest` looks for the number of layers."""
DEVICE = "cuda"
WARMUP = 10  # steps of `pretrain`
LIMITS = {"int8 AdamW8bit": 3.2, "ternary AdamW8bit": 2.5, "ternary AdamW4bit": 1.5}


@dataclass
class Trained:
    """A model that takes steps.

    Args:
        step: runs forward, backward and update on ids, and returns the loss.
        parameters: how many.
        optimizer: of all of them.
        handle: of updates in the backward pass; they keep the model alive until they are removed.
    """

    step: Callable[[Tensor], Tensor]
    parameters: int
    optimizer: torch.optim.Optimizer
    handle: StepInBackward | None = None

    def close(self) -> None:
        if self.handle is not None:
            self.handle.remove()


Build = Callable[[Shape, float], Trained]


def codes(bits: float, make: Callable[..., CodecOptimizer], native: bool = False) -> Build:
    """Weights as codes, updates in the backward pass, the rest bfloat16 and stochastically rounded."""

    def build(shape: Shape, lr: float) -> Trained:
        with torch.device("meta"):
            model = Llama(shape)
        execution = Execution.NATIVE if native else Execution.SIMULATED
        materialize_(model, Grid.of(bits), DEVICE, execution=execution)
        optimizer = make(model.parameters(), lr=lr, rounding=Rounding.STOCHASTIC)
        handle = step_in_backward(model, optimizer)

        def step(ids: Tensor) -> Tensor:
            loss = model(ids)
            loss.backward()
            return loss.detach()

        return Trained(step, sum(p.numel() for p in model.parameters()), optimizer, handle)

    return build


def floats(dtype: torch.dtype, make: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer], bits: bool) -> Build:
    """Float weights and torch's or a peer's optimizer; all gradients exist together. `bits`: BitNet's recipe."""

    def build(shape: Shape, lr: float) -> Trained:
        with torch.device(DEVICE):
            torch.set_default_dtype(dtype)
            model = Llama(shape)
            torch.set_default_dtype(torch.float32)
        if bits:
            from lowbits import recipes
            from lowbits.nn import convert_

            convert_(model, recipes.named("bitnet_b158"), verbose=False)
        optimizer = make(model.parameters())
        for group in optimizer.param_groups:
            group["lr"] = lr

        def step(ids: Tensor) -> Tensor:
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = model(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return Trained(step, sum(p.numel() for p in model.parameters()), optimizer)

    return build


def torchao_int8(shape: Shape, lr: float) -> Trained:
    """torchao's int8 quantized training with its 8-bit AdamW."""
    from torchao.optim import AdamW8bit as Theirs  # type: ignore[import-not-found]
    from torchao.prototype.quantized_training import int8_weight_only_quantized_training  # type: ignore
    from torchao.quantization import quantize_  # type: ignore[import-not-found]

    with torch.device(DEVICE):
        torch.set_default_dtype(torch.bfloat16)
        model = Llama(shape)
        torch.set_default_dtype(torch.float32)
    head: nn.Module = model.lm_head
    model.lm_head = nn.Identity()  # type: ignore[assignment]
    quantize_(model, int8_weight_only_quantized_training())
    model.lm_head = head  # type: ignore[assignment]
    optimizer = Theirs(model.parameters(), lr=lr)

    def step(ids: Tensor) -> Tensor:
        loss = model(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Trained(step, sum(p.numel() for p in model.parameters()), optimizer)


def torchao_8bit(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit as Theirs  # type: ignore[import-not-found]

    return Theirs(parameters, bf16_stochastic_round=True)


def bitsandbytes_8bit(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit as Theirs  # type: ignore[import-not-found]

    return Theirs(parameters)


def fused(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, fused=True)


WAYS: dict[str, Build] = {
    "ternary AdamW4bit": codes(1.58, AdamW4bit),
    "ternary AdamW8bit": codes(1.58, AdamW8bit),
    "ternary Lion8bit": codes(1.58, Lion8bit),
    "int4 AdamW8bit": codes(4, AdamW8bit),
    "int8 AdamW8bit": codes(8, AdamW8bit),
    "torchao int8 quantized training": torchao_int8,
    "bf16, torchao AdamW8bit": floats(torch.bfloat16, torchao_8bit, False),
    "bf16, bitsandbytes AdamW8bit": floats(torch.bfloat16, bitsandbytes_8bit, False),
    "bf16, torch fused AdamW": floats(torch.bfloat16, fused, False),
    "BitNet, float32 masters, torch fused AdamW": floats(torch.float32, fused, True),
}
"""Ways to train, leanest first."""
GUESSES = {
    "ternary AdamW4bit": 122, "ternary AdamW8bit": 74, "ternary Lion8bit": 120, "int4 AdamW8bit": 66,
    "int8 AdamW8bit": 56, "torchao int8 quantized training": 32, "bf16, torchao AdamW8bit": 27,
    "bf16, bitsandbytes AdamW8bit": 27, "bf16, torch fused AdamW": 20, "BitNet, float32 masters, torch fused AdamW": 9,
}  # fmt: skip
"""Layers at which `largest` begins: 140 GB over the bytes of 0.81 billion parameters."""


def bytes_a_parameter(names: list[str], layers: int) -> None:
    """Write benchmarks/results/<device>/dqt_memory.json."""
    found: dict[str, dict[str, object]] = {}
    for name in names:
        found[name] = told = measured(name, replace(MIDDLE, layers=layers), tokens=33)
        print(f"{name}: {told}", flush=True)
    claims = [
        Check(f"bytes {name}", f"at most {limit} bytes a parameter", f"{found[name].get('bytes_a_parameter')}",
              float(str(found[name].get("bytes_a_parameter", 99))) <= limit)
        for name, limit in LIMITS.items() if name in found
    ]  # fmt: skip
    write("memory", {"shape": asdict(replace(MIDDLE, layers=layers)), "ways": found}, claims, torch.device("cuda"))


def measured(name: str, shape: Shape, tokens: int) -> dict[str, object]:
    """Three steps: the allocator's peak in the last, and what stays after it, over the number of parameters."""
    clear()
    trained, seconds = None, 0.0
    try:
        trained = WAYS[name](shape, 1e-4)
        ids = torch.randint(0, shape.vocab, (1, tokens), device=DEVICE)
        for _ in range(3):
            torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            trained.step(ids)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
        peak, resident, count = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated(), trained.parameters
    except ImportError as error:
        return {"not measured": f"{error.name} is not installed"}
    except torch.OutOfMemoryError:
        return {"not measured": "out of memory"}
    finally:
        if trained is not None:
            trained.close()
        del trained
        clear()
    return {
        "parameters": count, "peak_bytes": peak, "resident_bytes": resident, "bytes_a_parameter": peak / count,
        "resident_bytes_a_parameter": resident / count, "step_seconds": seconds,
    }  # fmt: skip


def clear() -> None:
    """Give everything back; hooks of updates in backward tie cycles."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def fits(name: str, layers: int, tokens: int) -> bool:
    return "peak_bytes" in measured(name, replace(WIDE, layers=layers), tokens)


def largest(names: list[str], tokens: int, guesses: dict[str, int]) -> None:
    """The most layers of width 8192 whose training step fits, by trying; written after every way."""
    path = None
    found: dict[str, dict[str, object]] = {}
    for name in names:
        begin = time.perf_counter()
        layers = search(name, guesses.get(name, 8), tokens)
        told: dict[str, object] = {"layers": layers, "parameters": replace(WIDE, layers=layers).parameters}
        if layers:
            told |= measured(name, replace(WIDE, layers=layers), tokens)
        found[name] = told | {"seconds": round(time.perf_counter() - begin, 1)}
        print(f"{name}: {found[name]}", flush=True)
        path = write("largest", {"tokens": tokens, "ways": found}, [], torch.device("cuda"))
    print(path)


def search(name: str, guess: int, tokens: int) -> int:
    """Up or down from a guess by a sixteenth of it, then by halves down to a fiftieth; 0: not even one layer fits."""
    stride, fine = max(1, guess // 16), max(1, guess // 50)
    low, high = 0, guess
    if fits(name, guess, tokens):
        low, high = guess, guess + stride
        while fits(name, high, tokens):
            low, high = high, high + stride
    else:
        while high > 1 and not low:
            tried = max(1, high - stride)
            low, high = (tried, high) if fits(name, tried, tokens) else (0, tried)
    while low and high - low > fine:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(name, middle, tokens) else (low, middle)
    return low


def pretrain(data: Path, layers: int, steps: int, sequences: int, length: int, way: str, lr: float) -> None:
    """Full training steps on real text at the chosen size; the loss of every step, and the peak, are printed."""
    tokens = TokenData.open(data)
    shape = replace(WIDE, layers=layers, vocab=-(-tokens.vocab_size // 8) * 8)
    begin = time.perf_counter()
    trained = WAYS[way](shape, lr)
    torch.cuda.synchronize()
    made = time.perf_counter() - begin
    print(f"{trained.parameters / 1e9:.2f}B parameters in {made:.0f} s", flush=True)
    torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], []
    for step in range(steps):
        for group in trained.optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP)
        ids = tokens.batch("train", step, batch_size=sequences, block=length, seed=0).to(DEVICE)
        begin = time.perf_counter()
        losses.append(float(trained.step(ids)))
        seconds.append(time.perf_counter() - begin)
        peak = torch.cuda.max_memory_allocated()
        print(f"step {step}: loss {losses[-1]:.4f}, {seconds[-1]:.2f} s, peak {peak / 2**30:.1f} GiB", flush=True)
    content = {
        "way": way, "shape": asdict(shape), "parameters": trained.parameters, "lr": lr, "sequences": sequences,
        "length": length, "losses": losses, "step_seconds": seconds, "peak_bytes": torch.cuda.max_memory_allocated(),
        "made_in_seconds": made,
    }  # fmt: skip
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    checks = [
        Check("size", "at least 30 billion parameters", f"{trained.parameters / 1e9:.2f}B", trained.parameters >= 30e9),
        Check("loss", "the mean of the last five losses is below that of the first five", f"{first:.3f} -> {last:.3f}",
              last < first),
    ]  # fmt: skip
    if not losses:
        raise LowbitsError("pretrain: no steps were asked for.")
    write("pretrain", content, checks, torch.device("cuda"))
