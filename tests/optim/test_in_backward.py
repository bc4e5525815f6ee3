# SPDX-License-Identifier: Apache-2.0
"""Updates within backward: the same bits as the ordinary step, and never more than one layer's gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lowbits.errors import SpecError
from lowbits.optim import AdamW, AdamW8bit, GlobalNorm, Percentile, step_in_backward
from lowbits.optim._sharding import local
from lowbits.quantizers import Rounding

WIDTH, LAYERS = 128, 6  # enough elements for the compiled step; those of one parameter are not


class Block(nn.Module):
    """A residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Net(nn.Module):
    """Residual layers between an embedding and a head that is tied to it."""

    def __init__(self, dtype: torch.dtype = torch.float32, recompute: bool = False) -> None:
        super().__init__()
        self.emb = nn.Embedding(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.emb.weight
        self.recompute = recompute
        self.to(dtype)

    def forward(self, tokens):
        h = self.emb(tokens)
        for layer in self.layers:
            h = checkpoint(layer, h, use_reentrant=False) if self.recompute else layer(h)
        return self.head(h).float().square().mean()


def pair(recompute: bool = False, dtype: torch.dtype = torch.bfloat16, **options):
    """Two equal models with an optimizer each."""
    torch.manual_seed(0)
    one, two = Net(dtype, recompute), Net(dtype, recompute)
    two.load_state_dict(one.state_dict())
    arguments = {"lr": 1e-2, "rounding": Rounding.STOCHASTIC, "min_8bit_size": 1000, **options}
    groups = lambda m: [  # noqa: E731  two groups, so that the place in a group is not the place in the model
        {"params": [p for p in m.parameters() if p.ndim > 1]},
        {"params": [p for p in m.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return (one, AdamW8bit(groups(one), **arguments)), (two, AdamW8bit(groups(two), **arguments))


def batches(count: int):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(WIDTH, (2, 8), generator=generator) for _ in range(count)]


def equal(one, two) -> bool:
    """Every bit of parameters and states."""
    (model, optimizer), (other, twin) = one, two
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    states = [(optimizer.state[p], twin.state[q]) for p, q in pairs]
    return all(torch.equal(p, q) for p, q in pairs) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in states
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"clip": Percentile(50, history=4)}, {"recompute": True}, {"dtype": torch.float32}],
    ids=["plain", "percentile", "checkpointing", "float32"],
)
def test_the_numbers_are_those_of_the_ordinary_step(options):
    ordinary, inside = pair(**options)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for _, optimizer in (ordinary, inside)]
    step_in_backward(*inside)
    for tokens in batches(4):
        for (model, optimizer), scheduler in zip((ordinary, inside), schedulers, strict=True):
            optimizer.zero_grad()
            model(tokens).backward()
            assert all(p.grad is None for p in model.parameters()) is (model is inside[0])
            optimizer.step()
            scheduler.step()
    assert equal(ordinary, inside)
    assert int(inside[1].state[inside[0].emb.weight]["step"]) == 4  # the tied one too was updated once a backward


def test_accumulated_gradients_give_the_same_numbers():
    ordinary, inside = pair()
    handle = step_in_backward(*inside)
    for first, second in zip(batches(4)[::2], batches(4)[1::2], strict=True):
        model, optimizer = ordinary
        optimizer.zero_grad()
        model(first).backward()
        model(second).backward()
        optimizer.step()
        with handle.accumulate():
            inside[0](first).backward()
        inside[0](second).backward()
    assert equal(ordinary, inside)


def test_resume_and_remove():
    ordinary, inside = pair()
    handle = step_in_backward(*inside)
    for number, tokens in enumerate(batches(6)):
        for model, optimizer in (ordinary, inside):
            optimizer.zero_grad()
            model(tokens).backward()
            optimizer.step()
            if number == 2:
                optimizer.load_state_dict(optimizer.state_dict())  # puts new groups in place
                for group in optimizer.param_groups:
                    group["lr"] = 3e-3
        if number == 4:
            handle.remove()
    assert equal(ordinary, inside)
    assert all(p.grad is not None for p in inside[0].parameters())


