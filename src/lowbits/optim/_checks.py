# SPDX-License-Identifier: Apache-2.0
"""Say what is wrong with an optimizer's arguments, groups and gradients before anything is changed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor

from lowbits.errors import SpecError

REMEDIES = {
    "amsgrad": "AMSGrad is not offered",
    "block_wise": "codecs are block-wise; pass first= and second= for others",
    "capturable": "steps can be captured as they are; leave it out",
    "differentiable": "steps are not recorded by autograd",
    "foreach": "all tensors are updated in a few launches anyway; leave it out",
    "fused": "all tensors are updated in a few launches anyway; leave it out",
    "is_paged": "pass offload=True, which keeps the moments in pinned host memory",
    "max_grad_norm": "pass clip=GlobalNorm(limit)",
    "maximize": "negate the loss",
    "optim_bits": "pass codecs, or use the constructor with 8bit in its name",
    "percentile_clipping": "pass clip=Percentile(percentile)",
}
"""What to do in place of arguments that other libraries have."""


def check_options(optimizer: str, given: Mapping[str, object], known: Set[str]) -> None:
    """Raise SpecError for the first keyword argument that no optimizer takes."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise SpecError(f"{optimizer}: no argument is called {name!r}: {REMEDIES.get(name, hint)}.")


def check_group(optimizer: str, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise where a parameter group overrides what does not exist, or with a value out of range.

    Keys that resemble none of the optimizer's are the user's own (`name`, `initial_lr`) and pass.

    Raises:
        SpecError: names the key, its value and the rule.
    """
    known = [*defaults, "params", "param_names"]
    for key, value in group.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
            if near or hasattr(value, "encode_"):
                options = near[0] if near else ", ".join(k for k, v in defaults.items() if hasattr(v, "encode_"))
                raise SpecError(f"{optimizer}: a group overrides {key!r}, which does not exist; there is {options}.")
    merged = {**defaults, **group}
    check_not_negative(optimizer, **{k: merged[k] for k in ("eps", "weight_decay", "momentum") if k in merged})
    if isinstance(merged.get("betas"), tuple | list):
        check_betas(optimizer, merged["betas"])
    check_lr(optimizer, merged.get("lr", 0.0))


def check_lr(optimizer: str, lr: float | Tensor) -> None:
    """Raise SpecError unless it is a number of at least 0, or a float32 tensor of no dimension that holds one."""
    if isinstance(lr, Tensor) and (lr.ndim or lr.dtype != torch.float32):
        raise SpecError(
            f"{optimizer}: lr is a number or a float32 tensor of no dimension, got {lr.dtype} {tuple(lr.shape)}. "
            "torch.tensor(1e-3) makes one."
        )
    if not lr >= 0:
        raise SpecError(f"{optimizer}: lr is at least 0, got {float(lr)}.")


def check_parameters(optimizer: str, params: Iterable[Tensor], earlier: Iterable[Tensor]) -> None:
    """Raise where a parameter is no real float or comes twice.

    Args:
        optimizer: its class, for the message.
        params: of a new group.
        earlier: those of all groups before.
    Raises:
        SpecError: a parameter is complex or integer, or has been seen before.
    """
    seen = {id(p) for p in earlier}
    for index, p in enumerate(params):
        if not isinstance(p, Tensor):  # which torch refuses
            continue
        where = f"{optimizer}: parameter {index} of the group, {p.dtype} {tuple(p.shape)},"
        if not p.dtype.is_floating_point:
            raise SpecError(f"{where} is no real float. Leave it out, or view a complex one by torch.view_as_real.")
        if id(p) in seen:
            raise SpecError(f"{where} comes twice and would be updated twice a step. Leave out the second one.")
        seen.add(id(p))


def check_gradient(optimizer: str, name: str, p: Tensor, shape: torch.Size) -> None:
    """Raise where a gradient is of a kind that no rule can use, or the parameter is no longer what it was.

    Args:
        optimizer: its class, for the message.
        name: of the parameter, for the message.
        p: the parameter, with a gradient.
        shape: that it had when its state was made.
    Raises:
        SpecError: the gradient is sparse, complex or integer, or a shape changed.
    """
    g = p.grad
    assert g is not None
    if g.layout != torch.strided or not g.dtype.is_floating_point or not p.dtype.is_floating_point:
        raise SpecError(
            f"{optimizer}: parameter {name}, {p.dtype}, has a {g.layout} gradient of {g.dtype}; dense real floats are "
            "needed. For nn.Embedding pass sparse=False."
        )
    if not p.shape == g.shape == shape:
        raise SpecError(
            f"{optimizer}: parameter {name} is {tuple(p.shape)}, its gradient {tuple(g.shape)}, its state was made for "
            f"{tuple(shape)}. After a change of shape make a new optimizer."
        )
    if g.device != p.device:
        raise SpecError(f"{optimizer}: parameter {name} is on {p.device}, its gradient on {g.device}. Move one.")


def check_not_negative(optimizer: str, **values: float | Tensor) -> None:
    """Raise SpecError for the first hyper-parameter below 0 or NaN."""
    for name, value in values.items():
        if not isinstance(value, Tensor | tuple) and not value >= 0:
            raise SpecError(f"{optimizer}: {name} is at least 0, got {value}.")


def check_betas(optimizer: str, betas: Iterable[float]) -> None:
    """Raise SpecError unless every decay rate is in [0, 1)."""
    if not all(0 <= beta < 1 for beta in betas):
        raise SpecError(f"{optimizer}: betas are in [0, 1), got {tuple(betas)}.")
