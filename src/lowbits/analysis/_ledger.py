# SPDX-License-Identifier: Apache-2.0
"""Predict the memory of training from shapes alone: no data, no device, no step.

    peak = weights + optimizer + max over phases of what else is alive

    loss forward     saved activations, the logits and their float32 copy
    loss backward    saved activations, and two float32 tensors of logits' size: the gradient of the log-probabilities
                     and that of the logits; in both, .grad from the second micro-batch on
    optimizer step   .grad, and the update's temporaries: six float32 tensors as large as the largest parameter

Between loss and optimizer, every block frees more activations than the gradients that it leaves. Left out, since not
of the model: the allocator's reserve and rounding, the CUDA context, and the workspaces of cuBLAS and cuDNN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lowbits.analysis._memory import Bytes, Memory, weights_in_few_bits
from lowbits.analysis._stored import stored_bytes
from lowbits.analysis._tape import Kind, Tape, Value
from lowbits.errors import SpecError
from lowbits.nn import quantized_layers
from lowbits.optim import Exact, param_groups

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_UPDATE_TEMPORARIES = 6  # new p, m, v, the denominator, lr m / bias, and the quotient: see `adamw_update`


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
) -> Ledger:
    """Compute the memory of training a GPT-2 or Llama with lowbits' AdamW, without dropout.

    Args:
        model: converted or not, on any device; on `meta` it takes no memory itself.
        batch: sequences in a micro-batch.
        length: tokens in a sequence.
        autocast: bf16 autocast; False is float32 throughout.
        device: `cuda` or `cpu`; their autocast rules differ.
        accumulation: micro-batches in a step.
    Raises:
        SpecError: another architecture, dropout, or gradient checkpointing.
    """
    recipes = {name: layer.recipe for name, layer in quantized_layers(model).items()}
    tape = Tape(batch, length, autocast, autocast and device == "cuda", recipes)
    _check(model)
    _ARCHITECTURES[model.config.model_type](tape, model.config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = sum(
        4 + sum(_meta_bytes(group.get(moment, Exact()).init, p) for moment in ("first", "second"))
        for group in param_groups(model, 0.0)
        for p in group["params"]
    )
    weights = sum(p.nbytes for p in model.parameters())
    gradients = sum(p.nbytes for p in trainable)
    held = Bytes(weights, gradients, optimizer, tape.total())
    few = Bytes(weights_in_few_bits(model), gradients, optimizer, tape.in_few_bits())
    fixed = weights + optimizer
    in_loss = fixed + held.saved_activations + gradients * (accumulation > 1)
    logits, scored = (n * model.config.vocab_size for n in (tape.tokens, tape.tokens - batch))
    phases = {
        "loss forward": in_loss + tape.compute * logits + 4 * scored,
        "loss backward": in_loss + 2 * 4 * scored,
        "optimizer step": fixed + gradients + _UPDATE_TEMPORARIES * max(p.numel() * 4 for p in trainable),
    }
    return Ledger(Memory(held, few), tape.by_kind(), phases)


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
    if config.model_type not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise SpecError(
            f"predict_memory knows {known}, not {config.model_type!r}; `measure_memory` counts any architecture."
        )
    dropouts = ("embd_pdrop", "resid_pdrop", "attn_pdrop", "attention_dropout")
    wrong = [f"{name}={getattr(config, name)}" for name in dropouts if getattr(config, name, 0)]
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        wrong.append("gradient checkpointing")
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
        tape.keep(Value(f"rotary.{name}", tape.length, size, 4), Kind.ATTENTION)
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
