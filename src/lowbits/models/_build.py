# SPDX-License-Identifier: Apache-2.0
"""Make a `transformers` causal language model: a named size with fresh weights, or a folder with its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowbits.errors import CheckpointError, RunError
from lowbits.models._sizes import SIZES, size

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Every name under which the two families, and most others, keep a dropout probability in their config.
_DROPOUTS = ("embd_pdrop", "resid_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout")


def config(name: str, vocab_size: int, block: int) -> PretrainedConfig:
    """Return the `transformers` config of a named size.

    The embedding is padded to a multiple of 8 rows, as tensor cores want it and as the linear-quantization study does.

    Args:
        name: a key of `SIZES`.
        vocab_size: number of tokens that the tokenizer knows.
        block: longest sequence in tokens; GPT-2 learns this many positions.

    Raises:
        UnknownNameError: no size has this name.
    """
    from transformers import AutoConfig

    chosen = size(name)
    positions = {"gpt2": "n_positions", "llama": "max_position_embeddings"}[chosen.family]
    no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # the data's tokenizer brings them
    padded = -(-vocab_size // 8) * 8
    return AutoConfig.for_model(chosen.family, vocab_size=padded, **{positions: block}, **no_tokens, **chosen.shape)


def build(name_or_folder: str, vocab_size: int, block: int, seed: int, dropout: float = 0.0) -> PreTrainedModel:
    """Build a causal language model in float32 on the CPU.

    Args:
        name_or_folder: a key of `SIZES` (fresh weights), or a Hugging Face folder (its weights).
        vocab_size: number of tokens that the tokenizer knows.
        block: longest sequence in tokens.
        seed: seeds the fresh weights; torch's own generator is left as it was.
        dropout: probability for every dropout that the architecture has; 0 for comparisons.

    Returns:
        The model in training mode, with torch's scaled-dot-product attention.

    Raises:
        UnknownNameError: neither a size nor a folder has this name.
        CheckpointError: the folder lacks a config or weights, or its weights do not fit its config.
        RunError: the folder's model takes shorter sequences than `block`.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(name_or_folder)
    if name_or_folder not in SIZES and folder.is_dir():
        return _load(folder, block, dropout)
    settings = config(name_or_folder, vocab_size, block)
    _set_dropout(settings, dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa").train()


def untrained(folder: Path) -> PreTrainedModel:
    """Build the architecture of a Hugging Face folder in float32 on the CPU, with weights of no meaning.

    For checkpoints of models that a method has changed: their tensors are loaded after it has changed this one.

    Args:
        folder: with a config.json.
    Raises:
        CheckpointError: it has none that is known.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        settings = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{folder} holds no config.json of a known model: {reason}") from error
    with torch.random.fork_rng(devices=[]):
        return AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa").train()


def _load(folder: Path, block: int, dropout: float) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json, so it is no Hugging Face model folder; name another.")
    try:
        settings = AutoConfig.from_pretrained(folder, local_files_only=True)
        _check_positions(folder, settings, block)
        _set_dropout(settings, dropout)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=settings,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder} cannot be loaded as a causal language model: {reason}") from error
    model, report = loaded  # the result is a pair only with output_loading_info
    if report["missing_keys"]:
        name = sorted(report["missing_keys"])[0]
        raise CheckpointError(
            f"{folder} lacks {len(report['missing_keys'])} tensors, the first is {name}; fetch it again."
        )
    return model.train()


def _check_positions(folder: Path, settings: PretrainedConfig, block: int) -> None:
    longest = getattr(settings, "max_position_embeddings", None)
    if longest is not None and longest < block:
        raise RunError(
            f"{folder} takes sequences of at most {longest} tokens, got block {block}; use --block {longest}."
        )


def _set_dropout(settings: PretrainedConfig, dropout: float) -> None:
    for name in _DROPOUTS:
        if hasattr(settings, name):
            setattr(settings, name, dropout)
