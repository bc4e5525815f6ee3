# SPDX-License-Identifier: Apache-2.0
"""Overrides by name, module and parameter; which tensors stay in 32 bits; copies and checkpoints keep both."""

from __future__ import annotations

import copy
import fnmatch
import math

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import GPT2Config, GPT2LMHeadModel

from lowbits.errors import CheckpointError, SpecError
from lowbits.formats import DYNAMIC4, DYNAMIC8
from lowbits.nn import stable_embedding_
from lowbits.optim import AdamW, AdamW8bit, Blockwise, Exact, Lion8bit, embeddings_in_32_bits, param_groups


class Net(nn.Module):
    """Two matrices of 4096 elements, one of 4095, an embedding, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(64, 64)
        self.a = nn.Linear(64, 64)
        self.b = nn.Linear(65, 63, bias=False)
        self.norm = nn.LayerNorm(64)

    def forward(self, tokens):
        h = self.norm(self.a(self.emb(tokens)))
        return (h[..., :63] * self.b.weight.sum(1)).square().mean()


def train(model, optimizer, steps: int, scheduler=None) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randint(64, (4, 5), generator=generator)).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


def bits(model, optimizer, moment: str = "first") -> dict[str, int]:
    """Bits in which each parameter's moment is stored, from the stored tensors."""
    names = {id(p): n for n, p in model.named_parameters()}
    kinds = {torch.uint8: 8, torch.float32: 32}
    stored = {names[id(p)]: state for p, state in optimizer.state.items()}
    return {n: kinds[s.get(f"{moment}.codes", s.get(f"{moment}.value")).dtype] for n, s in stored.items()}


SMALL = {"a.bias": 32, "b.weight": 32, "norm.weight": 32, "norm.bias": 32}


def test_small_tensors_stay_in_32_bits_by_number_of_elements():
    model = Net()
    optimizer = AdamW8bit(model.parameters())
    train(model, optimizer, 1)
    for moment in ("first", "second"):
        assert bits(model, optimizer, moment) == {"emb.weight": 8, "a.weight": 8, **SMALL}
    everything = AdamW8bit(model.parameters(), min_8bit_size=0)
    train(model, everything, 1)
    assert set(bits(model, everything).values()) == {8}
    with pytest.raises(CheckpointError, match="first"):  # 8-bit states of small tensors, where 32 bits are kept
        optimizer.load_state_dict(everything.state_dict())


@pytest.mark.parametrize("kind", [AdamW8bit, Lion8bit])
def test_embeddings_in_32_bits_whatever_the_rule(kind):
    model = Net()
    optimizer = kind(param_groups(model, 0.1, embeddings_in_32_bits))
    train(model, optimizer, 1)
    assert bits(model, optimizer) == {"emb.weight": 32, "a.weight": 8, **SMALL}


def by_name(name, module, parameter):
    rules = {"a.*": {"lr": 1e-4, "betas": (0.8, 0.99)}, "emb.*": {"first": Blockwise(DYNAMIC4, 128)}}
    return next((extra for glob, extra in rules.items() if fnmatch.fnmatch(name, glob)), None)


def test_overrides_by_name_reach_the_update():
    model, reference = Net(), Net()
    reference.load_state_dict(model.state_dict())
    optimizer = AdamW8bit(param_groups(model, 0.1, by_name), lr=1e-3)
    a = [reference.a.weight, reference.a.bias]
    rest = [p for p in reference.parameters() if not any(p is q for q in a)]
    decays = lambda params: [{"params": [p], "weight_decay": 0.1 * (p.ndim > 1)} for p in params]  # noqa: E731
    apart = [
        AdamW8bit(decays(a), lr=1e-4, betas=(0.8, 0.99)),
        AdamW8bit(decays(rest), lr=1e-3),
    ]
    apart[1].param_groups[0]["first"] = Blockwise(DYNAMIC4, 128)
    train(model, optimizer, 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        reference.zero_grad()
        reference(torch.randint(64, (4, 5), generator=generator)).backward()
        for each in apart:
            each.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))
    assert optimizer.state[model.emb.weight]["first.codes"].numel() == 64 * 64 // 2


