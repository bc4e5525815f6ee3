# SPDX-License-Identifier: Apache-2.0
"""The paper's Llama in plain torch: RoPE, RMSNorm, SwiGLU, no biases, an untied head, sub-norms where asked for.

Built on the meta device too, so that a model larger than any float copy of it can be made layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint

SIGMA = 0.02
"""Of the Gaussian start of every matrix, as in the published code."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    vocab: int
    width: int
    ffn: int
    layers: int
    heads: int
    sub_norms: bool = True
    recompute: bool = False

    @property
    def linear_parameters(self) -> int:
        return self.layers * (4 * self.width**2 + 3 * self.width * self.ffn)

    @property
    def parameters(self) -> int:
        norms = self.layers * (3 * self.width + self.ffn if self.sub_norms else 2 * self.width) + self.width
        return self.linear_parameters + 2 * self.vocab * self.width + norms


TINY = Shape(0, 96, 256, 3, 4)
"""The shape of the measured probe: 0.33M weights in linear layers; the vocabulary is the text's."""
LLAMA_130M = Shape(32_000, 768, 2048, 12, 12)
"""The published 130M shape: 84.9M weights in linear layers."""


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, ffn = shape.width, shape.ffn
        self.heads = shape.heads
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
        self.q_proj, self.k_proj = linear(width, width), linear(width, width)
        self.v_proj, self.o_proj = linear(width, width), linear(width, width)
        self.gate_proj, self.up_proj, self.down_proj = linear(width, ffn), linear(width, ffn), linear(ffn, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        h = self.ffn_norm(x)
        return x + self.down_proj(silu(self.gate_proj(h)) * self.up_proj(h))

    def attention(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotated(q), rotated(k)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, width))


@cache
def angles(length: int, half: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rates = 10_000.0 ** (-torch.arange(half, device=device) / half)
    turns = torch.arange(length, device=device)[:, None] * rates
    return turns.cos(), turns.sin()


def rotated(x: Tensor) -> Tensor:
    cos, sin = (t.to(x.dtype) for t in angles(x.shape[-2], x.shape[-1] // 2, x.device))
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Llama(nn.Module):
    """Return the mean cross-entropy of the next token."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm, self.lm_head = nn.RMSNorm(shape.width, 1e-5), linear(shape.width, shape.vocab)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids[:, :-1])
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.shape.recompute else block(x)
        logits = self.lm_head(self.norm(x))
        return cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def start_(model: nn.Module, seed: int) -> None:
    """Draw every matrix from N(0, 0.02^2); torch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for p in model.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=SIGMA)