def gradient_bytes_at_the_peak(model, optimizer, install: bool) -> int:
    """The most bytes of gradients that exist at once, counted whenever one is complete."""
    peak = 0

    def count(_: torch.Tensor) -> None:
        nonlocal peak
        peak = max(peak, sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(count)
    if install:
        step_in_backward(model, optimizer)
    for tokens in batches(2):
        optimizer.zero_grad()
        model(tokens).backward()
        optimizer.step()
    return peak


def test_the_memory_saved():
    ordinary, inside = pair()
    everything = sum(p.nbytes for p in ordinary[0].parameters())
    assert gradient_bytes_at_the_peak(*ordinary, install=False) == everything
    # A node of the graph may hand over the gradients of a layer's weight and bias together.
    layer = sum(p.nbytes for p in inside[0].layers[0].parameters())
    assert gradient_bytes_at_the_peak(*inside, install=True) <= layer < everything / LAYERS


def test_a_gradient_that_is_not_finite_under_percentile_clipping_skips_its_parameter_as_in_the_ordinary_step():
    ordinary, inside = pair(clip=Percentile(50, history=4))
    step_in_backward(*inside)
    for number, tokens in enumerate(batches(3)):
        for model, optimizer in (ordinary, inside):
            optimizer.zero_grad()
            bad = math.inf if number == 1 else 1.0
            handle = model.layers[2].linear.bias.register_hook(lambda g, bad=bad: g * bad)
            model(tokens).backward()
            handle.remove()
            optimizer.step()
    assert equal(ordinary, inside)
    assert int(inside[1].state[inside[0].layers[2].linear.bias]["step"]) == 2


def test_parameters_of_other_models_keep_the_ordinary_step():
    model, other = Net(), nn.Linear(3, 3)
    optimizer = AdamW([*model.parameters(), *other.parameters()])
    step_in_backward(model, optimizer)
    (model(batches(1)[0]) + other(torch.ones(1, 3)).sum()).backward()
    assert other.weight.grad is not None and other.weight not in optimizer.state
    optimizer.step()
    assert int(optimizer.state[other.weight]["step"]) == int(optimizer.state[model.emb.weight]["step"]) == 1


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone; returns its device mesh."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("clip", [None, Percentile(50, history=4)], ids=str)
def test_sharded_parameters_are_updated_in_backward_too(clip, one_rank):
    """On one rank; the same script gave the same on two."""
    both = []
    for (model, _), inside in zip(pair(dtype=torch.float32), (False, True), strict=True):
        for layer in model.layers:
            fully_shard(layer, mesh=one_rank)
        fully_shard(model, mesh=one_rank)
        optimizer = AdamW8bit(model.parameters(), lr=1e-2, clip=clip, min_8bit_size=1000)
        if inside:
            step_in_backward(model, optimizer)
        both.append((model, optimizer))
    for number, tokens in enumerate(batches(4)):
        for model, optimizer in both:
            optimizer.zero_grad()
            model(tokens).backward()
            assert all(p.grad is None for p in model.parameters()) is (model is both[1][0])
            optimizer.step()
            if number == 1:
                optimizer.load_state_dict(optimizer.state_dict())
    for p, q in zip(both[0][0].parameters(), both[1][0].parameters(), strict=True):
        assert isinstance(p, DTensor) and torch.equal(p.to_local(), q.to_local())
        ours, theirs = both[0][1].state[p], both[1][1].state[q]
        assert all(torch.equal(local(ours[k]), local(theirs[k])) for k in ours | theirs)


def test_what_cannot_be_done_is_refused(one_rank):
    model = Net()
    with pytest.raises(SpecError, match=r"AdamW has clip=GlobalNorm\(limit=1.0\).*Percentile"):
        step_in_backward(model, AdamW(model.parameters(), clip=GlobalNorm(1.0)))
    with pytest.raises(SpecError, match="none of the parameters of Net"):
        step_in_backward(model, AdamW(Net().parameters()))
    wrapped = DistributedDataParallel(model)
    with pytest.raises(SpecError, match="fully_shard"):
        step_in_backward(wrapped, AdamW(wrapped.parameters()))