def test_an_overridden_learning_rate_follows_the_scheduler_by_ratio():
    model = Net()
    optimizer = AdamW8bit(param_groups(model, 0.1, by_name), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    seen = []
    for _ in range(5):
        train(model, optimizer, 1, scheduler)
        rates = {group["lr"] for group in optimizer.param_groups}
        seen.append(max(rates))
        assert len(rates) == 2 and min(rates) == pytest.approx(0.1 * max(rates))
    assert seen == sorted(seen, reverse=True) and seen[-1] < 0.6e-3


def choose(name, module, parameter):
    return embeddings_in_32_bits(name, module, parameter) or by_name(name, module, parameter)


def test_copies_and_checkpoints_keep_overrides():
    model = Net()
    optimizer = AdamW8bit(param_groups(model, 0.1, choose), lr=1e-3, seed=3)
    train(model, optimizer, 2)
    other, twin = copy.deepcopy((model, optimizer))
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, optimizer, 2)
    train(other, twin, 2)
    third = Net()
    third.load_state_dict(weights)
    resumed = AdamW8bit(param_groups(third, 0.1, choose), lr=1e-3, seed=3)
    resumed.load_state_dict(saved)
    train(third, resumed, 2)
    for again, its in ((other, twin), (third, resumed)):
        assert its.seed == 3 and bits(again, its) == {"emb.weight": 32, "a.weight": 8, **SMALL}
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_overrides_find_their_parameters_in_a_sharded_model(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = Net()
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        optimizer = AdamW8bit(param_groups(model, 0.1, choose), lr=1e-3)
        train(model, optimizer, 1)
        assert bits(model, optimizer) == {"emb.weight": 32, "a.weight": 8, **SMALL}
        where = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert where[id(model.a.weight)] == 1e-4 and where[id(model.emb.weight)] == 1e-3
    finally:
        torch.distributed.destroy_process_group()


def tied():
    config = GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=96, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def test_a_tied_parameter_is_asked_for_under_every_name():
    model = tied()
    stable_embedding_(model)
    asked = []

    def listen(name, module, parameter):
        asked.append(name)
        return {"lr": 1.0} if name == "lm_head.weight" else None

    groups = param_groups(model, 0.1, listen)
    assert {"transformer.wte.weight", "lm_head.weight"} <= set(asked)
    assert any(p is model.transformer.wte.weight for g in groups if g.get("lr") == 1.0 for p in g["params"])
    for g in param_groups(model, 0.1, embeddings_in_32_bits):
        tokens = any(p is model.lm_head.weight for p in g["params"])
        assert not tokens or g["min_8bit_size"] == math.inf
    with pytest.raises(SpecError, match=r"transformer.wte.weight and lm_head.weight are one tied parameter"):
        param_groups(model, 0.1, lambda name, *_: {"lr": float(len(name))})


def test_what_no_recipe_names_is_left_to_the_optimizer():
    model = Net()
    assert all(group.keys() == {"params", "weight_decay"} for group in param_groups(model, 0.1))
    optimizer = AdamW8bit(param_groups(model, 0.1))
    train(model, optimizer, 1)
    assert bits(model, optimizer)["a.weight"] == 8


def test_groups_added_later_are_checked_and_trained():
    model = Net()
    model.emb.weight.requires_grad_(False)
    optimizer = AdamW8bit(param_groups(model, 0.1))
    train(model, optimizer, 1)
    model.emb.weight.requires_grad_(True)
    optimizer.add_param_group({"params": model.emb.weight, "lr": 1e-2, "first": Exact()})
    train(model, optimizer, 1)
    assert bits(model, optimizer)["emb.weight"] == 32 and bits(model, optimizer, "second")["emb.weight"] == 8
    steps = {n: int(optimizer.state[p]["step"]) for n, p in model.named_parameters()}
    assert steps["emb.weight"] == 1 and steps["a.weight"] == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"weigth_decay": 0.1}, "'weigth_decay', which does not exist; there is weight_decay"),
        ({"third": Blockwise(DYNAMIC8)}, "'third', which does not exist; there is first, second"),
        ({"lr": -1.0}, "lr is at least 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas are in \[0, 1\), got \(0.9, 1.0\)"),
        ({"weight_decay": math.nan}, "weight_decay is at least 0, got nan"),
    ],
)
def test_overrides_that_do_not_exist_or_are_out_of_range_are_refused(override, message):
    with pytest.raises(SpecError, match=f"AdamW: .*{message}"):
        AdamW(param_groups(Net(), 0.1, lambda name, *_: override if name == "a.weight" else None))
    own = {"params": Net().parameters(), "name": "body", "initial_lr": 1.0}  # keys of the user's own pass
    assert AdamW([own]).param_groups[0]["name"] == "body"
