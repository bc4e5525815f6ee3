# SPDX-License-Identifier: Apache-2.0
"""Predict the memory of training from shapes alone: no data, no device, no step.

    peak = weights + optimizer + max over phases of what else is alive

    loss forward     saved activations, the logits and their float32 copy
    loss backward    saved activations, and two float32 tensors of logits' size: the gradient of the log-probabilities
                     and that of the logits; in both, .grad from the second micro-batch on
    head             in backward: saved activations but the loss's, the logits' gradient and the head's weight's
    last block       in backward: saved activations but the loss's, the head's gradient and the block's
    first block      in backward: what it saved, and the gradients of all blocks
    embedding        all gradients, and a second one of a tied embedding: that of the head waits for the look-up's
    optimizer step   .grad, and, where its update is no fused kernel, six float32 tensors as large as a parameter

With checkpointing the activations are the blocks' inputs, and a block's own while backward is in it; autocast keeps its
copies of all weights until the forward pass is over. With an update in backward a gradient lives until its parameter is
updated. Left out, since not of the model: the allocator's reserve and rounding, the CUDA context, and the workspaces of
cuBLAS and cuDNN; and, since small, the gradients of a block's activations.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lowbits.analysis._memory import Bytes, Memory, weights_in_few_bits
from lowbits.analysis._stored import stored_bytes
from lowbits.analysis._tape import Kind, Tape, Value
from lowbits.errors import SpecError
from lowbits.nn import QParameter, quantized_layers
from lowbits.optim import AdamW, Blockwise, CodecOptimizer, Exact, param_groups

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_BLOCK = re.compile(r"(transformer\.h|model\.layers)\.\d+\.")
_FUSED = (Exact, Blockwise)  # codecs whose update is one kernel, on CUDA and, where there is a C compiler, on the CPU
_UPDATE_TEMPORARIES = 6  # new p, m, v, the denominator, lr m / bias, and the quotient: see `adamw_update`


@dataclass(frozen=True)
class Updating:
    """How parameters are updated, as far as memory is concerned.

    Args:
        optimizer: whose states are counted; its parameters are the model's. None: AdamW, moments as the recipes say.
        in_backward: by `lowbits.optim.step_in_backward`.
    """

    optimizer: CodecOptimizer | None = None
    in_backward: bool = False


@dataclass(frozen=True)
class Ledger:
    """The predicted memory of one training step.

    Args:
        memory: bytes by category, as held and in few bits; equals what `measure_memory` counts.
        saved: the saved activations by what they are kept for.
        phases: bytes alive at each moment that can be the peak.
    """

    memory: Memory
    saved: dict[Kind, int]
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        """Largest number of bytes alive at once."""
        return max(self.phases.values())

    @property
    def temporaries(self) -> int:
        """What is alive at the peak and is neither weight, gradient, optimizer state nor saved activation."""
        at = self.memory.measured
        phase = max(self.phases, key=self.phases.__getitem__)
        named = at.gradients if phase == "optimizer step" else at.saved_activations
        return self.peak - at.weights - at.optimizer - named


def predict_memory(
    model: PreTrainedModel,
    batch: int,
    length: int,
    *,
    autocast: bool = True,
    device: str = "cuda",
    accumulation: int = 1,
    updating: Updating | None = None,
) -> Ledger:
    """Compute the memory of training a GPT-2 or Llama without dropout.

    Args:
        model: converted or not, with or without checkpointing of its blocks, in float32 or, without autocast, in
            bfloat16; on any device: on `meta` it takes no memory itself.
        batch: sequences in a micro-batch.
        length: tokens in a sequence.
        autocast: bf16 autocast; False is the weights' dtype throughout.
        device: `cuda` or `cpu`; their autocast rules differ.
        accumulation: micro-batches in a step.
        updating: the optimizer; default: AdamW, moments as the recipes say, after backward.
    Raises:
        SpecError: another architecture, dropout, or a recipe with `saved_activations`.
    """
    updating = updating or Updating()
    states, temporaries = _states(model, updating.optimizer)
    recipes = {name: layer.recipe for name, layer in quantized_layers(model).items()}
    _check(model)
    itemsize = next(model.parameters()).itemsize
    tape = Tape(batch, length, autocast, autocast and device == "cuda", recipes, itemsize)
    _ARCHITECTURES[model.config.model_type](tape, model.config)
    stream = tape.residual("", model.config.hidden_size).nbytes
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    kept = _Activations(tape, stream, checkpointed)
    grads = _Gradients(model, updating.in_backward, autocast)
    weights = sum(p.nbytes for p in model.parameters())
    held = Bytes(weights, grads.total, states, kept.saved)
    few = Bytes(weights_in_few_bits(model), grads.total, states, kept.saved - tape.total() + tape.in_few_bits())
    fixed = weights + states + grads.total * (accumulation > 1)
    logits, scored = (n * model.config.vocab_size for n in (tape.tokens, tape.tokens - batch))
    phases = {
        "loss forward": kept.saved + kept.copies + tape.compute * logits + 4 * scored,
        "loss backward": kept.saved + 2 * 4 * scored,
        "head": kept.after_loss + tape.compute * logits + grads.of_head,
        "last block": kept.in_last_block + grads.after_last_block,
        "first block": kept.in_first_block + grads.after_blocks,
        "embedding": grads.at_the_end,
        "optimizer step": (0 if updating.in_backward else grads.total) + temporaries,
    }
    return Ledger(Memory(held, few), kept.by_kind, {name: fixed + more for name, more in phases.items()})


class _Activations:
    """What is kept of the forward pass, and what of it is there in which phase; all in bytes."""

    def __init__(self, tape: Tape, stream: int, checkpointed: bool) -> None:
        blocks: dict[str, int] = {}
        copies, outside = 0, dict.fromkeys(Kind, 0)
        for key, kept in tape.kept.items():
            match = _BLOCK.match(key)
            if match and not key.endswith(".end"):
                blocks[match[0]] = blocks.get(match[0], 0) + kept.nbytes
                copies += kept.nbytes * (kept.kind is Kind.WEIGHT_COPY)
            elif not key.endswith(".end") and key != "embedding":
                outside[kept.kind] += kept.nbytes
        first, last = (list(blocks.values())[i] for i in (0, -1))
        if checkpointed:  # the input of each block, and what the final norm keeps of the last one's output
            outside[Kind.NORM] += stream * (len(blocks) + any(key.endswith(".end") for key in tape.kept))
        self.by_kind = outside if checkpointed else tape.by_kind()
        self.saved = sum(self.by_kind.values())
        self.copies = checkpointed * copies
        self.after_loss = self.saved - self.by_kind[Kind.LOSS]
        self.in_last_block = self.after_loss + last * checkpointed
        self.in_first_block = stream + first


class _Gradients:
    """Which gradients are there in which phase of backward; in bytes."""

    def __init__(self, model: PreTrainedModel, in_backward: bool, autocast: bool) -> None:
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        blocks: dict[str, list[int]] = {}
        for name, p in trainable:
            if match := _BLOCK.match(name):
                blocks.setdefault(match[0], []).append(p.nbytes)
        head = model.get_output_embeddings().weight  # type: ignore[union-attr]
        tied = head is model.get_input_embeddings().weight  # type: ignore[union-attr]
        self.total = sum(p.nbytes for _, p in trainable)
        largest = max(max(sizes) for sizes in blocks.values())
        waiting = head.nbytes * tied  # the head's gradient of a tied embedding, all backward long
        summed = waiting * (not autocast)  # autograd adds to the head's gradient in place only where a cast made it
        self.of_head = head.nbytes
        if in_backward:
            self.after_last_block = self.after_blocks = waiting + largest
            self.at_the_end = head.nbytes + waiting + summed
        else:
            self.after_last_block = head.nbytes + sum(list(blocks.values())[-1])
            self.after_blocks = self.total - (0 if tied else head.nbytes)
            self.at_the_end = self.total + waiting + summed


def _states(model: PreTrainedModel, optimizer: CodecOptimizer | None) -> tuple[int, int]:
    """Return the bytes of the states, and what the update of a parameter needs beside it in plain torch operations."""
    optimizer = optimizer or AdamW(param_groups(model, 0.0))
    total = temporaries = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            codecs = list(optimizer.codecs(p, group).values())
            total += 4 + sum(_meta_bytes(codec.init, p) for codec in codecs)
            if not all(isinstance(codec, _FUSED) for codec in codecs):
                temporaries = max(temporaries, 4 * _UPDATE_TEMPORARIES * p.numel())
    return total, temporaries


def linear_input_bytes(model: nn.Module, tokens: int) -> tuple[int, int]:
    """Return what the inputs of all converted layers take in bf16, and as the codes and scales of `fprop.lhs`.

    Their ratio is what `Save.QUANTIZED` saves: 1/2 for 8 bits, and the scales.

    Args:
        model: converted.
        tokens: rows of each input.
    """
    full = few = 0
    for layer in quantized_layers(model).values():
        spec, size = layer.recipe.fprop.lhs, 2 * tokens * layer.in_features
        full += size
        few += size if spec is None else stored_bytes((tokens, layer.in_features), spec)
    return full, few


def _meta_bytes(init: Callable[[torch.Tensor], dict[str, torch.Tensor]], p: nn.Parameter) -> int:
    """Bytes of a moment's stored form, made from the parameter's shape alone."""
    return sum(part.untyped_storage().nbytes() for part in init(torch.empty_like(p, device="meta")).values())


def _check(model: PreTrainedModel) -> None:
    config = model.config
    if any(isinstance(p, QParameter) for p in model.parameters()):
        raise SpecError(
            "predict_memory knows layers of float weights, and some of this model are codes; `measure_memory` counts "
            "them."
        )
    if any(layer.recipe.saved_activations is not None for layer in quantized_layers(model).values()):
        raise SpecError(
            "predict_memory has no rule for saved_activations, which keep in few bits whatever autograd saves; "
            "`measure_memory` counts them."
        )
    if config.model_type not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise SpecError(
            f"predict_memory knows {known}, not {config.model_type!r}; `measure_memory` counts any architecture."
        )
    dropouts = ("embd_pdrop", "resid_pdrop", "attn_pdrop", "attention_dropout")
    wrong = [f"{name}={getattr(config, name)}" for name in dropouts if getattr(config, name, 0)]
    activation = getattr(config, "activation_function", None) or getattr(config, "hidden_act", None)
    if activation not in ("gelu_new", "silu"):
        wrong.append(f"activation {activation!r}")
    if wrong:
        raise SpecError(
            f"predict_memory has no rule for {', '.join(wrong)}: switch it off, or count with `measure_memory`."
        )


def _gpt2(tape: Tape, config: PretrainedConfig) -> None:
    """Follow `GPT2LMHeadModel.forward` with labels."""
    width, heads = config.n_embd, config.n_head
    _indices(tape, positions=True)
    x = tape.residual("embedding", width)
    for i in range(config.n_layer):
        block = f"transformer.h.{i}"
        normed = tape.layer_norm(f"{block}.ln_1", x)
        qkv = tape.linear(f"{block}.attn.c_attn", normed, 3 * width)
        mixed = tape.attention(f"{block}.attn", [qkv], heads, width)
        tape.linear(f"{block}.attn.c_proj", mixed, width)
        x = tape.residual(f"{block}.middle", width)
        normed = tape.layer_norm(f"{block}.ln_2", x)
        hidden = tape.linear(f"{block}.mlp.c_fc", normed, config.n_inner or 4 * width)
        tape.linear(f"{block}.mlp.c_proj", tape.gelu_new(f"{block}.mlp.act", hidden), width)
        x = tape.residual(f"{block}.end", width)
    _head(tape, tape.layer_norm("transformer.ln_f", x), config.vocab_size)


def _llama(tape: Tape, config: PretrainedConfig) -> None:
    """Follow `LlamaForCausalLM.forward` with labels."""
    width, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or width // heads
    inner, shared = heads * size, config.num_key_value_heads * size
    _indices(tape, positions=False)
    for name in ("cos", "sin"):
        tape.keep(Value(f"rotary.{name}", tape.length, size, tape.itemsize), Kind.ATTENTION)
    x = tape.residual("embedding", width)
    for i in range(config.num_hidden_layers):
        block = f"model.layers.{i}"
        normed = tape.rms_norm(f"{block}.input_layernorm", x)
        # q and k leave the rotation as new tensors; v goes into attention as its projection made it
        for name, outputs in (("q_proj", inner), ("k_proj", shared)):
            tape.linear(f"{block}.self_attn.{name}", normed, outputs)
        v = tape.linear(f"{block}.self_attn.v_proj", normed, shared)
        q = Value(f"{block}.q", tape.tokens, inner, tape.compute)
        k = Value(f"{block}.k", tape.tokens, shared, tape.compute)
        mixed = tape.attention(f"{block}.self_attn", [q, k, v], heads, inner)
        tape.linear(f"{block}.self_attn.o_proj", mixed, width)
        x = tape.residual(f"{block}.middle", width)
        normed = tape.rms_norm(f"{block}.post_attention_layernorm", x)
        gate = tape.linear(f"{block}.mlp.gate_proj", normed, config.intermediate_size)
        up = tape.linear(f"{block}.mlp.up_proj", normed, config.intermediate_size)
        tape.linear(f"{block}.mlp.down_proj", tape.gated_silu(f"{block}.mlp", gate, up), width)
        x = tape.residual(f"{block}.end", width)
    _head(tape, tape.rms_norm("model.norm", x), config.vocab_size)


def _indices(tape: Tape, positions: bool) -> None:
    tape.keep(Value("ids", tape.tokens, 1, 8), Kind.INDEX)
    if positions:
        tape.keep(Value("positions", tape.length, 1, 8), Kind.INDEX)


def _head(tape: Tape, x: Value, vocabulary: int) -> None:
    tape.linear("lm_head", x, vocabulary)
    tape.cross_entropy(vocabulary)


_ARCHITECTURES: dict[str, Callable[[Tape, PretrainedConfig], None]] = {"gpt2": _gpt2, "llama": _llama}
