# SPDX-License-Identifier: Apache-2.0
"""MXFP4, MXFP6 and MXFP8 bit for bit: microxcaling's and torchao's vectors, the oracle, edges and special values."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbits.errors import SpecError
from lowbits.formats import E2M1, E2M3, E3M2, E4M3, E5M2, E8M0, UINT8, IntFormat
from lowbits.quantizers import Microscaling, PerGroup, PerTile, QTensor, QuantSpec, SharedExponent, quantize
from tests.oracles import microscaling as oracle

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "torchao.npz"
FORMATS = {"e2m1": E2M1, "e2m3": E2M3, "e3m2": E3M2, "e4m3": E4M3, "e5m2": E5M2}
RULES = {
    rule.value: rule for rule in (SharedExponent.FLOOR, SharedExponent.UP, SharedExponent.CEIL, SharedExponent.EVEN)
}
MICROXCALING = {"e2m1": "fp4_e2m1", "e2m3": "fp6_e2m3", "e3m2": "fp6_e3m2", "e4m3": "fp8_e4m3", "e5m2": "fp8_e5m2"}


def encoded(x: np.ndarray, element: str, rule: str) -> QTensor:
    return quantize(torch.from_numpy(x), QuantSpec(FORMATS[element], PerGroup(32), Microscaling(RULES[rule])))


def ours(x: np.ndarray, element: str, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Values and the stored scale bytes."""
    q = encoded(x, element, rule)
    stored = q.pack()
    back = stored.unpack()
    assert torch.equal(back.values, q.values) and torch.equal(back.scale, q.scale)
    assert stored.scale.dtype == torch.uint8
    return q.values.numpy().astype(np.float64), stored.scale.squeeze(-1).numpy()


BOTH = pytest.mark.parametrize("encode", [oracle.quantize, ours], ids=["oracle", "library"])
ELEMENTS = pytest.mark.parametrize("element", list(FORMATS))
ALL_RULES = pytest.mark.parametrize("rule", list(RULES))


@pytest.fixture(scope="module")
def microxcaling(shared_data):
    file = shared_data / "golden" / "mx_microxcaling.npz"
    if not file.exists():
        pytest.skip(f"no vectors of microxcaling: {file} does not exist")
    return np.load(file)


@pytest.fixture(scope="module")
def torchao():
    return np.load(GOLDEN)


@BOTH
@ELEMENTS
def test_c3_every_number_of_microxcaling(microxcaling, element, encode):
    values, scales = encode(microxcaling["x"], element, "floor")
    expected = microxcaling[f"{MICROXCALING[element]}.block32.floor_scale.round_even"]
    assert np.array_equal(oracle.decoded(values, scales), expected)


@ELEMENTS
def test_dequantize_is_microxcalings_output(microxcaling, element):
    expected = microxcaling[f"{MICROXCALING[element]}.block32.floor_scale.round_even"]
    assert np.array_equal(encoded(microxcaling["x"], element, "floor").dequantize().numpy(), expected)


def test_integers_are_microxcalings_int8(microxcaling):
    fmt = IntFormat("mxint8", 8, lowest=False)  # k there is k / 64, under a scale of 64 times as much
    q = quantize(torch.from_numpy(microxcaling["x"]), QuantSpec(fmt, PerGroup(32), Microscaling(SharedExponent.FLOOR)))
    assert np.array_equal(q.dequantize().numpy(), microxcaling["int8.block32.floor_scale.round_even"])


def codes_of(values: np.ndarray, element: str) -> np.ndarray:
    """Sign and magnitude; the magnitude's code is its place in the grid."""
    grid = oracle.GRIDS[element]
    sign_bit = {"e2m1": 8, "e2m3": 32, "e3m2": 32, "e4m3": 128, "e5m2": 128}[element]
    return np.searchsorted(grid, np.abs(values)) + sign_bit * np.signbit(values)


@BOTH
@ELEMENTS
@ALL_RULES
@pytest.mark.parametrize("name", ["heavy", "zero_blocks", "columns32"])
def test_c3_every_byte_of_torchaos_to_mx(torchao, name, element, rule, encode):
    index = list(oracle.ELEMENTS).index(element), ["floor", "up", "ceil", "even"].index(rule)
    values, scales = encode(torchao[f"x.{name}"], element, rule)
    assert np.array_equal(scales, torchao[f"mx.{name}.scales"][index])
    assert np.array_equal(codes_of(values, element), torchao[f"mx.{name}.codes"][index])


def test_torchaos_logarithm_saturates_where_the_rule_does_not(torchao):
    # Its round-up rule takes log2 of amax / 6 in float32 (0.17; later ones read the exponent), which loses the last bit
    # of 2^n (1 + 2^-23) beyond n = -4 .. 3: the scale is a power too small and the block saturates.
    x = torchao["edges.mx.x"]
    _, scales = ours(x, "e2m1", "up")
    assert np.array_equal(scales, oracle.quantize(x, "e2m1", "up")[1])
    assert scales.ravel().tolist() == list(range(116, 141))  # 2^(n + 1)
    difference = scales.astype(int) - torchao["edges.mx.scales"]
    assert difference.ravel().tolist() == 8 * [1] + 8 * [0] + 9 * [1]


@BOTH
def test_w4_what_the_rules_do_to_a_block_just_above_three(encode):
    x = np.array([[3.1, 0.3, 1.4] + 29 * [0.0]], dtype=np.float32)
    for rule, scale, decoded in (("floor", 0.5, [3.0, 0.25, 1.5]), ("up", 1.0, [3.0, 0.5, 1.5])):
        values, scales = encode(x, "e2m1", rule)
        assert 2.0 ** (int(scales[0, 0]) - 127) == scale
        assert oracle.decoded(values, scales)[0, :3].tolist() == decoded


