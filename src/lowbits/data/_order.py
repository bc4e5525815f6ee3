# SPDX-License-Identifier: Apache-2.0
"""Say which windows of the text a step reads: a pure function of the step, so a resume needs no replay.

All samples of a run stand in one endless row: epoch 0 in a random order, then epoch 1 in another, and so on. Batch
`step` is the places `step * batch_size ... (step + 1) * batch_size - 1` of that row; a rank reads its slice of it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
def permutation(seed: int, epoch: int, windows: int) -> np.ndarray:
    """Return the order of the windows in an epoch.

    The order sorts 64 random bits a window, drawn from the raw Philox stream, which numpy promises never to change
    (NEP 19; it does not promise that of `Generator.permutation`).

    Args:
        seed: of the run, not negative.
        epoch: from 0.
        windows: how many there are.

    Returns:
        int64 [windows], each number of 0 ... windows - 1 once; read-only.
    """
    keys = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(windows)
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order


def windows_of_step(step: int, batch_size: int, windows: int, seed: int) -> np.ndarray:
    """Return the windows of one batch.

    Args:
        step: from 0.
        batch_size: windows a batch, over all ranks.
        windows: in an epoch.
        seed: of the run.

    Returns:
        int64 [batch_size].
    """
    place = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epoch = place // windows
    chosen = np.empty_like(place)
    for number in np.unique(epoch):
        now = epoch == number
        chosen[now] = permutation(seed, int(number), windows)[place[now] % windows]
    return chosen
