# SPDX-License-Identifier: Apache-2.0
"""Which layers stay in high precision (spec of NVFP4 pre-training, 2.6 and C11)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lowbits.errors import ConversionError, SpecError
from lowbits.models import build
from lowbits.nn import Keep, convert_, quantized_layers
from lowbits.recipes import named

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 40}


def llama(layers: int) -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, num_key_value_heads=1, **SMALL))


def kept_blocks(model: nn.Module, keep: Keep) -> list[int]:
    """Numbers of the blocks of which every linear layer is kept; none is kept in part."""
    names = {f"{n}." for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    kept = {f"{n}." for n in keep.layers(model)}
    blocks = sorted({int(n.split(".")[2]) for n in names if "layers." in n})
    whole = [b for b in blocks if {n for n in names if f"layers.{b}." in n} <= kept]
    assert kept == {n for n in names for b in whole if f"layers.{b}." in n}
    return whole


def test_c11_first_two_and_last_eight_of_62_blocks():
    model = llama(62)
    conversion = convert_(model, named("w8a8"), keep=Keep(first=2, last=8), verbose=False)
    expected = [0, 1, *range(54, 62)]
    assert sorted({int(n.split(".")[2]) for n in conversion.left if n != "lm_head"}) == expected
    assert {int(n.split(".")[2]) for n in conversion.converted} == set(range(62)) - set(expected)
    block = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24
    assert conversion.kept_share == 10 * block / (62 * block + 16 * 40)
    # 16 % of the blocks, to the digit that the paper prints.
    assert round(100 * len(expected) / 62) == 16
    assert type(model.model.layers[1].mlp.up_proj) is nn.Linear
    first, *_, tail, _ = str(conversion).splitlines()
    assert first == "converted 364 linear layers, 83.4% of the linear FLOPs, 16.0% kept in high precision"
    last = "model.layers.61.mlp.down_proj (56): kept, blocks 54 to 61 of 62 (keep.last=8)"
    assert tail == f"  left model.layers.54.self_attn.q_proj to {last}"


@pytest.mark.parametrize(
    ("blocks", "keep", "expected"),
    [
        (52, Keep(last=0.15), range(44, 52)),  # the paper's 8B: the last 8 of 52
        (62, Keep(last=0.15), range(53, 62)),
        (4, Keep(last=0.01), [3]),  # a share is never nothing
        (20, Keep(first=0.05, last=0.1), [0, 18, 19]),
        (100, Keep(last=0.07), range(93, 100)),  # 0.07 * 100 is more than 7 in binary
        (3, Keep(first=1, last=2), [0, 1, 2]),
        (3, Keep(first=1), [0]),
    ],
)
def test_counts_and_shares(blocks, keep, expected):
    assert kept_blocks(llama(blocks), keep) == list(expected)


def bert() -> nn.Module:
    return BertForMaskedLM(BertConfig(num_hidden_layers=3, **SMALL))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "vocab_size": 40}
    return T5ForConditionalGeneration(T5Config(num_layers=2, **sizes))


class Experts(nn.Module):
    """A block with a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(5))


def mixture() -> nn.Module:
    """torchtitan keeps its blocks in a numbered dictionary; the heads beside them are no blocks."""
    layers = nn.ModuleDict({str(i): Experts() for i in range(3)})
    return nn.ModuleDict({"layers": layers, "heads": nn.ModuleList(nn.Linear(4, 4) for _ in range(9))})


def vision() -> nn.Module:
    """timm's way: blocks in a sequence, between a stem and a head."""
    body = nn.Sequential(*(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(3)))
    return nn.Sequential(nn.Linear(4, 4), body, nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("make", "first", "last"),
    [
        (lambda: build("gpt2-nano", 40, 16, seed=0), "transformer.h.0.", "transformer.h.3."),
        (bert, "bert.encoder.layer.0.", "bert.encoder.layer.2."),
        (t5, "encoder.block.0.", "decoder.block.1."),
        (mixture, "layers.0.", "layers.2."),
        (vision, "1.0.", "1.2."),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4)), "0", "3"),
    ],
    ids=["gpt2", "bert", "t5", "mixture", "vision", "perceptron"],
)
def test_blocks_are_found_in_the_tree(make, first, last):
    for keep, prefix in ((Keep(first=1), first), (Keep(last=1), last)):
        model = make()
        linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
        inside = {name for name in linear if name.startswith(prefix)}
        assert set(keep.layers(model)) == inside
        conversion = convert_(model, named("w8a8"), keep=keep, verbose=False)
        assert conversion.converted and not inside & set(conversion.converted)


def test_names_are_patterns_and_reach_the_head_too():
    model = build("gpt2-nano", 40, 16, seed=0)
    keep = Keep(first=1, names=("*.mlp.c_proj", "*.lm_head"))
    conversion = convert_(model, lambda name, module: named("w8a8"), keep=keep, verbose=False)
    left = conversion.left
    assert sum(name.endswith("mlp.c_proj") for name in left) == 4 and "transformer.h.0.attn.c_attn" in left
    assert left["lm_head"] == "kept, keep.names '*.lm_head'"
    assert left["transformer.h.0.mlp.c_proj"] == "kept, block 0 of 4 (keep.first=1)"
    assert str(keep) == "first 1 of the blocks, *.mlp.c_proj, *.lm_head" and str(Keep()) == "nothing"


def test_a_converted_layer_returns_to_high_precision():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    convert_(model, named("w8a8"), verbose=False)
    convert_(model, named("w4_tensor"), keep=Keep(names=("1",)), verbose=False)
    assert [layer.recipe for layer in quantized_layers(model).values()] == [named("w4_tensor"), named("bf16")]


@pytest.mark.parametrize(
    ("make", "keep", "message"),
    [
        (bert, Keep(names=("*.c_attn",)), r"keep\.names: no linear layer of BertForMaskedLM is called '\*\.c_attn'"),
        (bert, Keep(names=("bert.encoder.layer.0",)), r"A block with all its layers is `<block>\.\*`"),
        (bert, Keep(first=2, last=2), r"keep\.first=2 and keep\.last=2 are 4 blocks, BertForMaskedLM has 3"),
        (bert, Keep(names=("*",)), r"none of its 20 linear layers was converted\. `keep` \(\*\)"),
        (lambda: nn.Bilinear(2, 2, 2), Keep(last=1), r"Bilinear has no list of blocks"),
    ],
)
def test_a_rule_that_matches_nothing_says_so_and_changes_nothing(make, keep, message):
    model = make()
    with pytest.raises(ConversionError, match=message):
        convert_(model, named("w8a8"), keep=keep, verbose=False)
    assert not quantized_layers(model)


@pytest.mark.parametrize("values", [{"first": -1}, {"last": 1.5}, {"last": 1.0}, {"first": float("nan")}])
def test_counts_and_shares_out_of_range(values):
    with pytest.raises(SpecError, match=r"a number of blocks \(2\) or a share of them between 0 and 1 \(0\.15\)"):
        Keep(**values)