@settings(max_examples=150)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 70)), st.integers(0, 2**32 - 1),
    st.sampled_from(list(FORMATS)), st.sampled_from(list(RULES)), st.integers(-140, 120), st.integers(0, 12),
)  # fmt: skip
def test_any_length_and_magnitude_equals_the_oracle_bit_for_bit(shape, seed, element, rule, exponent, spread):  # noqa: PLR0913
    random = np.random.default_rng(seed)
    powers = random.integers(exponent - spread, exponent + 1, shape)
    x = (random.integers(-32, 33, shape) / 16 * 2.0**powers).astype(np.float32)  # ties and powers of two abound
    values, scales = ours(x, element, rule)
    expected, bytes_ = oracle.quantize(x, element, rule)
    assert np.array_equal(scales, bytes_)
    assert np.array_equal(values, expected)
    back = encoded(x, element, rule).dequantize().numpy()
    assert np.array_equal(back, oracle.decoded(expected, bytes_).astype(np.float32))


@ELEMENTS
@ALL_RULES
def test_the_edges_of_every_binade(element, rule):
    """amax at the format's top, at a power of two, at EVEN's midpoint, one unit to each side, in every binade."""
    _, mantissa_bits, _, largest = oracle.ELEMENTS[element]
    tops = [1.0, largest / 2 ** math.floor(math.log2(largest)), 2 - 2.0 ** -(mantissa_bits + 1)]
    powers = 2.0 ** np.arange(-149, 128, dtype=np.float64)
    amax = np.outer(powers, tops).ravel().astype(np.float32)
    amax = np.concatenate([amax, np.nextafter(amax, np.float32(0)), np.nextafter(amax, np.float32(3e38))])
    amax = amax[(amax > 0) & np.isfinite(amax)]
    values, scales = ours(amax[:, None], element, rule)  # one element a block
    expected = np.array([oracle.exponent(float(a), element, rule) + 127 for a in amax])
    assert scales.ravel().tolist() == expected.tolist()
    scale = np.exp2(expected - 127.0)
    assert np.array_equal(values.ravel(), oracle.nearest(amax / scale, oracle.GRIDS[element]))
    if rule == "up":  # nothing saturates, and half the scale would, but where E8M0 or the quotient ends
        inside = expected > 0
        assert (amax <= largest * scale)[inside].all() and (amax > largest * scale / 2)[inside].all()


@ELEMENTS
@ALL_RULES
def test_special_values(element, rule):
    x = torch.ones(5, 64)
    x[0], x[1, 3], x[2, 40], x[3, 7] = 0.0, math.nan, math.inf, -math.inf
    q = encoded(x.numpy(), element, rule)
    stored = q.pack().scale.squeeze(-1)
    assert stored[0].tolist() == [0, 0]  # zeros: the smallest scale, as in torchao and TransformerEngine
    assert not q.dequantize()[0].any()
    bad = torch.zeros(5, 2, dtype=torch.bool)
    bad[1, 0] = bad[2, 1] = bad[3, 0] = True  # no infinity is in E8M0: both become its NaN, and stay in their block
    assert ((stored == 0xFF) == bad).all()
    x_hat = q.pack().unpack().dequantize()
    assert torch.equal(x_hat.isnan(), bad.repeat_interleave(32, 1))
    assert (x_hat[4] == 1).all()


@ELEMENTS
def test_decoded_numbers_are_exact_in_bf16_down_to_its_subnormals(element):
    low = {"e2m1": -126, "e2m3": -126, "e3m2": -126, "e4m3": -124, "e5m2": -117}[element]  # section 2.10
    high = {"e2m1": 125, "e2m3": 123, "e3m2": 123, "e4m3": 119, "e5m2": 112}[element]
    grid = torch.from_numpy(oracle.GRIDS[element])
    products = (grid[:, None] * torch.exp2(torch.arange(low, high + 1, dtype=torch.float64))).float()
    assert products.isfinite().all() and torch.equal(products.bfloat16().float(), products)


@pytest.mark.parametrize("rule", list(RULES))
def test_square_tiles_of_a_transpose_are_the_transposed_tiles(rule):
    w = torch.randn(45, 70, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(E2M1, PerTile(32, 32), Microscaling(RULES[rule]))
    plain, turned = quantize(w, spec), quantize(w.t(), spec)
    assert torch.equal(plain.dequantize().t(), turned.dequantize())
    assert plain.pack().nbytes() == -(-45 * 70 // 2) + 2 * 3  # half a byte a number, a byte a tile
    full = quantize(torch.nn.functional.pad(w, (0, 26, 0, 19)), spec)
    assert torch.equal(plain.values, full.values[:45, :70])


# C9, section 2.12; the specification measured 2048 x 2048 numbers, of which these are a quarter.
PUBLISHED = [
    ("e2m1", "up", 0.1155), ("e2m1", "floor", 0.1150), ("e2m1", "even", 0.1119), ("e2m1", "ceil", 0.1443),
    ("e2m3", "up", 0.0283), ("e3m2", "up", 0.0528), ("e4m3", "up", 0.0265), ("e4m3", "floor", 0.0293),
]  # fmt: skip


@pytest.fixture(scope="module")
def gaussians():
    return torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("element", "rule", "published"), PUBLISHED)
def test_c9_error_on_gaussians(gaussians, element, rule, published):
    error = (encoded(gaussians.numpy(), element, rule).dequantize() - gaussians).norm() / gaussians.norm()
    assert error.item() == pytest.approx(published, rel=0.02)


def test_formats_that_have_no_middle_are_refused():
    for fmt in (UINT8, E8M0):
        with pytest.raises(SpecError, match="symmetric"):
            QuantSpec(fmt, PerGroup(32), Microscaling())
