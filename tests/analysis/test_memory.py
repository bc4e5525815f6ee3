# SPDX-License-Identifier: Apache-2.0
"""The ledger, computed from shapes, against what autograd and the allocator really hold, to the byte."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lowbits.analysis import (
    Kind,
    Updating,
    causal_loss,
    linear_input_bytes,
    measure_memory,
    measure_saved_bytes,
    predict_memory,
    stored_bytes,
)
from lowbits.errors import SpecError
from lowbits.formats import E4M3, INT4, INT8, TERNARY
from lowbits.nn import Recipe, convert_
from lowbits.optim import AdamW, AdamW8bit, param_groups
from lowbits.quantizers import Asymmetric, PerBlock, PerColumn, PerGroup, PerRow, QuantSpec, quantize
from lowbits.recipes import named

GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 24, "n_head": 3, "n_positions": 10}
GROUPED = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 4,
           "num_key_value_heads": 2, "intermediate_size": 40}  # fmt: skip
TIED = {**GROUPED, "num_hidden_layers": 1, "num_key_value_heads": 4, "tie_word_embeddings": True}
MODELS = {"gpt2": GPT2, "llama_grouped": GROUPED, "llama_tied": TIED}
RECIPES = ["bf16", "w8a8", "w8a8_faithful", "a8_column", "m4_channel", "v8_channel", "fp8_rowwise"]
VOCABULARY, LENGTH = 56, 10


def build(shape: dict[str, object], **more: object) -> PreTrainedModel:
    dropouts = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0) if shape["model_type"] == "gpt2" else {}
    tokens = {"bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model(**{**shape, "vocab_size": VOCABULARY, **dropouts, **tokens, **more})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def converted(shape: dict[str, object], recipe: str) -> PreTrainedModel:
    model = build(shape)
    convert_(model, named(recipe), verbose=False)
    return model


def loss_under(autocast: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return causal_loss(model, ids)

    return loss


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
def test_ledger_equals_hooks_to_the_byte(shape: dict[str, object], recipe: str) -> None:
    model = converted(shape, recipe)
    optimizer = AdamW(param_groups(model, 0.1))
    for autocast, batch in ((False, 3), (True, 3), (True, 1)):
        ids, loss = torch.randint(0, VOCABULARY, (batch, LENGTH)), loss_under(autocast)
        loss(model, ids).backward()
        optimizer.step()
        ledger = predict_memory(model, batch, LENGTH, autocast=autocast, device="cpu")
        assert measure_memory(model, optimizer, loss, ids) == ledger.memory
        assert sum(ledger.saved.values()) == ledger.memory.measured.saved_activations


def test_an_unconverted_model_and_one_without_data() -> None:
    ids = torch.randint(0, VOCABULARY, (2, LENGTH))
    model = build(GPT2)
    with torch.device("meta"):
        shapes = build(GPT2)
    want = predict_memory(model, 2, LENGTH, autocast=True, device="cpu")
    assert predict_memory(shapes, 2, LENGTH, autocast=True, device="cpu") == want
    assert measure_saved_bytes(model, loss_under(True), ids) == want.memory.measured.saved_activations


class CudaAutocastPow(TorchFunctionMode):
    """Run `torch.pow` as CUDA's autocast does, in float32; of what these models call, nothing else differs."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        if func is torch.pow and args[0].dtype == torch.bfloat16:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", ["bf16", "w8a8", "w8a8_faithful"])
@pytest.mark.parametrize("shape", [GPT2, GROUPED], ids=["gpt2", "llama"])
def test_cuda_rules_on_a_cpu_that_follows_them(shape: dict[str, object], recipe: str) -> None:
    model, ids = converted(shape, recipe), torch.randint(0, VOCABULARY, (3, LENGTH))
    ledger = predict_memory(model, 3, LENGTH, autocast=True, device="cuda")
    with CudaAutocastPow():
        assert measure_memory(model, None, loss_under(True), ids).measured.saved_activations == (
            ledger.memory.measured.saved_activations
        )


