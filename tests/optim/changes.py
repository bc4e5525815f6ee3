# SPDX-License-Identifier: Apache-2.0
"""What may change between two steps of an optimizer whose tables were built: launched and eager steps go on alike.

Run as a program, under Triton's interpreter:

    TRITON_INTERPRET=1 python -m tests.optim.changes
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.nn.parameter import Parameter

import lowbits.kernels.optimizer  # noqa: F401  the interpreter's kernels are used where they are loaded
from lowbits import optim
from lowbits.errors import SpecError
from lowbits.optim import CodecOptimizer, _compiled, _launched, _multi_tensor

SHAPES = [(8, 64), (100,), (3, 160)]


class Pair:
    """Two equal optimizers; `step` launches the one, and does the other eagerly."""

    def __init__(self, make: Callable[[list[Parameter]], CodecOptimizer]) -> None:
        self.generator = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=self.generator) for shape in SHAPES]
        self.both = [make([Parameter(v.clone()) for v in values]) for _ in range(2)]

    def each(self, change: Callable[[CodecOptimizer], object]) -> None:
        """Do the same to both."""
        for optimizer in self.both:
            change(optimizer)

    def step(self, *without: int, launched: bool = True) -> None:
        """Draw gradients, but for some parameters, step, and compare every bit."""
        one, two = self.both
        for index, (p, q) in enumerate(zip(*map(parameters, self.both), strict=True)):
            p.grad = q.grad = None
            if index not in without:
                p.grad = torch.randn(p.shape, generator=self.generator)
                q.grad = p.grad.clone()
        if launched:
            with patch.object(_compiled, "update_", side_effect=AssertionError("not launched")):
                one.step()
        else:
            one.step()
        with (
            patch.object(_launched, "update_", lambda _, targets: targets),
            patch.object(_launched, "repeat_", lambda _: False),
        ):
            two.step()
        for p, q in zip(*map(parameters, self.both), strict=True):
            assert torch.equal(p, q)
            assert one.state[p].keys() == two.state[q].keys()
            assert all(torch.equal(t, two.state[q][name]) for name, t in one.state[p].items())


def parameters(optimizer: CodecOptimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def adamw(**options) -> Pair:
    return Pair(lambda params: optim.AdamW8bit(params, lr=1e-2, min_8bit_size=200, block_size=64, **options))


def a_parameter_s_data_is_replaced() -> None:
    pair = adamw()
    pair.step()
    pair.each(lambda o: setattr(parameters(o)[0], "data", parameters(o)[0].detach().clone()))
    pair.step()
    pair.each(lambda o: setattr(parameters(o)[0], "data", torch.empty(64, 8).t().copy_(parameters(o)[0].detach())))
    pair.step(launched=False)  # not contiguous


def a_parameter_changes_its_shape() -> None:
    pair = adamw()
    pair.step()
    p = parameters(pair.both[0])[1]
    p.data = p.data[:90]
    p.grad = torch.ones(90)
    with pytest.raises(SpecError, match="is \\(90,\\).*its state was made for \\(100,\\)"):
        pair.both[0].step()


def states_move_and_start_anew() -> None:
    pair = adamw()
    pair.step()
    pair.step()

    def move(optimizer: CodecOptimizer) -> None:
        for state in optimizer.state.values():
            state.update({name: tensor.clone() for name, tensor in state.items()})

    pair.each(move)
    pair.step()
    pair.each(lambda o: o.state.__setitem__(parameters(o)[0], {}))
    pair.step()
    pair.each(lambda o: o.state.clear())
    pair.step()
    pair.each(lambda o: o.load_state_dict(copy.deepcopy(o.state_dict())))
    pair.step()


def rates_are_numbers_and_tensors() -> None:
    pair = adamw()
    for rate in (1e-2, torch.tensor(1e-3), 1e-4, torch.tensor(2e-3), torch.tensor(3e-3)):
        pair.each(lambda o, rate=rate: o.param_groups[0].update(lr=rate))
        pair.step()
        pair.step()


def groups_are_added() -> None:
    pair = adamw()
    pair.step()
    pair.each(lambda o: o.add_param_group({"params": [Parameter(torch.ones(300))], "betas": (0.5, 0.9)}))
    pair.step(3)
    pair.step()


def rules_that_change_with_the_step_count_every_step() -> None:
    pair = Pair(lambda params: optim.AdEMAMix8bit(params, t_alpha=5, t_beta3=5, min_8bit_size=200))
    for without in ((), (0,), (), (1, 2), (0,), ()):
        pair.step(*without)
    built = vars(pair.both[0])["_built"]
    assert len(built.tables) == 3
    pair.both[0].zero_grad()
    for number in range(8):  # many sets of parameters do not pile up
        pair.step(*[i for i in range(3) if number & 1 << i])
    assert sum(map(len, built.tables.values())) <= 4 * len(SHAPES)


def copies_are_made_and_optimizers_go() -> None:
    pair = adamw()
    pair.step()
    pair.both[0] = copy.deepcopy(pair.both[0])
    pair.step()
    pair.both[0] = pickle.loads(pickle.dumps(pair.both[0]))
    pair.step()
    model = nn.Linear(64, 64)
    optimizer = optim.AdamW8bit(model.parameters())
    handle = optim.step_in_backward(model, optimizer)
    model(torch.ones(1, 64)).sum().backward()
    handle.remove()
    gone = weakref.ref(optimizer), weakref.ref(model.weight)
    del model, optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def a_scaler_scales_skips_and_leaves() -> None:
    pair = adamw()
    for scale, found in ((8.0, 0.0), (8.0, 1.0), (None, 0.0), (4.0, None)):
        for optimizer in pair.both:
            for name, value in (("grad_scale", scale), ("found_inf", found)):
                setattr(optimizer, name, None if value is None else torch.tensor(value))
        pair.step()
    for optimizer in pair.both:
        del optimizer.grad_scale, optimizer.found_inf
    pair.step()


def captured_tables_are_left_alone() -> None:
    pair = adamw()
    pair.step()
    with patch.object(_launched, "_capturing", lambda: True):
        pair.step()
    (captured,) = vars(pair.both[0])["_built"].captured.values()
    before = captured.rows.clone()
    pair.each(lambda o: setattr(parameters(o)[0], "data", parameters(o)[0].detach().clone()))
    pair.step()
    pair.step()
    assert torch.equal(captured.rows, before)


def tables_in_backward_share_what_is_large() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(4)])
    optimizer = optim.AdamW8bit(model.parameters())
    optim.step_in_backward(model, optimizer)
    model(torch.ones(1, 64)).sum().backward()
    tables = list(vars(optimizer)["_built"].tables.values())
    assert len(tables) == 4
    places = {table.data_ptr() for tables_of_one in tables for table in tables_of_one.steps.values()}
    assert len(places) == 2  # one for each moment


def shards_move_and_gradients_are_summands() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    models = [nn.Linear(160, 40, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = []
    for model in models:
        fully_shard(model, mesh=mesh)
        optimizers.append(optim.AdamW8bit(model.parameters(), lr=1e-2))
    for step in range(4):
        for model in models:
            model(torch.ones(1, 160)).square().sum().backward()
        p = models[0].weight
        assert isinstance(p, DTensor) and isinstance(p.grad, DTensor)
        if step == 2:  # as a norm's under sequence parallelism
            p.grad = DTensor.from_local(p.grad.to_local(), mesh, [Partial()])
        if step == 3:  # as when a model is moved
            p._local_tensor = p._local_tensor.clone()
        with patch.object(_compiled, "update_", side_effect=AssertionError("not launched")):
            optimizers[0].step()
        with (
            patch.object(_launched, "update_", lambda _, targets: targets),
            patch.object(_launched, "repeat_", lambda _: False),
        ):
            optimizers[1].step()
        q = models[1].weight
        assert isinstance(q, DTensor) and torch.equal(p.to_local(), q.to_local())
        assert p.grad.placements == p.placements
        for optimizer in optimizers:
            optimizer.zero_grad()
    torch.distributed.destroy_process_group()


CASES = (
    a_parameter_s_data_is_replaced, a_parameter_changes_its_shape, states_move_and_start_anew,
    rates_are_numbers_and_tensors, groups_are_added, rules_that_change_with_the_step_count_every_step,
    copies_are_made_and_optimizers_go, a_scaler_scales_skips_and_leaves, captured_tables_are_left_alone,
    tables_in_backward_share_what_is_large, shards_move_and_gradients_are_summands,
)  # fmt: skip

if __name__ == "__main__":
    _multi_tensor._CHUNK = 512  # the interpreter takes its time over empty tiles
    for case in CASES:
        case()
        print(f"{case.__name__}: done", flush=True)
