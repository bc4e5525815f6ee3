# SPDX-License-Identifier: Apache-2.0
"""The models of `train_step.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig


@dataclass(frozen=True)
class Shape:
    """A model.

    Args:
        width: of the residual stream.
        ffn: width of the feed-forward layers.
        heads: of attention.
        layers: blocks.
        key_heads: heads of keys and values; 0 for as many as `heads`.
        vocabulary: tokens; 0 for blocks alone.
        length: tokens a sequence.
        family: of the `transformers` config.
    """

    width: int
    ffn: int
    heads: int
    layers: int
    key_heads: int = 0
    vocabulary: int = 32000
    length: int = 2048
    family: str = "llama"

    def config(self) -> Any:
        """Return the `transformers` config."""
        common: dict[str, Any] = {"vocab_size": self.vocabulary or 8, "use_cache": False, "bos_token_id": None,
                                  "eos_token_id": None, "pad_token_id": None}  # fmt: skip
        if self.family == "gpt2":
            own = {"n_embd": self.width, "n_head": self.heads, "n_layer": self.layers, "n_positions": self.length}
            off = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0)
            return AutoConfig.for_model("gpt2", **common, **own, **off)
        return AutoConfig.for_model(
            "llama", **common, hidden_size=self.width, intermediate_size=self.ffn, num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads or self.heads, num_hidden_layers=self.layers,
            max_position_embeddings=self.length, tie_word_embeddings=False,
        )  # fmt: skip

    def flops(self, tokens: int, weights: int) -> int:
        """FLOPs of a step's products: of `weights` in linear layers, and of causal attention."""
        return tokens * (6 * weights + 6 * self.layers * self.length * self.width)


WIDTHS = {
    "2048": Shape(2048, 5632, 16, 16),
    "4096": Shape(4096, 14336, 32, 4),
    "256": Shape(256, 704, 4, 2, vocabulary=512, length=128),
}
SHAPES = {
    "gpt2-small": Shape(768, 3072, 12, 4, vocabulary=0, length=1024, family="gpt2"),
    "gpt2-medium": Shape(1024, 4096, 16, 4, vocabulary=0, length=1024, family="gpt2"),
    "gpt2-large": Shape(1280, 5120, 20, 4, vocabulary=0, length=1024, family="gpt2"),
    "gpt2-xl": Shape(1600, 6400, 25, 4, vocabulary=0, length=1024, family="gpt2"),
    "llama-1b": Shape(2048, 5632, 16, 4, vocabulary=0),
    "llama-3b": Shape(3200, 8640, 32, 4, vocabulary=0),
    "llama-7b": Shape(4096, 11008, 32, 4, vocabulary=0),
    "llama-8b": Shape(4096, 14336, 32, 4, key_heads=8, vocabulary=0),
    "tiny": Shape(64, 256, 2, 2, vocabulary=0, length=64, family="gpt2"),
}
