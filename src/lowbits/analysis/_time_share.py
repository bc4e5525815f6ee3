# SPDX-License-Identifier: Apache-2.0
"""Measure where the time of a transformer block goes, by family of operations.

Total kernel time counts, not the average per kernel name; and a kernel belongs to the family of the aten operation
that launched it, not to what its name contains (on Hopper few GEMM kernels are called `cutlass` or `ampere`).
Arithmetic alone would give the linear layers of GPT-2, forward and backward,

    24 d^2 / (24 d^2 + 4 s d)          of the FLOPs, d the width and s the sequence length,

which falls with s and rises with d.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile


class Family(Enum):
    """What an operation is for."""

    LINEAR = "linear"
    ATTENTION = "attention"
    NORM = "norm"
    ELEMENTWISE = "elementwise"
    OTHER = "other"


# In a transformer block every two-dimensional product is a linear layer and every batched one is attention.
_EXACT = {
    Family.LINEAR: "mm addmm linear _int_mm _scaled_mm",
    Family.ATTENTION: "bmm baddbmm softmax _softmax _softmax_backward_data _safe_softmax",
    Family.NORM: "native_layer_norm native_layer_norm_backward layer_norm rms_norm _fused_rms_norm "
    "_fused_rms_norm_backward",
    Family.ELEMENTWISE: "add add_ sub mul mul_ div div_ neg pow rsqrt sqrt exp tanh tanh_backward gelu gelu_backward "
    "silu silu_backward sum mean cat copy_ _to_copy to clone contiguous fill_ zero_ zeros ones_like where masked_fill "
    "native_dropout native_dropout_backward bernoulli_ round clamp clamp_ abs amax amin max maximum",
}
_FAMILY = {f"aten::{op}": family for family, ops in _EXACT.items() for op in ops.split()}
_ATTENTION = "attention"  # aten::_scaled_dot_product_flash_attention, aten::_cudnn_attention_forward, ...


@dataclass(frozen=True)
class TimeShare:
    """Time per repeat by family.

    Args:
        milliseconds: device time per family, every family present, per repeat.
        unclassified: milliseconds by operation of what fell under `other`, largest first.
    """

    milliseconds: dict[Family, float]
    unclassified: dict[str, float]

    def share(self, family: Family) -> float:
        """Return the family's part of the total time, 0 to 1.

        Args:
            family: which one.
        """
        return self.milliseconds[family] / sum(self.milliseconds.values())


def family_of(operation: str) -> Family:
    """Return the family of an operation as the profiler names it.

    Args:
        operation: for example `aten::addmm`.
    """
    if operation.startswith("aten::") and _ATTENTION in operation:
        return Family.ATTENTION
    return _FAMILY.get(operation, Family.OTHER)


def time_share(run: Callable[[], object], device: torch.device, repeats: int = 10) -> TimeShare:
    """Profile a function and add up its time by family.

    On CUDA the time of a kernel goes to the operation that launched it; kernels that no operation launched count as
    `other`. On a CPU it is each operation's own time; the framework's overhead (views, autograd's bookkeeping) counts
    as `other`.

    Args:
        run: one forward and backward pass; runs once before the measurement.
        device: where it runs.
        repeats: passes under the profiler.
    Returns:
        Milliseconds per pass.
    """
    cuda = device.type == "cuda"
    run()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as profiler:
        for _ in range(repeats):
            run()
        if cuda:
            torch.cuda.synchronize(device)
    rows = list(profiler.key_averages())
    operations = [(r.key, r.self_device_time_total if cuda else r.self_cpu_time_total) for r in rows if _on_host(r)]
    if cuda:
        kernels = sum(r.self_device_time_total for r in rows if not _on_host(r))
        operations.append(("kernels without an operation", max(0.0, kernels - sum(time for _, time in operations))))
    return classify((name, time / 1000 / repeats) for name, time in operations)


def _on_host(row: FunctionEventAvg) -> bool:
    return row.device_type is not None and row.device_type.name == "CPU"


def classify(operations: Iterable[tuple[str, float]]) -> TimeShare:
    """Add up times by family.

    Args:
        operations: `(operation, milliseconds)`; a name may come more than once.
    """
    totals = dict.fromkeys(Family, 0.0)
    unclassified: dict[str, float] = {}
    for name, milliseconds in operations:
        family = family_of(name)
        totals[family] += milliseconds
        if family is Family.OTHER and milliseconds > 0:
            unclassified[name] = unclassified.get(name, 0.0) + milliseconds
    return TimeShare(totals, dict(sorted(unclassified.items(), key=lambda item: -item[1])))


def linear_flops_share(width: int, length: int) -> float:
    """Return the share of a GPT-2 block's FLOPs that its linear layers do: 24 d^2 / (24 d^2 + 4 s d).

    Counts a causal attention at its full square, as the study does.

    Args:
        width: d, > 0.
        length: s, tokens.
    """
    return 24 * width**2 / (24 * width**2 + 4 * length * width)
