# SPDX-License-Identifier: Apache-2.0
"""What does each part of the NVFP4 recipe do to one trained model? A minute on a CPU instead of hours of training.

    python -m experiments.nvfp4_pretraining.fixed_checkpoint
    python -m experiments.nvfp4_pretraining.fixed_checkpoint --data tinyshakespeare.txt --seeds 0 1

A byte-level language model as the paper builds its own (RMSNorm, squared ReLU, no biases; 4 layers of width 64) is
trained in float32 for 300 steps. With its weights fixed, every recipe is compared with high precision on the same
tokens: the rise of the validation loss, and the relative error of the gradient of all quantized weights. With
stochastic rounding the gradient is drawn 24 times: the error of a single draw, and that of their mean, which is what an
optimizer that averages over steps suffers from.

Weights rounded to nearest move the loss up or down by chance, to first order in the rounding: <dL/dW, W_hat - W>. That
term is computed and taken off, and the rise is the mean over ten checkpoints, 10 steps apart; the uncorrected rises
stand beside it in the results.

At this size the loss cannot tell the effects of the backward pass (arXiv:2509.25149 saw them beyond 1e12 tokens), and
nothing here is gated on them. Writes benchmarks/results/<device>/nvfp4_fixed_checkpoint.json.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbits.analysis import device_name, provenance
from lowbits.nn import Gemm, Recipe, convert_, quantized_layers, set_step_
from lowbits.quantizers import Rounding, quantize
from lowbits.recipes import named

LAYERS, WIDTH, HEADS, LENGTH, BATCH = 4, 64, 4, 64, 16
STEPS, WARMUP, PEAK = 300, 20, 3e-3
CHECKPOINTS = tuple(range(210, 301, 10))
DRAWS = 24
VALIDATION_BATCHES = 4
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

FORWARD = ("nvfp4", "nvfp4_sr_forward", "nvfp4_w1d", "nvfp4_pow2", "mxfp4", "mxfp6_e2m3", "mxfp8")
"""Recipes whose forward pass is compared by its loss."""
BACKWARD: dict[str, Recipe] = {
    "backward only, SR": replace(named("nvfp4"), fprop=Gemm()),
    "backward only, nearest": replace(named("nvfp4_no_sr"), fprop=Gemm()),
    "backward only, SR, scales rounded up": replace(named("nvfp4_up"), fprop=Gemm()),
    "backward only, SR, without Hadamard": replace(named("nvfp4_no_rht"), fprop=Gemm()),
    "forward only": named("nvfp4_forward"),
    "full": named("nvfp4"),
    "full, MXFP4": named("mxfp4"),
    "full, Hadamard 2": named("nvfp4_rht_2"),
    "full, Hadamard 4": named("nvfp4_rht_4"),
    "full, Hadamard 32": named("nvfp4_rht_32"),
    "full, Hadamard 128": named("nvfp4_rht_128"),
}
"""Recipes that are compared by their gradients."""


def standard_text() -> bytes:
    """Return 0.3 MB of text that every Python has: the source of some of its modules."""
    modules = (argparse, csv, inspect, statistics, textwrap, torch.nn.modules.loss, torch.nn.modules.conv)
    return "\n".join(inspect.getsource(module) for module in modules).encode()


class Text:
    """Bytes as tokens: the last tenth validates.

    Args:
        raw: the text.
    """

    def __init__(self, raw: bytes) -> None:
        tokens = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()
        cut = len(tokens) * 9 // 10
        self.train, self.validation = tokens[:cut], tokens[cut:]

    def batch(self, generator: torch.Generator) -> Tensor:
        """Return random windows of the training part, int64 [BATCH, LENGTH]."""
        starts = torch.randint(len(self.train) - LENGTH, (BATCH,), generator=generator)
        return torch.stack([self.train[s : s + LENGTH] for s in starts.tolist()])

    def validation_batches(self, number: int) -> list[Tensor]:
        """Return windows spread evenly over the validation part."""
        starts = torch.linspace(0, len(self.validation) - LENGTH, number * BATCH).long()
        windows = torch.stack([self.validation[s : s + LENGTH] for s in starts.tolist()])
        return list(windows.split(BATCH))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, dim=-1))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(-2))
        return x + self.down(functional.relu(self.up(self.norms[1](x))).square())


class Model(nn.Module):
    """Returns logits [batch, length, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm, self.lm_head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean of -log p(next byte), nats."""
    return functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train_checkpoints(text: Text, seed: int, at: Sequence[int] = CHECKPOINTS) -> Iterator[nn.Module]:
    """Train a model in float32 and yield it, its layers converted and in high precision, after the steps of `at`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model()
    convert_(model, Recipe(), seed=seed, verbose=False)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(max(at)):
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min((step + 1) / WARMUP, 1.0)
        loss_of(model, text.batch(generator)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in at:
            yield model


@contextmanager
def under(model: nn.Module, recipe: Recipe) -> Iterator[None]:
    """Within the block all layers follow a recipe."""
    for layer in quantized_layers(model).values():
        layer.recipe = recipe
    try:
        yield
    finally:
        for layer in quantized_layers(model).values():
            layer.recipe = Recipe()


@torch.no_grad()
def loss_under(model: nn.Module, recipe: Recipe, batches: Sequence[Tensor]) -> float:
    """Return the mean loss over batches; each has random bits of its own."""
    losses = []
    with under(model, recipe):
        for number, ids in enumerate(batches):
            set_step_(model, number)
            losses.append(loss_of(model, ids).item())
    return statistics.fmean(losses)


def rises(
    model: nn.Module, batches: Sequence[Tensor], names: Sequence[str] = FORWARD
) -> tuple[dict[str, float], dict[str, float]]:
    """Return by how much each named recipe raises the loss above high precision's, nats.

    Args:
        model: converted.
        batches: the same for all.
        names: of recipes.
    Returns:
        Without and with the first-order effect of weights that are rounded to nearest.
    """
    base = loss_under(model, Recipe(), batches)
    found = {name: loss_under(model, named(name), batches) - base for name in names}
    weights = [layer.weight for layer in quantized_layers(model).values()]
    slopes = torch.autograd.grad(torch.stack([loss_of(model, ids) for ids in batches]).mean(), weights)
    corrected = {name: rise - _first_order(weights, slopes, named(name)) for name, rise in found.items()}
    return corrected, found


def _first_order(weights: Sequence[Tensor], slopes: Sequence[Tensor], recipe: Recipe) -> float:
    """<dL/dW, W_hat - W>; 0 where rounding is unbiased, since every batch draws anew."""
    spec = recipe.fprop.rhs
    if spec is None or spec.rounding is not Rounding.NEAREST:
        return 0.0
    moved = [quantize(w.detach(), spec).dequantize() - w.detach() for w in weights]
    return sum((slope * move).sum().item() for slope, move in zip(slopes, moved, strict=True))


def mean_rises(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean over checkpoints."""
    return {name: statistics.fmean(row[name] for row in found) for name in found[0]}


def gradient(model: nn.Module, recipe: Recipe, ids: Tensor, draw: int = 0) -> Tensor:
    """Return the gradient of all quantized weights as one vector."""
    weights = [layer.weight for layer in quantized_layers(model).values()]
    set_step_(model, draw)
    with under(model, recipe):
        found = torch.autograd.grad(loss_of(model, ids), weights)
    return torch.cat([g.flatten() for g in found]).double()


def gradient_errors(model: nn.Module, recipe: Recipe, ids: Tensor, draws: int = DRAWS) -> dict[str, float]:
    """Return the relative errors of a single draw (their mean) and of the mean of the draws.

    They are the same where nothing is random: the error stays however long one averages.
    """
    exact = gradient(model, Recipe(), ids)
    if not recipe.stochastic:
        draws = 1
    drawn = [gradient(model, recipe, ids, draw) - exact for draw in range(draws)]
    norm = exact.norm()
    single = statistics.fmean((error.norm() / norm).item() for error in drawn)
    return {"single": single, "mean": (torch.stack(drawn).mean(0).norm() / norm).item()}


def measure(text: Text, seed: int) -> dict[str, object]:
    """Train one model and measure everything on its checkpoints; gradients on the last."""
    batches = text.validation_batches(VALIDATION_BATCHES)
    found, raw, model = [], [], None
    for model in train_checkpoints(text, seed):
        corrected, uncorrected = rises(model, batches)
        found.append(corrected)
        raw.append(uncorrected)
    assert model is not None
    mean = mean_rises(found)
    return {
        "seed": seed,
        "loss": loss_under(model, Recipe(), batches),
        "rise_of_the_loss": mean,
        "rise_over_nvfp4": {name: rise / mean["nvfp4"] for name, rise in mean.items()},
        "rise_uncorrected": mean_rises(raw),
        "rise_by_checkpoint": dict(zip(map(str, CHECKPOINTS), found, strict=True)),
        "gradient_error": {name: gradient_errors(model, recipe, batches[0]) for name, recipe in BACKWARD.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a text file; the source of some of Python's modules if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    told = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    text = Text(told.data.read_bytes() if told.data else standard_text())
    shape = {"layers": LAYERS, "width": WIDTH, "length": LENGTH, "batch": BATCH, "steps": STEPS, "draws": DRAWS}
    path = RESULTS / device_name(device) / "nvfp4_fixed_checkpoint.json"
    name = told.data.name if told.data else "modules of the standard library"
    found: list[dict[str, object]] = []
    for seed in told.seeds:
        found.append(measure(text, seed))
        print(json.dumps(found[-1], indent=1), flush=True)
        texts = json.loads(path.read_text(encoding="utf-8"))["texts"] if path.exists() else {}
        whole = {"provenance": provenance(device), "shape": shape, "texts": {**texts, name: found}}
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
