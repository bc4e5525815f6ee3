# SPDX-License-Identifier: Apache-2.0
"""The random Hadamard transform: published signs, exactness, cancellation in products, what it does to outliers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbits.errors import SpecError
from lowbits.formats import E2M1
from lowbits.quantizers import NVFP4_SIGNS, Hadamard, PerGroup, QuantSpec, TwoLevel, quantize
from tests.oracles import nvfp4 as oracle

RHT = Hadamard(16, signs=NVFP4_SIGNS, dtype=torch.bfloat16)
SIZES = [2, 4, 8, 16, 32, 64, 128]


def test_the_published_signs():
    assert NVFP4_SIGNS == oracle.TE_SIGNS
    assert "".join("+" if s > 0 else "-" for s in NVFP4_SIGNS) == "+++-+------+-+--"


def test_w5_worked_example():
    third = 8 * torch.eye(16)[3]
    assert RHT.forward(third[None])[0].tolist() == 4 * [-2, 2, 2, -2]
    ones = torch.ones(1, 16)
    assert RHT.forward(ones)[0].tolist() == [-1, 0, 1, 0, 1, 0, -1, 0, 1, 2, 1, 0, 1, 0, 1, -2]
    assert Hadamard(16, dtype=torch.bfloat16).forward(ones)[0].tolist() == [4] + 15 * [0]  # why signs matter


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [None, 3])
def test_c6_the_matrix_is_sylvesters_and_orthonormal(size, seed):
    matrix = (Hadamard(size) if seed is None else Hadamard.random(size, seed)).forward(torch.eye(size)).double()
    # 1 / sqrt(size) is exact for 4, 16, 64; otherwise it is rounded once, and products of two add in eye.
    exact = size in (4, 16, 64)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size).double(), rtol=0, atol=0 if exact else 1e-7)
    signs = tuple(matrix[:, 0].sign().int().tolist())  # Sylvester's first column is all ones
    np.testing.assert_allclose(matrix.numpy(), oracle.hadamard(size, signs), rtol=1e-7, atol=0)
    assert seed is not None or set(signs) == {1}


def test_sixteen_is_a_quarter_and_exact_in_bf16():
    matrix = RHT.forward(torch.eye(16))
    assert (matrix.abs() == 0.25).all()
    assert np.array_equal(matrix.numpy(), oracle.hadamard(16, NVFP4_SIGNS))


@given(st.integers(1, 20), st.integers(1, 70), st.integers(0, 2**32 - 1), st.sampled_from([16, 32, 128]))
def test_any_length_is_filled_up_with_zeros(rows, length, seed, size):
    x = torch.randn(rows, length, generator=torch.Generator().manual_seed(seed)).bfloat16()
    rotation = Hadamard.random(size, seed=5)
    y = rotation.forward(x)
    assert y.shape == (rows, rotation.padded(length)) and y.shape[1] % size == 0 and y.shape[1] - length < size
    exact = oracle.rotate(x.double().numpy(), oracle.hadamard(size, rotation.signs))
    # log2(size) float32 sums of terms below the norm sqrt(size) * 8, then one product.
    np.testing.assert_allclose(y.numpy(), exact, rtol=1e-6, atol=8 * 2**-24 * size**0.5)
    full = torch.nn.functional.pad(x, (0, -length % size))
    assert torch.equal(rotation.forward(full), y)
    back = rotation.inverse(y)
    torch.testing.assert_close(back[:, :length], x.float(), rtol=0, atol=1e-5)
    assert back[:, length:].abs().max() < 1e-5 if length % size else True


@given(st.integers(1, 12), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_bf16_sums_are_rounded_once_as_transformer_engine_rounds_them(rows, length, seed):
    # Integers of 8 bits times 2^0 .. 2^8: sums of 16 are exact in float32 in any order, so that the last rounding is
    # all there is, with ties among it.
    random = np.random.default_rng(seed)
    x = random.integers(-255, 256, (rows, length)) * 2.0 ** random.integers(0, 9, (rows, length))
    assert np.array_equal(RHT.forward(torch.from_numpy(x)).numpy(), oracle.rotate_as_te(x))


def test_c6_the_transform_cancels_in_a_product():
    generator = torch.Generator().manual_seed(0)
    g, x = (torch.randn(n, 75, generator=generator, dtype=torch.float64) for n in (9, 7))
    matrix = oracle.hadamard(16, NVFP4_SIGNS)
    rotated = oracle.rotate(g.numpy(), matrix) @ oracle.rotate(x.numpy(), matrix).T
    np.testing.assert_allclose(rotated, (g @ x.t()).numpy(), rtol=0, atol=1e-12)
    # The library's is float32: 16 terms, then a product of 75 terms.
    exact = Hadamard(16, signs=NVFP4_SIGNS)
    product = exact.forward(g).double() @ exact.forward(x).double().t()
    torch.testing.assert_close(product, g @ x.t(), rtol=0, atol=1e-5)


def outliers() -> torch.Tensor:
    """1 % of the numbers are 30 times larger."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 1024, generator=generator)
    return torch.where(torch.rand(x.shape, generator=generator) < 0.01, 30 * x, x).bfloat16().float()


