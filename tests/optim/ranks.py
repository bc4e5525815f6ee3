# SPDX-License-Identifier: Apache-2.0
"""Processes of one torch.distributed group on this machine, and what they train."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lowbits.errors import SpecError
from lowbits.formats import DYNAMIC4, DYNAMIC8, UDYNAMIC8, ULINEAR4
from lowbits.optim import AdamW, Blockwise, CodecOptimizer, GlobalNorm, state_report
from lowbits.quantizers import Rounding

# rows: even; odd; too few for three ranks; of blocks of 160; of more dimensions. No blocks: short rows; a vector.
SHAPES = {"even": (6, 256), "odd": (7, 512), "few": (2, 256), "wide": (5, 320), "deep": (3, 4, 64), "short": (4, 37)}
SHAPES["vector"] = (9,)
WHOLE = {name: SHAPES[name] for name in ("even", "odd", "few", "deep", "vector")}  # stored alike without ranks
BITS8 = {"first": Blockwise(DYNAMIC8), "second": Blockwise(UDYNAMIC8)}
BITS4 = {"first": Blockwise(DYNAMIC4), "second": Blockwise(ULINEAR4)}
CASES = {"8 bits": (BITS8, torch.float32), "4 bits": (BITS4, torch.bfloat16)}
NAMES = ("nested", "flat")
PRELOADED = ["torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "lowbits.optim"]


def run(function: Callable[..., None], ranks: int, *arguments: object) -> None:
    """Call a function of this module on every rank of a group; the first exception is raised here."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        mp.start_processes(_rank, (ranks, store, function, arguments), ranks, start_method="forkserver")


