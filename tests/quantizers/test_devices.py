# SPDX-License-Identifier: Apache-2.0
"""A CUDA device computes the CPU's codes and scales, bit for bit, under every rule (G1 for the eager path)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbits.formats import E2M1, E2M3, E3M2, E4M3, E5M2, INT8
from lowbits.kernels import scaled_mm
from lowbits.quantizers import (
    NVFP4_SIGNS,
    AbsMean,
    Amax,
    BlockRounding,
    Hadamard,
    Microscaling,
    Noise,
    Order,
    PerGroup,
    PerRow,
    PerTensor,
    PerTile,
    PowerOfTwo,
    QTensor,
    QuantSpec,
    ReciprocalAmax,
    Rounding,
    SharedExponent,
    TwoLevel,
    quantize,
)  # fmt: skip
from lowbits.recipes import NAMED

RHT = Hadamard(16, signs=NVFP4_SIGNS, dtype=torch.bfloat16)
SPECS = [
    *(QuantSpec(E2M1, PerGroup(16), TwoLevel(order)) for order in Order),
    QuantSpec(E2M1, PerTile(16, 16), TwoLevel()),
    QuantSpec(E2M1, PerGroup(16), TwoLevel(power_of_two=True, rounding=BlockRounding.UP)),
    QuantSpec(E2M1, PerGroup(16), TwoLevel(), transform=RHT),
    QuantSpec(E2M1, PerGroup(16), TwoLevel(), transform=Hadamard.random(128, seed=1, dtype=torch.bfloat16)),
    *(QuantSpec(E2M1, PerGroup(16), TwoLevel(), r, RHT) for r in Rounding if r is not Rounding.NEAREST),
    *(QuantSpec(E4M3, PerGroup(32), Microscaling(rule)) for rule in SharedExponent),
    *(QuantSpec(fmt, PerGroup(32), Microscaling()) for fmt in (E2M1, E2M3, E3M2, E5M2)),
    *(QuantSpec(E4M3, kind, ReciprocalAmax()) for kind in (PerTensor(), PerRow())),
    QuantSpec(E4M3, PerTile(128, 128), PowerOfTwo()),
    *(QuantSpec(INT8, kind, Amax()) for kind in (PerTensor(), PerRow(), PerGroup(16))),
]
# A mean has no order of summation that devices share.
NAMED_ONES = {
    spec for recipe in NAMED.values() for gemm in recipe.gemms.values() for spec in gemm
    if spec is not None and not isinstance(spec.scale, AbsMean)
}  # fmt: skip


def data(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(333, 517, generator=generator)
    tail = torch.exp(2 * torch.randn(x.shape, generator=generator))
    edges = torch.nextafter(x.sign() * torch.exp2((4 * x).round()) * 1.75, torch.zeros(()))
    return {"gauss": x, "heavy": x * tail, "tiny": 1e-30 * x, "bf16": x.bfloat16(), "edges": edges}[name]


def encoded(x: Tensor, spec: QuantSpec, device: str) -> QTensor:
    noise = spec.draw(Noise.of(0, "x", "devices"), x.shape, 3, device=device)
    return quantize(x.to(device), spec, noise)


def differing(one: QTensor, other: QTensor) -> list[str]:
    """Which parts are not the same bits."""
    stored, there = one.pack(), other.pack()
    parts = zip(("codes", "scale", "zero point", "outer"), stored.tensors(), there.tensors(), strict=True)
    return [name for name, a, b in parts if a is not None and b is not None and not torch.equal(a, b.to(a.device))]


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [*SPECS, *sorted(NAMED_ONES - set(SPECS), key=str)], ids=str)
@pytest.mark.parametrize("name", ["gauss", "heavy", "tiny", "bf16", "edges"])
def test_g1_codes_and_scales_are_the_cpus(spec, name):
    x = data(name)
    assert differing(encoded(x, spec, "cpu"), encoded(x, spec, "cuda")) == []


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_decoded_numbers_are_the_cpus(spec):
    x = data("gauss")
    here, there = (encoded(x, spec, device).dequantize().cpu() for device in ("cpu", "cuda"))
    assert torch.equal(here, there)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[5], SPECS[4], SPECS[10]], ids=str)
def test_g2_products_are_within_the_bound(spec):
    a, b = (encoded(data(name), spec, "cuda") for name in ("gauss", "heavy"))
    exact = a.rotated().double() @ b.rotated().double().t()
    size = a.rotated().double().abs() @ b.rotated().double().abs().t()
    got = scaled_mm(a, b, torch.bfloat16)
    # bf16 rounds once, by 2^-8 of the number at most; decoding with the tensor's scale inside costs 2^-23 here.
    assert ((got.double() - exact).abs() <= 2**-8 * exact.abs() + 2e-6 * size).all()
    assert (got == exact.float().bfloat16()).float().mean() >= 0.999
