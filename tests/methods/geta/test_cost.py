# SPDX-License-Identifier: Apache-2.0
"""What is counted is what torch's own counter, and the files, say."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lowbits.methods import geta
from tests.methods.geta.zoo import ZOO, example, random_keep


@pytest.mark.parametrize("name", ZOO)
def test_bops_and_bytes_are_an_independent_counters(name: str) -> None:
    """A13: exact integers; torch counts what runs, hooks see the bits."""
    model, graph, _ = example(name)
    model = copy.deepcopy(model)
    geta.quantize_(model, bits=6)
    first = next(iter(geta.weight_quantizers(model).values()))
    first.set_bits_(3)
    small = geta.construct(graph, model, random_keep(graph, 3))
    args, kwargs = graph.example
    found = geta.cost(small, args, kwargs)
    # The fused kernels are not counted on a CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        small(*args, **kwargs)
    assert 2 * sum(work.macs for work in found.works) == counter.get_total_flops()
    bits = {n: module.bits for n, module in small.named_modules() if isinstance(module, geta.PackedWeight)}
    by_layer = {work.name: work for work in found.works if work.layer and work.weight_bits < 32}
    assert {f"network.{n.rpartition('.')[0]}.packed": work.weight_bits for n, work in by_layer.items()} == bits
    assert found.bops == sum(w.macs * w.weight_bits * 32 for w in found.works if w.layer)
    assert found.complete_bops - found.bops == sum(w.macs * 32 * 32 for w in found.works if not w.layer)
    assert found.stored_bytes == sum(t.nbytes for t in small.state_dict().values())
    kept = graph.kept_slices(random_keep(graph, 3))
    named = dict(model.named_parameters(remove_duplicate=False))  # a tied one is in the graph once
    left = [math.prod(int(mask.sum()) for mask in kept[name]) for name in graph.parameter_nodes if name in named]
    assert found.parameters == sum(left)
    assert found.logical_bytes < found.stored_bytes < geta.dense_cost(graph).stored_bytes


@pytest.mark.parametrize("name", ["mixed", "vgg", "resnet", "plain"])
def test_the_dense_network_is_counted_as_torch_does(name: str) -> None:
    model, graph, _ = example(name)
    args, kwargs = graph.example
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    dense = geta.dense_cost(graph)
    assert 2 * sum(work.macs for work in dense.works) == counter.get_total_flops()
    assert dense.parameters == sum(p.numel() for p in model.parameters())
    assert dense.relative_bops(dense) == 1 == dense.relative_complete_bops(dense)
