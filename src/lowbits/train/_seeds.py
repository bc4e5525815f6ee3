# SPDX-License-Identifier: Apache-2.0
"""Derive every random stream of a run from its seed and a position, so that a checkpoint stores none of them."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, stream: str, *position: int) -> int:
    """Return a seed for torch's generator, a pure function of its arguments.

    Args:
        seed: the run's.
        stream: what the numbers are for, for example `dropout`.
        position: step, micro-batch, rank or whatever else tells two draws apart.

    Returns:
        63 bits of BLAKE2b over the arguments.
    """
    text = "/".join(map(str, (seed, stream, *position)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
