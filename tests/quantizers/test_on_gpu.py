# SPDX-License-Identifier: Apache-2.0
"""The quantizers give the same bits on a GPU as on a CPU, for every spec that a named recipe uses."""

from __future__ import annotations

import pytest
import torch

from lowbits.quantizers import Noise, QuantSpec, quantize
from lowbits.recipes import NAMED

SPECS = sorted({spec for recipe in NAMED.values() for gemm in recipe.gemms.values() for spec in gemm if spec}, key=str)


def differences(spec: QuantSpec, dtype: torch.dtype) -> dict[str, int]:
    """Count the elements of codes and scales that differ between the devices; 70 x 100 fills no group or tile."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(70, 100, generator=generator) * 10 ** torch.randn(70, 100, generator=generator)
    x[5] = 0.0
    x = x.to(dtype)
    packed = []
    for device in ("cpu", "cuda"):
        noise = spec.draw(Noise.of(1, "layer", "role"), x.shape, 3, device=device)
        packed.append(quantize(x.to(device), spec, noise).pack())
    pairs = zip(packed[0].tensors(), packed[1].tensors(), strict=True)
    names = ("codes", "scale", "zero_point", "outer")
    return {
        name: int((a != b.cpu()).sum())
        for name, (a, b) in zip(names, pairs, strict=True) if a is not None and b is not None
    }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_and_scales_are_the_cpus(spec: QuantSpec, dtype: torch.dtype) -> None:
    assert not any(differences(spec, dtype).values())
