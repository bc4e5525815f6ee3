# SPDX-License-Identifier: Apache-2.0
"""Hold the kernels of block formats to the definition, bit for bit; a program, since Triton's interpreter is chosen
before Triton is loaded:

    TRITON_INTERPRET=1 python -m tests.kernels.blocks
    python -m tests.kernels.blocks 0 8      # on CUDA, an eighth: most of the time goes into compiling
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import lowbits.kernels.columns  # noqa: F401  the interpreter's kernels are used where they are loaded
from lowbits.kernels import pack_operand, quantize_operand, unpack_operand
from lowbits.nn import convert_, set_step_
from lowbits.quantizers import Noise, QuantSpec, quantize
from lowbits.recipes import NAMED, named

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL = DEVICE == "cuda"  # where nothing is interpreted
RECIPES = NAMED if FULL else {
    name: named(name)
    for name in ("nvfp4", "nvfp4_pow2", "nvfp4_up", "nvfp4_sr_floor", "nvfp4_sr_24bit", "nvfp4_rht_32", "mxfp4",
                 "mxfp4_floor", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8", "fp8_block")
}  # fmt: skip
SPECS = {str(spec): spec for recipe in RECIPES.values() for gemm in recipe.gemms.values() for spec in gemm if spec}
# A transposed view that fills no tile; odd sizes. Larger ones where they are not interpreted.
SHAPES = [(70, 112, True), (5, 17, False)]
SHAPES += [(96, 128, False), (33, 48, False), (1000, 4096, True), (4096, 1008, False)] if FULL else []


def matrix(rows: int, columns: int, transposed: bool, dtype: torch.dtype) -> Tensor:
    """Many magnitudes, a row of zeros, and one number that is far too large for its neighbours."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, columns, generator=generator) * 10 ** torch.randn(rows, columns, generator=generator)
    x[3], x[1, 2] = 0.0, 3e4
    x = x.to(dtype).to(DEVICE)
    return x.t() if transposed else x


def counted(spec: QuantSpec, x: Tensor) -> dict[str, int] | None:
    """Count the differing elements of each result; None where the kernels leave the spec alone."""
    noise = torch.tensor([3 << 33 | 5, *Noise.of(1, "layer", "role").key], device=DEVICE)
    dtype = torch.bfloat16
    decoded, packed = quantize_operand(x, spec, noise, 1, dtype), pack_operand(x, spec, noise, 1)
    if decoded is None or packed is None:
        return None
    q = quantize(x, spec, spec.draw(Noise((noise[1], noise[2])), x.shape, noise[0], device=DEVICE))
    unpacked, stored, (inner, outer) = unpack_operand(packed, dtype), q.pack(), q.factors()
    assert unpacked is not None and packed.shape == stored.shape
    pairs = {"inner": (decoded.inner, inner.to(dtype)), "unpacked": (unpacked.inner, inner.to(dtype))}
    pairs |= {"codes": (packed.codes, stored.codes), "scale": (packed.scale, stored.scale)}
    if outer is not None:
        pairs |= {"outer": (decoded.outer, outer), "unpacked outer": (unpacked.outer, outer)}  # type: ignore[dict-item]
    same = {
        name: a.shape == b.shape and bool(torch.equal(a.nan_to_num(), b.nan_to_num())) for name, (a, b) in pairs.items()
    }
    return {name: int((pairs[name][0] != pairs[name][1]).sum()) for name, fine in same.items() if not fine}


def layers() -> None:
    """A layer that runs the kernels, and one that does not: output and gradients, bit for bit."""
    for name in ("nvfp4", "mxfp4", "mxfp8", "fp8_block") if FULL else ("nvfp4",):
        results = []
        for fast in (True, False):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(48, 80)).to(DEVICE)
            convert_(model, named(name), verbose=False)
            set_step_(model, 7)
            if not fast:
                model[0].observer = lambda *_: None  # wants the definition's own tensors
            x = torch.randn(64, 48, generator=torch.Generator().manual_seed(2)).to(DEVICE).requires_grad_()
            with torch.autocast(DEVICE, torch.bfloat16):
                y = model(x)
            y.backward(torch.randn(64, 80, generator=torch.Generator().manual_seed(3)).to(DEVICE).to(y.dtype))
            results.append((y.detach(), x.grad, model[0].weight.grad))
        fine = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        print(f"layer, {name}: {'equal' if fine else 'differ'}")


def special() -> None:
    """Zeros, infinities, NaN, subnormals in every place."""
    for name, spec in SPECS.items():
        for value in (0.0, torch.inf, torch.nan, 1e-40, 3e38) if FULL else (torch.inf, torch.nan, 1e-40):
            x = torch.full((32, 64), 1.5, device=DEVICE)
            x[4, 5:20] = value
            found = counted(spec, x)
            if found:
                print(f"{name}, {value}: differ {found}")
            if found is None:
                break


def main(part: int = 0, parts: int = 1) -> None:
    covered = 0
    for name, spec in sorted(SPECS.items())[part::parts]:
        for rows, columns, transposed in SHAPES:
            for dtype in (torch.bfloat16, torch.float32) if FULL or rows == 5 else (torch.bfloat16,):
                found = counted(spec, matrix(rows, columns, transposed, dtype))
                covered += found is not None
                if found:
                    print(f"{name}, {rows}x{columns}{' transposed' if transposed else ''}, {dtype}: differ {found}")
    print(f"{covered} cases")
    if part == 0:
        special()
        layers()
    if not covered:
        sys.exit("no case was covered")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