def allocated_peak(run: Callable[[], None]) -> int:
    """Return the most bytes that the CPU's allocator had handed out at once, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for _, nbytes in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += nbytes
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("checkpointed", [False, True], ids=["whole", "checkpointed"])
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize(("shape", "length", "phase"), [("gpt2", 64, "loss"), ("gpt2", 16, "embedding"),
                                                        ("llama_grouped", 64, "loss")])  # fmt: skip
def test_peak_is_the_allocators(shape: str, length: int, phase: str, precision: str, checkpointed: bool) -> None:
    wide = {"gpt2": {"n_embd": 64, "n_head": 2, "n_layer": 6}, "llama_grouped": {"hidden_size": 32}}[shape]
    model = build(MODELS[shape], vocab_size=3000, max_position_embeddings=length, **wide)
    model.to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    ids, loss = torch.randint(0, 3000, (1, length)), loss_under(precision == "autocast")
    loss(model, ids).backward()  # what is made once and kept is made now
    model.zero_grad(set_to_none=True)
    peak = allocated_peak(lambda: loss(model, ids).backward())
    ledger = predict_memory(model, 1, length, autocast=precision == "autocast", device="cpu")
    phases = {
        k: v - ledger.memory.measured.weights - ledger.memory.measured.optimizer for k, v in ledger.phases.items()
    }
    # left out: activations' gradients within a block, two statistics a row, the ids
    assert abs(max(phases.values()) / peak - 1) < 0.02
    assert max(phases, key=phases.__getitem__).startswith(phase) or (checkpointed and length == 64)


def test_an_update_in_backward_frees_the_gradients() -> None:
    model = build(GPT2, n_layer=12)
    optimizer = AdamW8bit(model.parameters())
    after, within = (predict_memory(model, 1, LENGTH, updating=Updating(optimizer, flag)) for flag in (False, True))
    largest = max(p.nbytes for p in model.transformer.h.parameters())
    assert after.phases["first block"] - within.phases["first block"] > after.memory.measured.gradients - 2 * largest
    assert after.memory.measured.optimizer == within.memory.measured.optimizer
    optimizer.zero_grad()
    loss_under(True)(model, torch.randint(0, VOCABULARY, (1, LENGTH))).backward()
    optimizer.step()
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert held == after.memory.measured.optimizer


def test_saved_linear_inputs_are_half_of_bf16_and_the_scales() -> None:
    """H3: exact, by the ledger and by the hooks."""
    model, plain = converted(GPT2, "w8a8_faithful"), build(GPT2)
    rows = 3 * LENGTH
    bf16, codes = linear_input_bytes(model, rows)
    assert bf16 == 2 * 2 * rows * (24 + 24 + 24 + 96)  # two bytes, two blocks, the inputs of their four layers
    assert codes == bf16 / 2 + 4 * rows * 2 * 4  # a float32 scale a token, two blocks of four layers
    kept = predict_memory(model, 3, LENGTH, device="cpu").saved[Kind.LINEAR_INPUT]
    ids, head = torch.randint(0, VOCABULARY, (3, LENGTH)), 2 * rows * 24
    assert kept == codes + head
    # Everything but linear inputs and copies of weights is the same in the plain model.
    ledgers = [predict_memory(m, 3, LENGTH, device="cpu") for m in (plain, model)]
    measured = [measure_saved_bytes(m, loss_under(True), ids) for m in (plain, model)]
    assert measured == [ledger.memory.measured.saved_activations for ledger in ledgers]
    for kind in (Kind.ATTENTION, Kind.NORM, Kind.LOSS, Kind.INDEX):
        assert ledgers[0].saved[kind] == ledgers[1].saved[kind]


def test_few_bits_projection_of_simulated_training_is_what_the_faithful_mode_holds() -> None:
    simulated, faithful = (predict_memory(converted(GPT2, r), 3, LENGTH) for r in ("w8a8", "w8a8_faithful"))
    weight_codes = sum(stored_bytes(shape, named("w8a8").fprop.rhs) for shape in SHAPES) * 2
    few, held = simulated.memory.stored_in_few_bits, faithful.memory.measured
    assert few.saved_activations == held.saved_activations - weight_codes
    assert few.weights == simulated.memory.measured.weights - 2 * sum(4 * n * k for n, k in SHAPES) + weight_codes
    assert few.gradients == held.gradients


SHAPES = [(72, 24), (24, 24), (96, 24), (24, 96)]  # [out, in] of a block's layers


@pytest.mark.parametrize(
    ("spec", "nbytes"),
    [
        (QuantSpec(INT8), 6 * 20 + 4),
        (QuantSpec(INT4, PerRow()), 6 * 20 // 2 + 4 * 6),
        (QuantSpec(INT4, PerColumn()), 6 * 20 // 2 + 4 * 20),
        (QuantSpec(INT8, PerRow(), Asymmetric()), 6 * 20 + 2 * 4 * 6),
        (QuantSpec(E4M3, PerGroup(5)), 6 * 20 + 4 * 6 * 4),
        (QuantSpec(TERNARY, PerBlock(7)), 6 * 20 // 5 + 4 * 18),  # five to a byte; 120 / 7 rounds up to 18 blocks
    ],
    ids=str,
)
def test_stored_bytes_by_hand_and_by_allocation(spec: QuantSpec, nbytes: int) -> None:
    assert stored_bytes((6, 20), spec) == nbytes == quantize(torch.randn(6, 20), spec).pack().nbytes()


def test_a_tied_embedding_stays_whole_when_the_head_is_quantized() -> None:
    model = build(GPT2)
    recipe = named("w8_channel")
    convert_(model, lambda name, module: recipe if name == "lm_head" else None, verbose=False)
    memory = predict_memory(model, 2, LENGTH).memory
    assert memory.stored_in_few_bits.weights == memory.measured.weights


def test_accumulation_holds_the_gradients_through_the_loss() -> None:
    model = build(GPT2)
    one, two = (predict_memory(model, 2, LENGTH, accumulation=n) for n in (1, 2))
    assert two.phases["loss backward"] - one.phases["loss backward"] == one.memory.measured.gradients
    assert one.temporaries >= 0


def test_refuses_what_it_has_no_rule_for() -> None:
    dropout = build(GPT2, resid_pdrop=0.1)
    cases = {
        "resid_pdrop=0.1": dropout,
        "activation 'relu'": build(GPT2, activation_function="relu"),
        "knows gpt2, llama, not 'opt'": build(
            {"model_type": "opt", "hidden_size": 16, "num_attention_heads": 2, "ffn_dim": 16, "num_hidden_layers": 1}
        ),
    }
    for message, model in cases.items():
        with pytest.raises(SpecError, match=message):
            predict_memory(model, 1, LENGTH)


def test_checkpointed_blocks_keep_their_inputs() -> None:
    model, ids = build(GPT2), torch.randint(0, VOCABULARY, (2, LENGTH))
    whole = measure_saved_bytes(model, loss_under(False), ids)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert 2 * ids.numel() * 24 * 4 < measure_saved_bytes(model, loss_under(False), ids) < whole / 2


def test_recipe_without_quantized_gemms_changes_nothing() -> None:
    plain, through_recipe = build(GPT2), build(GPT2)
    convert_(through_recipe, Recipe(), verbose=False)
    assert predict_memory(plain, 2, LENGTH) == predict_memory(through_recipe, 2, LENGTH)
