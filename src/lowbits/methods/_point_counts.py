# SPDX-License-Identifier: Apache-2.0
"""Share learned points out over the weights of a model by their gradients. Polino et al. 2018, arXiv:1802.05668."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbits.errors import SpecError
from lowbits.methods._weight_views import viewed


def gradient_norms(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any]
) -> dict[str, float]:
    """Return the norm of each quantized weight's gradient, averaged over batches before the norm is taken.

    The published code averages 5 batches for images and 1 for translation.

    Args:
        model: after `learn_points_`; its own gradients are left as they are.
        loss: `(model, batch) -> scalar`.
        batches: a few.
    Returns:
        ||mean gradient of Q(w)||_2 by name.
    """
    places = [place for place, _ in viewed(model)]
    frozen = [place.parameter.requires_grad for place in places]
    for place in places:
        place.parameter.requires_grad_(True)  # the gradient passes the points straight through
    total = [torch.zeros_like(place.parameter) for place in places]
    number = 0
    try:
        for batch in batches:
            found = torch.autograd.grad(loss(model, batch), [p.parameter for p in places], materialize_grads=True)
            for sum_, gradient in zip(total, found, strict=True):
                sum_ += gradient
            number += 1
    finally:
        for place, before in zip(places, frozen, strict=True):
            place.parameter.requires_grad_(before)
    return {place.name: (sum_.norm() / max(number, 1)).item() for place, sum_ in zip(places, total, strict=True)}


def redistribute(counts: Mapping[str, int], norms: Mapping[str, float]) -> dict[str, int]:
    """Give weights with large gradients more points.

    Each keeps floor(n / 2), and what becomes free is shared in proportion to the norms, by largest remainder; a tie
    goes to the name that sorts first, so the order of the weights does not matter.

    Args:
        counts: points of each weight.
        norms: see `gradient_norms`; the same names.
    Returns:
        New counts with the same sum.
    Raises:
        SpecError: other names, or norms that are negative or not finite.

    >>> redistribute(dict.fromkeys("abcd", 16), {"a": 1.0, "b": 1.0, "c": 1.0, "d": 5.0})
    {'a': 12, 'b': 12, 'c': 12, 'd': 28}
    """
    if set(counts) != set(norms):
        raise SpecError(f"redistribute: names differ: {sorted(set(counts) ^ set(norms))[:4]}.")
    if bad := [name for name, norm in norms.items() if not (math.isfinite(norm) and norm >= 0)]:
        raise SpecError(f"redistribute: the gradient of {bad[0]} has the norm {norms[bad[0]]}; it must be finite.")
    kept = {name: count // 2 for name, count in counts.items()}
    free, whole = sum(counts.values()) - sum(kept.values()), math.fsum(norms.values())
    shares = {name: free * (norm / whole if whole else 1 / len(norms)) for name, norm in norms.items()}
    given = {name: math.floor(share) for name, share in shares.items()}
    order = sorted(shares, key=lambda name: (given[name] - shares[name], name))
    for name in order[: free - sum(given.values())]:
        given[name] += 1
    return {name: kept[name] + given[name] for name in counts}
