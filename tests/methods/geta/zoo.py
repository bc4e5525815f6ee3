# SPDX-License-Identifier: Apache-2.0
"""Small networks of every architecture, traced once, and inputs of other sizes than they were traced with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from lowbits.methods import geta


class Mixed(nn.Module):
    """Residual, depthwise and grouped convolutions, a padded shortcut, concatenation, group norm, flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.deep, self.deep_norm = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12)
        self.point = nn.Conv2d(12, 12, 1)
        self.grouped = nn.Conv2d(12, 18, 3, padding=1, groups=3)
        self.left, self.right = nn.Conv2d(18, 7, 1), nn.Conv2d(18, 5, 1)
        self.after = nn.BatchNorm2d(12)
        self.wide, self.group_norm = nn.Conv2d(12, 20, 3, 2, 1), nn.GroupNorm(5, 20)
        self.up = nn.ConvTranspose2d(20, 6, 2, 2)
        self.slope = nn.PReLU(6)
        self.last = nn.Linear(6 * 16 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.point(torch.relu(self.deep_norm(self.deep(x))))
        x = torch.sigmoid(self.grouped(x))  # does not map 0 to 0
        x = self.after(torch.cat([self.left(x), self.right(x)], 1))
        y = self.group_norm(self.wide(x)) + pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        y = self.slope(self.up(torch.nn.functional.gelu(y)))
        return self.last(torch.flatten(y, 1))


class Vgg(nn.Sequential):
    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 8), (8, 16), (16, 24)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(24, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 5))


class Plain(nn.Module):
    """Attention by hand: fused query, key and value, einsum, a gate, a weight of its own, no norm in the way."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.qkv = nn.Linear(16, 3 * 24)
        self.out = nn.Parameter(torch.randn(24, 16) / 5)
        self.gate, self.down = nn.Linear(16, 20), nn.Linear(10, 16)
        self.head = nn.Linear(16, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (t.unflatten(-1, (4, 6)) for t in self.qkv(x).chunk(3, -1))
        scores = torch.einsum("blhd,bshd->bhls", q, k) / 6**0.5
        mixed = torch.softmax(scores, -1) @ v.transpose(1, 2)
        x = x + mixed.permute(0, 2, 1, 3).reshape(*ids.shape, 24) @ self.out
        a, b = self.gate(x).split(10, -1)
        return self.head(x + self.down(silu(a) * b))


class Example(NamedTuple):
    """A traced network.

    Args:
        model: float32, in evaluation mode, with norms that are not at their initial values.
        graph: of it.
        inputs: makes inputs of other sizes than the traced ones, from a seed.
    """

    model: nn.Module
    graph: geta.Graph
    inputs: Callable[[int], dict[str, Any]]


def tokens(seed: int, vocabulary: int, masked: bool = False, shape: tuple[int, int] = (3, 11)) -> dict[str, Any]:
    noise = torch.Generator().manual_seed(seed)
    found = {"input_ids": torch.randint(0, vocabulary, shape, generator=noise)}
    if masked:
        found["attention_mask"] = (torch.arange(shape[1]) < torch.tensor([[4], [9], [11]])[: shape[0]]).long()
    return found


def pictures(seed: int, size: int, name: str, batch: int = 3) -> dict[str, Any]:
    return {name: torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 8}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=32, **shape)
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    no_tokens = {"bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=24, n_layer=2, n_head=3, **no_tokens))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    return BertForSequenceClassification(BertConfig(vocab_size=32, max_position_embeddings=16, **shape))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, **shape))


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    shape = {"embedding_size": 16, "hidden_sizes": [16, 24], "depths": [1, 2], "layer_type": "bottleneck"}
    return ResNetForImageClassification(ResNetConfig(**shape))


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Any]]]] = {
    "mixed": (Mixed, lambda seed: pictures(seed, 16, "x")),
    "vgg": (Vgg, lambda seed: pictures(seed, 8, "input")),
    "plain": (Plain, lambda seed: {"ids": tokens(seed, 11)["input_ids"]}),
    "llama": (llama, lambda seed: tokens(seed, 32)),
    "gpt2": (gpt2, lambda seed: tokens(seed, 32)),
    "bert": (bert, lambda seed: tokens(seed, 32, masked=True)),
    "vit": (vit, lambda seed: pictures(seed, 16, "pixel_values")),
    "resnet": (resnet, lambda seed: pictures(seed, 32, "pixel_values")),
}


def built(name: str) -> nn.Module:
    """Return a fresh network whose parameters and buffers are all far from special values."""
    torch.manual_seed(1)
    model = ZOO[name][0]().eval()
    with torch.no_grad():
        for key, p in (*model.named_parameters(), *model.named_buffers()):
            if p.is_floating_point() and "inv_freq" not in key:
                if p.ndim < 2:
                    p.copy_(torch.rand(p.shape) + 0.5)
                elif not key.endswith("conv.weight"):
                    p.mul_(2.0)
    return model


@cache
def example(name: str) -> Example:
    """Return a network of the zoo with its graph; the batch is 2 and sequences have 7 tokens."""
    model, inputs = built(name), ZOO[name][1]
    first = {key: value[:2, :7] if not value.is_floating_point() else value[:2] for key, value in inputs(0).items()}
    return Example(model, geta.trace(model, (), first), inputs)


def random_keep(graph: geta.Graph, seed: int) -> Tensor:
    """Return a random choice of units, at a random share for every dimension, one of each at least."""
    noise = torch.Generator().manual_seed(seed)
    parts = []
    for dimension in graph.dimensions:
        part = torch.rand(dimension.size, generator=noise) < torch.rand((), generator=noise)
        part[torch.randint(0, dimension.size, (), generator=noise)] = True
        parts.append(part)
    return torch.cat(parts)


def outputs(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found = model(**inputs)
    return found if isinstance(found, Tensor) else found["logits"]
