# SPDX-License-Identifier: Apache-2.0
"""How much a unit matters, and which units go next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lowbits.errors import SpecError
from lowbits.methods.geta._graph import Graph
from lowbits.methods.geta._schedule import Target


def unit_sums(graph: Graph, products: Mapping[str, Tensor]) -> Tensor:
    """Add up elements by unit, over all slices that are driven to zero with it.

    Args:
        graph: with N units.
        products: one tensor a parameter, of its shape.
    Returns:
        float32 `[N]`, on the tensors' device.
    """
    device = next(iter(products.values())).device
    rows: dict[tuple[str, int], Tensor] = {}
    sums = []
    for dimension in graph.dimensions:
        total = torch.zeros(dimension.size + 1, device=device)  # the last one takes slices of no unit
        for member in dimension.members:
            if member.zeroed and member.name in products:
                key = member.name, member.axis
                if key not in rows:
                    x = products[member.name]
                    rows[key] = (
                        x.float().sum([i for i in range(x.ndim) if i != member.axis]) if x.ndim > 1 else x.float()
                    )
                total.index_add_(0, member.index.to(device) % (dimension.size + 1), rows[key])
        sums.append(total[:-1])
    return torch.cat(sums)


def saliency(norm2: Tensor, dot: Tensor, update2: Tensor, count: Tensor) -> Tensor:
    """Return how much each unit matters: five scores, each divided by its norm over all units, a fifth each.

        ||x_g||,  ||x_g|| / |x_g|,  cos(x_g, u_g) + 1,  |<x_g, u_g>|,  <x_g, u_g>^2 / 2        (the authors' code)

    Args:
        norm2: ||x_g||^2, float `[N]`.
        dot: <x_g, u_g>, where u is the direction that the optimizer goes against.
        update2: ||u_g||^2.
        count: elements of the unit.
    Returns:
        float `[N]`; the lowest are pruned first.
    """
    norm = norm2.sqrt()
    cosine = dot / (norm * update2.sqrt()).clamp_min(torch.finfo(norm.dtype).tiny)
    scores = (norm, norm / count.clamp_min(1), cosine + 1, dot.abs(), dot.square() / 2)
    total = torch.zeros_like(norm)
    for score in scores:
        total += score / score.norm().clamp_min(torch.finfo(norm.dtype).tiny) / len(scores)
    return total


def check_reachable(sizes: Sequence[int], target: Target) -> None:
    """Raise SpecError if the floors of the dimensions do not let the target's units go.

    Args:
        sizes: units of every dimension.
        target: what is asked.
    """
    free = sum(size - min(target.stays(size), size) for size in sizes)
    if (wanted := target.pruned(sum(sizes))) > free:
        most = free / sum(sizes)
        raise SpecError(
            f"Target: sparsity {target.sparsity:g} prunes {wanted} of {sum(sizes)} units, but with the floor of every "
            f"dimension only {free} can go; ask for at most {most:.3f}, or give a smaller floor."
        )


def lowest(scores: Tensor, live: Tensor, sizes: Sequence[int], target: Target, number: int) -> Tensor:
    """Choose the units that go next, the lowest of all dimensions together, none below its dimension's floor.

    Args:
        scores: float `[N]`.
        live: bool `[N]`, units not pruned yet.
        sizes: units of every dimension, N in all.
        target: has the floors.
        number: how many.
    Returns:
        bool `[N]` with `number` of the live units, fewer if the floors leave fewer.
    """
    free = torch.zeros_like(live)
    begin = 0
    for size in sizes:
        part = slice(begin, begin + size)
        allowed = max(int(live[part].sum()) - target.stays(size), 0)
        ordered = torch.where(live[part], scores[part], torch.inf).argsort(stable=True)
        free[begin + ordered[:allowed]] = True
        begin += size
    free &= live
    order = torch.where(free, scores, torch.inf).argsort(stable=True)
    chosen = torch.zeros_like(live)
    chosen[order[: min(number, int(free.sum()))]] = True
    return chosen
