# SPDX-License-Identifier: Apache-2.0
"""Cases that hold the noise kernels to the eager definition, bit for bit.

Run as a program, on CUDA, or on a CPU under Triton's interpreter:

    TRITON_INTERPRET=1 python -m tests.methods.gaussws_launches [CASE ...]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import lowbits.kernels.gaussws  # noqa: F401  the interpreter's kernels are used where they are loaded
from lowbits.methods._pseudo_noise import _launch, _numerics
from lowbits.methods._pseudo_noise._blocks import counts, from_blocks
from lowbits.methods._pseudo_noise._draw import draw
from lowbits.methods.gaussws import Fidelity, Operator, Plan, PseudoNoise, Storage

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1056, 2048), (70, 200), (33, 31)] if DEVICE == "cuda" else [(33, 40)]
INTS = {2: torch.int16, 4: torch.int32}

CASES: dict[str, tuple[Plan, torch.dtype, torch.dtype]] = {
    # plan, dtype of the weight, dtype of W^ and of its gradient
    "default": (Plan(), torch.float32, torch.bfloat16),
    "values in float32": (Plan(), torch.float32, torch.float32),
    "lite, blocks of 16": (Plan(fidelity=Fidelity.LITE, block=(16, 16)), torch.float32, torch.bfloat16),
    "fine, 8 x 64": (Plan(fidelity=Fidelity.FINE, block=(8, 64)), torch.float32, torch.bfloat16),
    "bfloat16 weights": (Plan(), torch.bfloat16, torch.bfloat16),
    "float16": (Plan(operator=Operator.FP16), torch.float32, torch.float16),
    "no cast": (Plan(operator=Operator.FP32, amplitude=0.506), torch.float32, torch.float32),
    "uniform": (Plan(noise=PseudoNoise.UNIFORM), torch.float32, torch.bfloat16),
    "normal": (Plan(noise=PseudoNoise.NORMAL), torch.float32, torch.bfloat16),
    **{f"stored as {s.value}": (Plan(storage=s), torch.float32, torch.bfloat16) for s in Storage if s.format},
    "blocks of 128": (Plan(block=(128, 128)), torch.float32, torch.bfloat16),
    "blocks of 1 x 32": (Plan(block=(1, 32)), torch.float32, torch.bfloat16),
}


def same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors have the same bits, signs of zeros included."""
    return x.dtype == y.dtype and torch.equal(x.view(INTS[x.element_size()]), y.view(INTS[y.element_size()]))


def differences(plan: Plan, dtype: torch.dtype, out: torch.dtype, shape: tuple[int, int]) -> Iterator[str]:
    """Yield what differs between kernel and definition; the definition runs on the CPU."""
    generator = torch.Generator().manual_seed(1)
    w = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    w[: plan.block[0], : plan.block[1]] = 0
    w[0, 0] = -0.0
    w[-1] *= 1e-3
    b_i = torch.randn(counts(shape, plan.block), generator=generator) * 2
    g = torch.randn(shape, generator=generator).to(out)
    counter, origin = torch.tensor([7, 0xFFFFFFF1, 0x9ABCDEF0]), (3, 5)
    y, slopes = _numerics.forward(w, b_i, counter, plan, origin)
    bits = _numerics.backward(g, slopes, counter, plan, origin)
    on = [t.to(DEVICE) for t in (w, b_i, counter, g)]
    assert _launch.launchable(on[0], plan)
    y2, slopes2 = _launch.add_noise(on[0], on[1], on[2], plan, origin, out)
    dw, bits2 = _launch.gradients(on[3], on[2], slopes2, plan, origin, dtype)
    r = from_blocks(draw(plan.noise, plan.fidelity, counts(shape, plan.block), plan.block, counter), shape, plan.block)
    r2 = _launch.draw(on[2], plan, shape)
    of_weight = {"R": (r, r2), "W^": (y.to(out), y2), "dL/dW": (g.to(dtype), dw)}
    of_blocks = {"slopes": (slopes, slopes2), "dL/db": (bits, bits2)}
    for name, (expected, found) in (of_weight | of_blocks).items():
        if not same(expected, found.cpu()):
            yield f"{shape}, {name}: {int((expected != found.cpu()).sum())} of {expected.numel()}"


def main() -> None:
    wanted, failed = sys.argv[1:], 0
    for name, (plan, dtype, out) in CASES.items():
        if wanted and name not in wanted:
            continue
        found = next((d for shape in SHAPES for d in differences(plan, dtype, out, shape)), None)
        failed += found is not None
        print(f"{name}: {found or 'equal'}", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
