# SPDX-License-Identifier: Apache-2.0
"""Random bits are a pure function of seed, name, role, step and element."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbits.quantizers import Noise, philox

# Random123's known answers for philox4x32-10.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al. 2011, section 3.3, in Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    words = philox([torch.tensor(c) for c in counter], key)
    assert tuple(int(w) for w in words) == answer


words32 = st.integers(0, 2**32 - 1)


@given(st.tuples(words32, words32, words32, words32), st.tuples(words32, words32))
def test_vectorised_equals_scalar(counter, key):
    got = philox([torch.tensor(c) for c in counter], key)
    assert [int(w) for w in got] == scalar_philox(list(counter), list(key))


def test_layout_of_key_and_counter():
    noise = Noise((0x01234567, 0x89ABCDEF))
    step = (5 << 32) + 7
    bits = noise.bits((9,), step)
    expected = [w for block in range(3) for w in scalar_philox([block, 0, 7, 5], list(noise.key))]
    assert bits.tolist() == expected[:9]


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 2**40))
def test_any_chunk_equals_its_part_of_the_whole(count, offset, step):
    noise = Noise.of(3, "layer", "role")
    whole = noise.uniform((offset + count,), step)
    assert torch.equal(noise.uniform((count,), step, offset=offset), whole[offset:])


def test_offsets_beyond_32_bits_have_their_own_counter():
    noise = Noise.of(3, "layer", "role")
    assert not torch.equal(noise.bits((4,), 0, offset=1 << 34), noise.bits((4,), 0))
    assert noise.bits((1,), 0, offset=1 << 34).item() == scalar_philox([0, 1, 0, 0], list(noise.key))[0]


def test_every_argument_matters_and_a_tensor_step_is_the_same():
    draw = lambda *a, step=0: Noise.of(*a).bits((64,), step).tolist()  # noqa: E731
    base = draw(0, "a", "r")
    others = [draw(1, "a", "r"), draw(0, "b", "r"), draw(0, "a", "s"), draw(0, "a", "r", step=1)]
    assert all(other != base for other in others)
    assert Noise.of(0, "a", "r").bits((64,), torch.tensor(0)).tolist() == base


def test_uniform_is_uniform():
    u = Noise.of(0, "a", "r").uniform((1 << 18,), 0)
    assert u.min() >= 0 and u.max() < 1
    assert torch.equal(u * 2**24, (u * 2**24).round())  # exact multiples of 2^-24
    counts = torch.histc(u, 64, 0, 1)
    expected = u.numel() / 64
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert 20 < chi_square < 130  # 63 degrees of freedom: mean 63, standard deviation 11


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, from inside inductor
def test_the_same_bits_under_compile(compile_backend):
    noise = Noise.of(1, "a", "r")
    draw = lambda step: noise.uniform((33,), step, offset=2)  # noqa: E731
    compiled = torch.compile(draw, fullgraph=True, backend=compile_backend)
    assert torch.equal(compiled(torch.tensor(9)), noise.uniform((33,), 9, offset=2))
