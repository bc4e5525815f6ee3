# SPDX-License-Identifier: Apache-2.0
"""Name the model sizes of the studies; the models themselves are those of `transformers`.

    model = models.build("gpt2-small", vocab_size=50257, block=1024, seed=0)

A folder with a Hugging Face causal language model is as good as a name: its weights are loaded.
"""

from __future__ import annotations

from lowbits.models._build import build, config, untrained
from lowbits.models._sizes import SIZES, Size, size

__all__ = ["SIZES", "Size", "build", "config", "size", "untrained"]
