# SPDX-License-Identifier: Apache-2.0
"""Times by family: the arithmetic by hand, and a real block on the CPU."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from lowbits.analysis import Family, classify, family_of, linear_flops_share, time_share


@pytest.mark.parametrize(
    ("width", "length", "share"),
    [
        (768, 256, 0.947),
        (768, 1024, 0.818),
        (768, 8192, 0.360),
        (1600, 256, 0.974),
        (1600, 1024, 0.904),
        (1600, 8192, 0.540),
    ],
)
def test_flop_anchors_of_the_study(width: int, length: int, share: float) -> None:
    assert linear_flops_share(width, length) == pytest.approx(share, abs=5e-4)


def test_operations_have_families() -> None:
    families = {
        Family.LINEAR: "aten::mm aten::addmm aten::_scaled_mm aten::_int_mm",
        Family.ATTENTION: "aten::_scaled_dot_product_flash_attention aten::_flash_attention_backward aten::bmm "
        "aten::_scaled_dot_product_cudnn_attention_backward aten::_softmax",
        Family.NORM: "aten::native_layer_norm aten::native_layer_norm_backward",
        Family.ELEMENTWISE: "aten::copy_ aten::pow aten::tanh_backward aten::add_ aten::sum",
        Family.OTHER: "aten::view MyAttentionBackward0 aten::unheard_of",
    }
    for family, names in families.items():
        assert {family_of(name) for name in names.split()} == {family}


def test_totals_are_summed_not_averaged() -> None:
    share = classify([("aten::mm", 1.0), ("aten::mm", 3.0), ("aten::add", 1.0), ("aten::odd", 2.0), ("aten::odd", 1.0)])
    assert share.milliseconds[Family.LINEAR] == 4.0
    assert share.share(Family.LINEAR) == 0.5
    assert share.unclassified == {"aten::odd": 3.0}


def test_a_gpt2_block_is_classified_on_the_cpu() -> None:
    config = GPT2Config(n_embd=128, n_head=2, resid_pdrop=0, attn_pdrop=0, attn_implementation="sdpa")
    block = GPT2Block(config, layer_idx=0)
    x = torch.randn(4, 128, 128, requires_grad=True)
    share = time_share(lambda: block(x).sum().backward(), torch.device("cpu"), repeats=2)
    assert sum(share.share(family) for family in Family) == pytest.approx(1.0)
    named = (Family.LINEAR, Family.ATTENTION, Family.NORM, Family.ELEMENTWISE)
    assert all(share.milliseconds[family] > 0 for family in named)
    # what is left over is bookkeeping: no operation that computes is unclassified
    computing = ("mm", "add", "mul", "norm", "attention", "tanh", "pow", "sum", "copy", "softmax")
    assert not [name for name in share.unclassified if name.startswith("aten::") and name.endswith(computing)]
