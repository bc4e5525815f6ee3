# SPDX-License-Identifier: Apache-2.0
"""Ask a device what it can do: which of our kernels run there, and what it multiplies, by multiplying there."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from contextlib import nullcontext
from functools import cache
from types import ModuleType

import torch

from lowbits.formats import IntFormat
from lowbits.kernels._coded import of_blocks
from lowbits.quantizers import QuantSpec


@cache
def kernels(name: str) -> ModuleType | None:
    """Return a module of kernels; None where triton is not installed.

    Args:
        name: of a file of this package in Triton's language.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"lowbits.kernels.{name}")


@torch.compiler.assume_constant_result
def launches(name: str, device: torch.device) -> bool:
    """Return whether kernels run on a device: CUDA, or a CPU where Triton interprets them, which only tests ask for.

    Args:
        name: as in `kernels`.
        device: any.
    """
    if device.type == "cuda":
        return kernels(name) is not None
    return f"lowbits.kernels.{name}" in sys.modules and bool(sys.modules["triton"].knobs.runtime.interpret)


def on_device(device: torch.device) -> torch.cuda.device | nullcontext[None]:
    """Return the context in which Triton launches on a device.

    Args:
        device: any.
    """
    there = device.type != "cuda" or device.index == torch.cuda.current_device()
    return nullcontext() if there else torch.cuda.device(device)


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many programs a CUDA device runs side by side.

    Args:
        device: with CUDA.
    """
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def torch_has_block_scales(device: torch.device) -> bool:
    """Return whether torch multiplies FP8 with a scale for 128 elements of the contraction, which newer cuBLAS does.

    Args:
        device: with CUDA.
    """
    if device.type != "cuda":
        return False
    one = torch.ones(256, 512, device=device).to(torch.float8_e4m3fn)
    rows, tiles = torch.ones(4, 256, device=device), torch.ones(2, 4, device=device)
    try:
        for scale_b in (tiles.t(), rows):
            torch.ops.aten._scaled_mm(one, one.t(), rows.t(), scale_b, out_dtype=torch.bfloat16)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return True


def missing_unit(spec: QuantSpec, device: torch.device) -> str | None:
    """Say which GEMM a device does not have; None if it multiplies such codes.

    Args:
        spec: of an operand that is legal on hardware.
        device: any.
    """
    if of_blocks(spec) and not launches("gemm", device):
        return f"{device} has no FP8 GEMM with block scales: it is Triton's"
    return _missing("int8" if isinstance(spec.format, IntFormat) else "FP8", device)


@torch.compiler.assume_constant_result
def _missing(kind: str, device: torch.device) -> str | None:
    return _found_missing(kind, device)


@cache
def _found_missing(kind: str, device: torch.device) -> str | None:
    if kind == "int8" and device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return f"{device} has no int8 GEMM here: it is Triton's, and triton is not installed"
    if kind == "int8" and device.type in ("cpu", "cuda"):
        return None  # exact on any of them; how fast is another question
    if device.type != "cuda":
        return f"{device} has no {kind} GEMM"
    one = torch.ones(32, 32, device=device).to(torch.float8_e4m3fn)
    scale = torch.ones(32, 1, device=device)
    try:
        torch.ops.aten._scaled_mm(one, one.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"{device} has no FP8 GEMM ({str(error).splitlines()[0]})"
    return None