def _rank(rank: int, ranks: int, store: str, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()


def build(
    shapes: dict[str, tuple[int, ...]] = SHAPES,
    codecs: dict[str, Blockwise] = BITS8,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.ParameterDict, CodecOptimizer]:
    """Return parameters, sharded where there is a group, and their optimizer: two groups, clipped, stochastic."""
    model = nn.ParameterDict()
    for name, value in random_like(shapes, -1).items():
        model[name] = nn.Parameter(value.to(dtype))
    if dist.is_initialized():
        fully_shard(model)
    parameters = list(model.values())
    optimizer = AdamW(parameters[:2], lr=1e-2, clip=GlobalNorm(0.5), rounding=Rounding.STOCHASTIC, **codecs)
    optimizer.add_param_group({"params": parameters[2:], "weight_decay": 0.0, "lr": torch.tensor(3e-3)})
    return model, optimizer


def steps(model: nn.ParameterDict, optimizer: CodecOptimizer, numbers: range) -> None:
    """Take steps with gradients that do not depend on the ranks; the last parameter has none at first."""
    for number in numbers:
        gradients = random_like({name: tuple(p.shape) for name, p in model.items()}, number)
        for p, g in zip(model.values(), gradients.values(), strict=True):
            g = g.to(p.dtype)
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g
        if number == 0:
            p.grad = None
        optimizer.step()


def everything(model: nn.ParameterDict, optimizer: CodecOptimizer) -> dict[str, Tensor]:
    """Return parameters and states, whole."""
    found = dict(_named(model, optimizer))
    return {name: t.full_tensor() if isinstance(t, DTensor) else t.detach() for name, t in found.items()}


def train(folder: Path) -> None:
    """Write what four steps come to, in 8 bits, and in 4 bits for bfloat16 parameters."""
    for name, (codecs, dtype) in CASES.items():
        model, optimizer = build(codecs=codecs, dtype=dtype)
        steps(model, optimizer, range(4))
        _write(folder / name, model, optimizer)


def train_and_save(folder: Path) -> None:
    """Do what `train` does, and on the way save after two steps, with nested and with flat names."""
    train(folder)
    model, optimizer = build()
    steps(model, optimizer, range(2))
    for names in NAMES:
        dcp.save(_checkpoint(model, optimizer, names), checkpoint_id=folder / names)
    _write(folder / "half", model, optimizer)
    backward(folder / "backward")
    replicas(folder / "replica")
    tensor_parallel(folder / "tensor parallel")
    gathered(folder / "gathered")
    flattened(folder / "fsdp1")


def train_and_resume(folder: Path, source: Path) -> None:
    """Do what `train` does; go on from what other ranks saved, and save it again before."""
    train(folder)
    resume(folder, source)


def resume(folder: Path, source: Path) -> None:
    """Load a checkpoint, save it again, and take two more steps."""
    for names in NAMES:
        model, optimizer = build()
        restore_(model, optimizer, source / names, names)
        dcp.save(_checkpoint(model, optimizer, names), checkpoint_id=folder / names)
        steps(model, optimizer, range(2, 4))
        _write(folder / f"resumed {names}", model, optimizer)


def restore_(model: nn.ParameterDict, optimizer: CodecOptimizer, folder: Path, names: str) -> None:
    """Load a checkpoint of torch.distributed."""
    with torch.no_grad():
        for p in model.values():
            p.zero_()
    states = _checkpoint(model, optimizer, names)
    dcp.load(states, checkpoint_id=folder)
    options = StateDictOptions(flatten_optimizer_state_dict=names == "flat")
    set_state_dict(
        model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"], options=options
    )


def backward(file: Path) -> None:
    """Write what training a real model comes to, all ranks on the same data."""
    model, optimizer = network(fully_shard)
    learn(model, optimizer)
    _write(file, model, optimizer)


def replicas(file: Path) -> None:
    """Write what training under DistributedDataParallel comes to, for each rank."""
    model, optimizer = network()
    learn(nn.parallel.DistributedDataParallel(model), optimizer)
    torch.save(everything(model, optimizer), file.with_suffix(f".{dist.get_rank()}"))


def tensor_parallel(file: Path) -> None:
    """Train a matrix cut by columns, and a replicated one of which every rank has a part of the gradient."""
    mesh = init_device_mesh("cpu", (2,))
    columns, norm = (t.clone() for t in matrices())
    parameters = [
        nn.Parameter(distribute_tensor(t, mesh, [how])) for t, how in ((columns, Shard(1)), (norm, Replicate()))
    ]
    optimizer = AdamW(parameters, lr=1e-2, clip=GlobalNorm(0.5), **BITS8)
    for number in range(3):
        columns, norm = random_like({"columns": (4, 512), "norm": (2, 256)}, number).values()
        parameters[0].grad = distribute_tensor(columns, mesh, [Shard(1)])
        parameters[1].grad = DTensor.from_local(norm * (0.25, 0.75)[dist.get_rank()], mesh, [Partial()])
        optimizer.step()
    reasons = {row.reason for row in state_report(optimizer).moments}
    whole = [p.full_tensor() for p in parameters]
    if dist.get_rank() == 0:
        torch.save((whole, reasons), file)


def matrices() -> tuple[Tensor, ...]:
    """Return what `tensor_parallel` begins with."""
    return tuple(random_like({"columns": (4, 512), "norm": (2, 256)}, -1).values())


def gathered(file: Path) -> None:
    """Gather all on one rank, as for one file, and load that file back into shards; write the states."""
    model, optimizer = build()
    steps(model, optimizer, range(2))
    whole = StateDictOptions(full_state_dict=True, cpu_offload=False)
    states = get_optimizer_state_dict(model, optimizer, options=whole)
    model, optimizer = build()
    set_optimizer_state_dict(
        model, optimizer, states, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    )
    found = {
        name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in _named(model, optimizer) if ":" in name
    }
    if dist.get_rank() == 0:
        torch.save((found, states["state"]), file)


def flattened(file: Path) -> None:
    """Write what a step of parameters that FSDP1 flattened says."""
    with warnings.catch_warnings(action="ignore"):
        model = FullyShardedDataParallel(nn.Linear(256, 8), device_id=torch.device("cpu"), use_orig_params=True)
        model(torch.ones(1, 256)).sum().backward()
        optimizer = AdamW(model.parameters(), **BITS8)
        try:
            optimizer.step()
        except SpecError as error:
            file.write_text(str(error))


def network(prepare: Callable[[nn.Module], object] = id) -> tuple[nn.Module, CodecOptimizer]:
    """Return a small model and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 33), nn.Tanh(), nn.Linear(33, 3))
    prepare(model)
    return model, AdamW(model.parameters(), lr=1e-2, clip=GlobalNorm(0.1), min_8bit_size=100, **BITS8)


def learn(model: nn.Module, optimizer: CodecOptimizer) -> None:
    """Take three steps."""
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _checkpoint(model: nn.Module, optimizer: CodecOptimizer, names: str) -> dict[str, object]:
    options = StateDictOptions(flatten_optimizer_state_dict=names == "flat")
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))


def _named(model: nn.Module, optimizer: CodecOptimizer) -> Iterator[tuple[str, Tensor]]:
    for name, p in model.named_parameters():
        yield name, p
        yield from ((f"{name}:{key}", tensor) for key, tensor in optimizer.state[p].items())


def _write(file: Path, model: nn.ParameterDict, optimizer: CodecOptimizer) -> None:
    whole = everything(model, optimizer)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(whole, file)


def random_like(shapes: dict[str, tuple[int, ...]], number: int) -> dict[str, Tensor]:
    """Return normal numbers, of each name the same ones for the same number."""
    generator = torch.Generator().manual_seed(100 + number)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
