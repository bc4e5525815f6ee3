# SPDX-License-Identifier: Apache-2.0
"""Write torchao.npz: what torchao 0.17.0 makes of a few tensors on CPU.

    pip install torchao==0.17.0 && python tests/golden/make_torchao.py

NAME is a tensor `x.NAME`. Codes are one a byte, scales are as stored.

    nvfp4.NAME.{codes,scales}     nvfp4_quantize with the tensor's own amax (two levels)
    mx.NAME.{codes,scales}        to_mx, blocks of 32; [element, rule, ...] in the order of ELEMENTS and RULES
    fp8.NAME.{codes,scales}       hp_tensor_to_float8_dynamic; [e4m3 e5m2, tensor row, exact pow2, ...], encode scales
    e2m1.codes                    f32_to_f4_unpacked of all 65,536 patterns of bf16
    edges.{mx,fp8}.{x,scales}     E2M1 rounded up, E4M3 by rows with pow2: amax one unit above max times 2^n
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torchao
from torch import Tensor
from torchao.float8.config import ScalingGranularity
from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
from torchao.float8.float8_training_tensor import LinearMMConfig
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
from torchao.prototype.mx_formats.kernels import f32_to_f4_unpacked, unpack_uint4
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

ELEMENTS = {
    "e2m1": torch.float4_e2m1fn_x2,
    "e2m3": DTYPE_FP6_E2M3,
    "e3m2": DTYPE_FP6_E3M2,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
RULES = {"floor": "FLOOR", "up": "RCEIL", "ceil": "CEIL", "even": "EVEN"}


def tensors() -> dict[str, Tensor]:
    """Gaussian, heavy-tailed, of columns that differ by orders of magnitude, tiny, with zero blocks, and ties."""
    random = np.random.default_rng(0)
    normal = lambda: torch.from_numpy(random.standard_normal((8, 64)).astype(np.float32))  # noqa: E731
    columns = torch.exp(3 * normal()[:1])
    found = {"gauss": normal(), "heavy": normal() * torch.exp(2 * normal()), "columns": normal() * columns}
    found |= {"tiny": 1e-30 * normal(), "zero_blocks": normal()}
    found["zero_blocks"][:, 16:48] = 0
    found["ties"] = torch.from_numpy(random.integers(-24, 25, (8, 64)).astype(np.float32)) / 4
    found["ties"][:, ::16] = 6
    rounded = {name: x.bfloat16().float() for name, x in found.items()}
    return {**rounded, "gauss32": normal(), "columns32": normal() * columns}


def nvfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    scales, packed = nvfp4_quantize(x, 16, per_tensor_amax_to_scale(x.abs().max()))
    return unpack_uint4(packed), scales.view(torch.uint8)


def mx(x: Tensor, element: str, rule: str) -> tuple[Tensor, Tensor]:
    scales, codes = to_mx(x, ELEMENTS[element], 32, ScaleCalculationMode[RULES[rule]])
    codes = unpack_uint4(codes) if element == "e2m1" else codes.view(torch.uint8)
    return codes, scales.view(torch.uint8)


def fp8(x: Tensor, element: str, kind: str, power_of_two: bool) -> tuple[Tensor, Tensor]:
    per_row = {"scaling_granularity": ScalingGranularity.AXISWISE, "axiswise_dim": -1} if kind == "row" else {}
    cast = hp_tensor_to_float8_dynamic(
        x, ELEMENTS[element], LinearMMConfig(), round_scales_to_power_of_2=power_of_two, **per_row
    )
    return cast._data.view(torch.uint8), cast._scale


def every_bf16() -> Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def edges(largest: float) -> Tensor:
    """Rows whose largest magnitude is the next float32 above `largest` * 2^n, n = -12 .. 12."""
    tops = torch.nextafter(largest * torch.exp2(torch.arange(-12.0, 13.0)), torch.tensor(torch.inf))
    return tops[:, None] * torch.cat([torch.ones(1), torch.linspace(-0.9, 0.9, 31)])


def stacked(pairs: list[tuple[Tensor, Tensor]], *shape: int) -> tuple[Tensor, Tensor]:
    codes, scales = (torch.stack([pair[i] for pair in pairs]) for i in (0, 1))
    return codes.unflatten(0, shape), scales.unflatten(0, shape)


def main() -> None:
    golden: dict[str, Tensor] = {"e2m1.codes": f32_to_f4_unpacked(every_bf16())}
    for name, x in tensors().items():
        golden[f"x.{name}"] = x
        found = {"nvfp4": nvfp4(x)}
        if name in ("heavy", "zero_blocks", "columns32"):
            found["mx"] = stacked([mx(x, e, r) for e in ELEMENTS for r in RULES], 5, 4)
            casts = [fp8(x, e, k, p) for e in ("e4m3", "e5m2") for k in ("tensor", "row") for p in (False, True)]
            found["fp8"] = stacked([(codes, scales.expand(8, 1)) for codes, scales in casts], 2, 2, 2)
        for kind, (codes, scales) in found.items():
            golden[f"{kind}.{name}.codes"], golden[f"{kind}.{name}.scales"] = codes, scales
    golden["edges.mx.x"], golden["edges.fp8.x"] = edges(6.0), edges(448.0)
    golden["edges.mx.scales"] = mx(edges(6.0), "e2m1", "up")[1]
    golden["edges.fp8.scales"] = fp8(edges(448.0), "e4m3", "row", True)[1]
    file = Path(__file__).with_name("torchao.npz")
    np.savez_compressed(file, version=np.array(torchao.__version__), **{k: v.numpy() for k, v in golden.items()})


if __name__ == "__main__":
    main()
