# SPDX-License-Identifier: Apache-2.0
"""The loss that language models are trained with."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def causal_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean of -log p(x_t | x_<t) over all positions but the first of each sequence, in nats.

    Args:
        model: maps `input_ids` to an output with `.logits`, as the causal language models of transformers do.
        ids: int64 `[batch, length]`, length >= 2.
    """
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
