# SPDX-License-Identifier: Apache-2.0
"""Find the channels of a linear layer's input that are much larger than the rest.

    c_j = max over tokens |x_j|          ratio = max_j c_j / median_j c_j          outliers = { j : c_j > 6 median }

A few such channels set the scale of a whole row and push all others towards code 0; they persist over layers and over
training (Dettmers et al. 2022, arXiv:2208.07339, sec. 4), which the Jaccard overlap of the lists shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from lowbits.analysis._evaluating import evaluating
from lowbits.analysis._linears import linear_layers

OUTLIER_RATIO = 6.0

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class ChannelStatistics:
    """How unevenly the channels of one layer's input are filled.

    Args:
        ratio: largest channel maximum over the median one; inf where the median is 0.
        outliers: channels above 6 medians, ascending.
        kurtosis: fourth standardised moment of all entries; 3 for a Gaussian.
        amax: per-channel maxima, float32 `[K]`.
        tokens: tokens seen.
    """

    ratio: float
    outliers: tuple[int, ...]
    kurtosis: float
    amax: Tensor = field(repr=False, compare=False)
    tokens: int = 0


def input_channels(
    model: nn.Module, run: Callable[[nn.Module, Batch], object], batches: Iterable[Batch]
) -> dict[str, ChannelStatistics]:
    """Run batches through the model and describe the input of every linear layer.

    Args:
        model: run in `eval` mode without gradients.
        run: `(model, batch)` runs one forward pass; its result is ignored.
        batches: what to run.
    Returns:
        Statistics by layer name, in the order of the model; layers that never ran are left out.
    """
    seen: dict[str, _Running] = {}
    with torch.no_grad(), evaluating(model), _watching(model, seen):
        for batch in batches:
            run(model, batch)
    return {name: seen[name].finish() for name in linear_layers(model) if name in seen}


def describe_channels(x: Tensor) -> ChannelStatistics:
    """Describe one matrix of activations.

    Args:
        x: `[..., K]`, float.
    """
    running = _Running(x.shape[-1])
    running.add(x)
    return running.finish()


def jaccard(a: Iterable[int], b: Iterable[int]) -> float:
    """Return the overlap of two sets, `|a & b| / |a | b|`; 1 for two empty ones.

    Args:
        a: channel numbers.
        b: channel numbers.
    """
    left, right = set(a), set(b)
    return len(left & right) / len(left | right) if left | right else 1.0


def overlaps(
    before: Mapping[str, ChannelStatistics], after: Mapping[str, ChannelStatistics]
) -> dict[tuple[str, str], float]:
    """Return the Jaccard overlap of the outlier lists of every two layers of equal width that both have outliers.

    Args:
        before: statistics of a model; give the same mapping twice to compare layers of one model.
        after: statistics of another one, or of the same model at another training step; pairs `(name, name)` then
            tell whether outliers persist over steps.
    Returns:
        Overlap by pair of layer names; for one mapping given twice each unordered pair once.
    """
    pairs = {}
    for i, (left, a) in enumerate(before.items()):
        for j, (right, b) in enumerate(after.items()):
            once = before is not after or i < j
            if once and a.outliers and b.outliers and a.amax.shape == b.amax.shape:
                pairs[left, right] = jaccard(a.outliers, b.outliers)
    return pairs


class _Running:
    """Maxima and power sums of a stream of rows; float64, since fourth powers lose float32 quickly."""

    def __init__(self, channels: int) -> None:
        self.amax = torch.zeros(channels)
        self.powers = torch.zeros(4, dtype=torch.float64)
        self.count = 0

    def add(self, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).double().cpu()
        self.amax = torch.maximum(self.amax, rows.abs().amax(dim=0).float())
        self.powers += torch.stack([(rows**k).sum() for k in (1, 2, 3, 4)])
        self.count += rows.numel()

    def finish(self) -> ChannelStatistics:
        m1, m2, m3, m4 = (self.powers / self.count).tolist()
        variance = m2 - m1**2
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        median, largest = self.amax.median().item(), self.amax.max().item()
        return ChannelStatistics(
            ratio=largest / median if median > 0 else float("inf"),
            outliers=tuple((self.amax > OUTLIER_RATIO * median).nonzero().flatten().tolist()),
            kurtosis=fourth / variance**2 if variance > 0 else float("nan"),
            amax=self.amax,
            tokens=self.count // self.amax.numel(),
        )


@contextmanager
def _watching(model: nn.Module, seen: dict[str, _Running]) -> Iterator[None]:
    """Feed every linear layer's input to its running statistics."""

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            seen.setdefault(name, _Running(x.shape[-1])).add(x)

        return hook

    handles = [m.register_forward_pre_hook(watch(name)) for name, m in linear_layers(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
