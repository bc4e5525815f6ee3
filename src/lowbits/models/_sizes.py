# SPDX-License-Identifier: Apache-2.0
"""Every model that has a name here, as keyword arguments of its `transformers` config; a size is a line, not code."""

from __future__ import annotations

from dataclasses import dataclass, field

from lowbits.errors import UnknownNameError


@dataclass(frozen=True)
class Size:
    """Hold the architecture of `transformers` and the shape that make up a named model.

    Args:
        family: `model_type` of the `transformers` config, `gpt2` or `llama`.
        shape: keyword arguments of that config.
        source: who published this shape.
    """

    family: str
    shape: dict[str, int | bool] = field(default_factory=dict)
    source: str = ""


def _gpt2(layers: int, width: int, heads: int, source: str) -> Size:
    return Size("gpt2", {"n_layer": layers, "n_embd": width, "n_head": heads}, source)


def _llama(layers: int, width: int, heads: int, ffn: int, source: str, tied: bool = False) -> Size:
    shape = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return Size("llama", {**shape, "intermediate_size": ffn, "tie_word_embeddings": tied}, source)


_RADFORD = "Radford et al. 2019, table 2"
_TINY = "Karpathy, llama2.c"
_STUDY = "Chitsaz et al. 2024, reference configs"

SIZES: dict[str, Size] = {
    "gpt2-pico": _gpt2(4, 128, 4, "0.8M parameters: experiments of many runs on a CPU"),
    "gpt2-nano": _gpt2(4, 192, 6, "the demo: learns visibly in a minute on two cores"),
    "gpt2-small": _gpt2(12, 768, 12, _RADFORD),
    "gpt2-medium": _gpt2(24, 1024, 16, _RADFORD),
    "gpt2-large": _gpt2(36, 1280, 20, _RADFORD),
    "gpt2-xl": _gpt2(48, 1600, 25, _RADFORD),
    "llama-15m": _llama(6, 288, 6, 768, _TINY, tied=True),
    "llama-42m": _llama(8, 512, 8, 1376, _TINY, tied=True),
    "llama-110m": _llama(12, 768, 12, 2048, _TINY, tied=True),
    "llama-134m": _llama(12, 768, 12, 2048, "the shape of llama-110m with a head of its own"),
    "llama-small": _llama(24, 640, 10, 2560, _STUDY),
    "llama-1b": _llama(18, 2048, 16, 5632, "torchtitan, llama2 1B"),
    "llama-3b": _llama(26, 3200, 32, 8640, "OpenLLaMA 3B"),
    "llama-7b": _llama(32, 4096, 32, 11008, "Touvron et al. 2023, arXiv:2307.09288"),
}


def size(name: str) -> Size:
    """Return a named size.

    Args:
        name: a key of `SIZES`.
    Raises:
        UnknownNameError: there is none; the message offers the nearest.
    """
    if name not in SIZES:
        raise UnknownNameError("model", name, SIZES, where="lowbits train --help")
    return SIZES[name]