def test_what_it_does_to_outliers_and_what_it_does_not():
    # Section 2.4: kurtosis 245 -> 18 and a seventh of the inliers that are flushed to zero, but the relative error
    # rises, from 0.082 to 0.112. Another draw of the same distribution, hence the margins.
    x = outliers()
    kurtosis = lambda t: ((t - t.mean()) ** 4).mean() / t.var() ** 2  # noqa: E731
    assert kurtosis(x) > 150 and kurtosis(RHT.forward(x)) < 25
    plain = quantize(x, QuantSpec(E2M1, PerGroup(16), TwoLevel()))
    rotated = quantize(x, QuantSpec(E2M1, PerGroup(16), TwoLevel(), transform=RHT))
    inliers = x.abs() < 5
    flushed = [(q.dequantize()[inliers] == 0).float().mean() for q in (plain, rotated)]
    assert flushed[1] < flushed[0] / 5
    small, large = (((q.dequantize() - x).norm() / x.norm()).item() for q in (plain, rotated))
    assert small == pytest.approx(0.082, rel=0.1) and large == pytest.approx(0.112, rel=0.1)


def test_decoding_returns_to_the_basis_and_the_length():
    x = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    q = quantize(x, QuantSpec(E2M1, PerGroup(16), TwoLevel(), transform=RHT))
    assert q.values.shape == (5, 64) and q.dequantize().shape == (5, 50)
    assert (q.dequantize() - x).norm() < 0.15 * x.norm()
    stored = q.pack()
    assert stored.shape == (5, 50) and torch.equal(stored.unpack().dequantize(), q.dequantize())
    assert stored.nbytes() == 5 * 32 + 5 * 4 + 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, from inside inductor
def test_a_compiled_transform_rounds_to_bf16_too(compile_backend):
    x = torch.randn(67, 160, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(RHT.forward, fullgraph=True, backend=compile_backend, dynamic=False)
    assert torch.equal(compiled(x), RHT.forward(x))


def test_rounding_to_bf16_is_the_cast():
    random = torch.randint(-(2**31), 2**31, (1 << 18,), generator=torch.Generator().manual_seed(0))
    ties = torch.arange(-(2**31), 2**31, 1 << 14)  # every bf16, and the quarters between them
    y = torch.cat([random, ties]).to(torch.int32).view(torch.float32)
    y = y[y.isfinite()]
    groups = (y / 4)[:, None].expand(-1, 4)  # whose transform is (y / 2, 0, 0, 0)
    got, exact = (Hadamard(4, dtype=dtype).forward(groups) for dtype in (torch.bfloat16, torch.float32))
    assert torch.equal(got, exact.bfloat16().float())
    assert Hadamard(4, dtype=torch.bfloat16).forward(torch.tensor([[float("nan"), 1, 1, 1]])).isnan().all()


def test_impossible_rotations_are_refused():
    for size in (0, 1, 12):
        with pytest.raises(SpecError, match="power of two"):
            Hadamard(size)
    with pytest.raises(SpecError, match="16 numbers 1 or -1"):
        Hadamard(16, signs=(1, -1))
    with pytest.raises(SpecError, match=r"float32 or torch\.bfloat16, got torch\.float16"):
        Hadamard(16, dtype=torch.float16)


def test_random_signs_are_a_function_of_the_seed():
    signs = [Hadamard.random(128, seed).signs for seed in range(20)]
    assert len(set(signs)) == 20 and signs[3] == Hadamard.random(128, 3).signs
    assert abs(np.mean(signs)) < 4 / (20 * 128) ** 0.5  # four standard errors
