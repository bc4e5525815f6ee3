# SPDX-License-Identifier: Apache-2.0
"""A clear error or the right result: gradients and parameters that are unusual, and arguments that are wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lowbits.errors import CheckpointError, SpecError
from lowbits.formats import DYNAMIC8, INT8, UDYNAMIC8
from lowbits.optim import AdamW, AdamW4bit, AdamW8bit, Blockwise, GlobalNorm, Lion8bit, Percentile, Quantized, SGD8bit
from lowbits.quantizers import QuantSpec, Rounding

KINDS = [AdamW, AdamW8bit, AdamW4bit, Lion8bit]


def make(kind, params, **options):
    return kind(params, lr=1e-2, **({} if kind is AdamW else {"min_8bit_size": 0}), **options)


def values(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).view(shape)


# --- gradients ------------------------------------------------------------------------------------------------------


def sparse() -> nn.Parameter:
    table = nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    return table.weight


def replaced(gradient: torch.Tensor) -> nn.Parameter:
    p = nn.Parameter(values(4, 3))
    p.grad_dtype = None  # lets a gradient be of any dtype
    p.grad = gradient
    return p


def reshaped() -> nn.Parameter:
    p = nn.Parameter(values(4, 3))
    p.grad = values(4, 3)
    p.data = values(3, 4)
    return p


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (sparse, "torch.sparse_coo gradient of torch.float32; dense real floats are needed.*sparse=False"),
        (lambda: replaced(values(4, 3).to(torch.complex64)), "gradient of torch.complex64"),
        (lambda: replaced(torch.ones(4, 3, dtype=torch.int32)), "gradient of torch.int32"),
        (reshaped, r"parameter 0.1 is \(3, 4\), its gradient \(4, 3\)"),
    ],
    ids=["sparse", "complex", "integer", "other shape"],
)
@pytest.mark.parametrize("clip", [None, GlobalNorm(1.0)], ids=["", "clipped"])
def test_gradients_that_no_rule_can_use_are_refused_and_change_nothing(p, message, clip):
    good, bad = nn.Parameter(values(5)), p()
    optimizer = AdamW8bit([good, bad], clip=clip)
    good.grad = values(5)
    with pytest.raises(SpecError, match=f"AdamW: parameter 0.1.*{message}" if "0.1" not in message else message):
        optimizer.step()
    assert torch.equal(good, values(5))
    assert all(not state or int(state["step"]) == 0 for state in optimizer.state.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_that_changes_its_shape_is_refused(kind):
    p = nn.Parameter(values(4, 64))
    optimizer = make(kind, [p])
    p.grad = values(4, 64)
    optimizer.step()
    p.grad = None
    p.data = values(64, 4)
    p.grad = values(64, 4)
    with pytest.raises(SpecError, match=r"is \(64, 4\).*its state was made for \(4, 64\).*make a new optimizer"):
        optimizer.step()
    assert torch.equal(p, values(64, 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_gradient_of_another_dtype_counts_by_its_value(kind, dtype):
    p, q = nn.Parameter(values(3, 100)), nn.Parameter(values(3, 100))
    p.grad_dtype = None
    p.grad = values(3, 100).to(dtype)
    q.grad = values(3, 100).to(dtype).float()
    for each in (p, q):
        make(kind, [each]).step()
    assert torch.equal(p, q)


def test_the_second_of_two_gradients_of_a_step_may_be_missing():
    p, q = nn.Parameter(values(300)), nn.Parameter(values(300))
    optimizer = AdamW8bit([p, q], min_8bit_size=0)
    p.grad = values(300)
    optimizer.step()
    assert torch.equal(q, values(300)) and q not in optimizer.state


# --- parameters -----------------------------------------------------------------------------------------------------

LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": lambda x: torch.stack((x, x), -1)[..., 0],
    "expanded rows": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("kind", [*KINDS, lambda p, **k: SGD8bit(p, momentum=0.9, **k)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_and_gradients_may_lie_in_memory_as_they_like(kind, layout):
    def run(change):
        p = nn.Parameter(change(values(6, 100)))
        optimizer = make(kind, [p], clip=GlobalNorm(1.0))
        for scale in (1.0, -0.3, 0.1):
            p.grad = change(scale * values(6, 100))
            optimizer.step()
        return p, optimizer

    (p, _), (q, _) = run(LAYOUTS[layout]), run(lambda x: x)
    assert not p.is_contiguous() and q.is_contiguous()
    assert torch.equal(p, q)


def test_stochastic_rounding_draws_for_the_element_not_for_its_place():
    results = []
    for change in (LAYOUTS["transposed"], lambda x: x):
        p = nn.Parameter(change(values(6, 100).bfloat16()))
        p.grad = change(values(6, 100).bfloat16())
        AdamW8bit([p], lr=1e-4, rounding=Rounding.STOCHASTIC).step()
        results.append(p)
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", [*KINDS, lambda p, **k: AdamW(p, first=Quantized(QuantSpec(INT8)), lr=1e-2)])
def test_parameters_without_elements_are_passed_over(kind):
    empty, p = nn.Parameter(torch.zeros(0, 7)), nn.Parameter(values(300))
    optimizer = kind([empty, p], clip=Percentile(), lr=1e-2)
    for each in (empty, p):
        each.grad = torch.ones_like(each)
    optimizer.step()
    assert not torch.equal(p, values(300)) and empty.shape == (0, 7)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    alone = kind([nn.Parameter(torch.zeros(0))], lr=1e-2)
    alone.param_groups[0]["params"][0].grad = torch.zeros(0)
    alone.step()


def test_no_gradient_at_all():
    for clip in (None, GlobalNorm(1.0), Percentile()):
        AdamW8bit([nn.Parameter(values(5))], clip=clip).step()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8])
def test_parameters_that_are_no_real_floats_are_refused(dtype):
    with pytest.raises(SpecError, match=rf"AdamW: parameter 1 of the group, {dtype} \(3,\), is no real float"):
        AdamW8bit([nn.Parameter(values(3)), torch.zeros(3, dtype=dtype)])


def test_parameters_come_once_in_order_and_at_all():
    p = nn.Parameter(values(3))
    for twice in ([p, p], [{"params": [p]}, {"params": [p]}]):
        with pytest.raises(SpecError, match="comes twice and would be updated twice a step"):
            AdamW8bit(twice)
    generator = nn.Linear(2, 2).parameters()
    list(generator)
    with pytest.raises(SpecError, match="AdamW: no parameters; a generator is empty after its first use"):
        AdamW8bit(generator)
    with pytest.raises(TypeError, match="ordering of tensors in sets"):
        AdamW8bit([{"params": {p}}])
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        AdamW8bit(p)
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        AdamW8bit(["weight"])


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"lr": -1.0}, "lr is at least 0, got -1.0"),
        ({"lr": math.nan}, "lr is at least 0, got nan"),
        ({"lr": torch.tensor([1e-3])}, r"lr is a number or a float32 tensor of no dimension, got torch.float32 \(1,\)"),
        ({"lr": torch.tensor(1e-3, dtype=torch.float64)}, "float32 tensor of no dimension, got torch.float64"),
        ({"lr": torch.tensor(-1e-3)}, "lr is at least 0, got -0.00"),
        ({"betas": (0.9, 1.0)}, r"betas are in \[0, 1\)"),
        ({"betas": (-0.1, 0.9)}, r"betas are in \[0, 1\)"),
        ({"eps": -1e-8}, "eps is at least 0, got -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay is at least 0, got -0.1"),
        ({"amsgrad": True}, "no argument is called 'amsgrad': AMSGrad is not offered"),
        ({"percentile_clipping": 5}, r"'percentile_clipping': pass clip=Percentile\(percentile\)"),
        ({"max_grad_norm": 1.0}, r"'max_grad_norm': pass clip=GlobalNorm\(limit\)"),
        ({"is_paged": True}, "'is_paged': pass offload=True"),
        ({"min8bit_size": 5}, "'min8bit_size': did you mean min_8bit_size?"),
        ({"qqq": 5}, "'qqq': known: clip, "),
    ],
)
@pytest.mark.parametrize("kind", [AdamW, AdamW8bit])
def test_wrong_arguments_are_named(kind, bad, message):
    with pytest.raises(SpecError, match=f"^AdamW: .*{message}"):
        kind([nn.Parameter(values(3))], **bad)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def stepped(shape=(6, 100), **arguments):
    p = nn.Parameter(values(*shape))
    optimizer = AdamW8bit([p], min_8bit_size=0, **arguments)
    p.grad = values(*shape)
    optimizer.step()
    return p, optimizer


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"first": Blockwise(DYNAMIC8, 64), "second": Blockwise(UDYNAMIC8, 64)}, "first"),
        ({"first": Blockwise(INT8, 256)}, "first"),  # of the same shapes: only the format tells
        ({"shape": (5, 100)}, "first"),
        ({"shape": (100, 6)}, "first"),
        ({"clip": Percentile(5, history=50)}, "history"),
    ],
    ids=["block size", "format", "shape", "orientation", "clipping history"],
)
def test_states_that_do_not_fit_are_refused_and_change_nothing(other, message):
    p, optimizer = stepped(clip=Percentile())
    before = {k: t.clone() for k, t in optimizer.state[p].items()}
    with pytest.raises(CheckpointError, match=message):
        optimizer.load_state_dict(stepped(**{"clip": Percentile(), **other})[1].state_dict())
    assert all(torch.equal(optimizer.state[p][k], t) for k, t in before.items())


def test_a_history_of_norms_starts_anew_where_the_checkpoint_has_none():
    _, without = stepped()
    p, optimizer = stepped(clip=Percentile())
    optimizer.load_state_dict(without.state_dict())
    p.grad = 1e-3 * values(6, 100)
    optimizer.step()
    assert (optimizer.state[p]["clip.history"] == p.grad.norm()).all()
