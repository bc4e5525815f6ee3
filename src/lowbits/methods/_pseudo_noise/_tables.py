# SPDX-License-Identifier: Apache-2.0
"""What the report shows of noisy weights: bits by layer, blocks at a bound, survival of the noise, exported size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbits.methods._contract import Table
from lowbits.methods._pseudo_noise._blocks import to_blocks
from lowbits.methods._pseudo_noise._export import Aggregate, ladder_sizes, weights_with_bits
from lowbits.methods._pseudo_noise._formats import LADDER, SMALLEST_LADDER
from lowbits.methods._pseudo_noise._numerics import FEWEST_BITS, cast, steps
from lowbits.methods._pseudo_noise._weight import NoisyWeight

_MOST_COLUMNS = 16  # of the map of bits


def bit_metrics(model: nn.Module) -> dict[str, float]:
    """Return mean, lowest and highest b_t over all blocks, and the share of blocks at a bound."""
    found = [weight for _, weight in weights_with_bits(model).values()]
    if not found:
        return {}
    bits = torch.cat([weight.bits().flatten() for weight in found])
    bounds = torch.cat(
        [torch.full((weight.b_i.numel(),), weight.plan.most_bits) for weight in found if weight.b_i is not None]
    )
    hits = ((bits <= FEWEST_BITS) | (bits >= bounds.to(bits.device))).float().mean()
    told = torch.stack([bits.mean(), bits.amin(), bits.amax(), hits]).tolist()
    return dict(zip(("bits", "bits, lowest", "bits, highest", "blocks at a bound"), told, strict=True))


@torch.no_grad()
def survival(w: Tensor, weight: NoisyWeight) -> tuple[float, float]:
    """Draw the noise once and return the share of it that the cast keeps, and of weights that it leaves as they are.

    Args:
        w: the weight.
        weight: its noise.
    Returns:
        The share of elements with R != 0 whose W^ differs from cast(W); the share of all elements with W^ = cast(W).
    """
    assert weight.b_i is not None
    blocks = to_blocks(w.detach().float(), weight.plan.block)
    amax = blocks.abs().amax(-1)
    delta, _ = steps(amax, weight.b_i.detach().float(), weight.plan)
    r = weight.noise(w)
    same = cast(blocks + r * delta.unsqueeze(-1), amax, weight.plan) == cast(blocks, amax, weight.plan)
    inside = to_blocks(torch.ones_like(w, dtype=torch.bool), weight.plan.block)
    drawn = inside & (r != 0)
    kept = 1 - (same & drawn).sum() / drawn.sum().clamp(min=1)
    return float(kept), float((same & inside).sum() / inside.sum())


def bit_tables(model: nn.Module) -> tuple[Table, ...]:
    """Return the tables of a model whose weights have bit-widths; none where it has no noise."""
    found = weights_with_bits(model)
    return (_layers(found), _map(found), _sizes(model, found)) if found else ()


def _layers(found: dict[str, tuple[nn.Parameter, NoisyWeight]]) -> Table:
    rows = []
    for name, (w, weight) in found.items():
        bits = weight.bits()
        low, high = int((bits <= FEWEST_BITS).sum()), int((bits >= weight.plan.most_bits).sum())
        kept, untouched = survival(w, weight)
        rows.append(
            (name, bits.numel(), bits.mean().item(), bits.amin().item(), bits.amax().item(), low, high, kept, untouched)
        )
    columns = ("layer", "blocks", "mean bits", "lowest", "highest", "at the lower bound", "at the upper bound")
    shares = ("noise that survives the cast", "weights left as they are")
    note = (
        "Bits b_t of every block after training. Survival: of the elements that drew noise, those that the cast to "
        "operator or storage still moves; weights left as they are: all others, whose value was seen without noise."
    )
    return Table("bits and noise by layer", (*columns, *shares), tuple(rows), note)


def _map(found: dict[str, tuple[nn.Parameter, NoisyWeight]]) -> Table:
    """Share of a layer's blocks in intervals of bits."""
    bits = {name: weight.bits().flatten().cpu() for name, (_, weight) in found.items()}
    low = min(b.amin().item() for b in bits.values())
    high = max(b.amax().item() for b in bits.values())
    width = next(w for w in (0.05, 0.1, 0.25, 0.5, 1.0, 2.0) if high - low < w * (_MOST_COLUMNS - 1))
    first = int(low / width)
    number = int(high / width) - first + 1
    rows = []
    for name, b in bits.items():
        places = (b.double() / width).long() - first
        counted = torch.bincount(places, minlength=number)
        rows.append((name, *(share if share else None for share in (counted / b.numel()).tolist())))
    heads = tuple(f"{(first + i) * width:g} -" for i in range(number))
    note = f"Share of a layer's blocks whose bits lie in an interval of {width:g}, which begins at the head's number."
    return Table("bit-width map", ("layer", *heads), tuple(rows), note, shaded=1.0)


def _sizes(model: nn.Module, found: dict[str, tuple[nn.Parameter, NoisyWeight]]) -> Table:
    rungs = ladder_sizes(model)
    weights = sum(w.numel() for w, _ in found.values())
    rows: list[tuple[str | float | None, ...]] = [(r.format, r.blocks, r.weights / weights, r.bytes) for r in rungs]
    overhead = sum(-(-weight.bits().numel() // 2) for _, weight in found.values())
    total = sum(r.bytes for r in rungs) + overhead
    whole = sum(r.bytes for r in ladder_sizes(model, Aggregate.LAYER)) + overhead
    six = sum(r.bytes for r in ladder_sizes(model, ladder=SMALLEST_LADDER)) + overhead
    rows += [
        ("which format, 4 bits a block", None, None, overhead),
        ("all", sum(r.blocks for r in rungs), 1.0, total),
        ("all, one format a layer", None, 1.0, whole),
        ("all, e2m3 instead of e4m3", None, 1.0, six),
        ("all in bf16", None, 1.0, 2 * weights),
    ]
    words = ", ".join(f"{fmt.name} up to {fmt.mantissa_bits + 2}" for fmt in LADDER[:-1])
    note = (
        f"Each block in the smallest format that its bits allow ({words} bits), an exponent byte a block; exact bytes."
    )
    return Table("size on the ladder of formats", ("format", "blocks", "share of weights", "bytes"), tuple(rows), note)
