# SPDX-License-Identifier: Apache-2.0
"""Write a sub-network to disk: a program with packed integers, or a `transformers` folder if a config can say it."""

from __future__ import annotations

import copy
import json
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lowbits.errors import CheckpointError, ConversionError
from lowbits.methods.geta._construct import PackedWeight, SubNetwork
from lowbits.methods.geta._graph import Graph
from lowbits.methods.geta._layers import weight_quantizers
from lowbits.methods.geta._trace import evaluating, free_shapes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PROGRAM, FACTS = "program.pt2", "subnetwork.json"


def save(small: SubNetwork, folder: Path, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> None:
    """Write `program.pt2`, which torch alone loads and runs, and `subnetwork.json`.

        program = torch.export.load(folder / "program.pt2").module()

    The program holds the packed integers and unpacks them as it runs; neither this library nor the model's code is
    needed.

    Args:
        small: the sub-network.
        folder: made if it is not there.
        args: an example of its inputs; batch sizes and lengths stay free.
        kwargs: the same by name.
    Raises:
        CheckpointError: the folder holds a sub-network already, or cannot be written.
    """
    folder = Path(folder)
    if (folder / FACTS).exists():
        raise CheckpointError(f"{folder} holds a sub-network already; name another folder.")
    named = dict(kwargs or {})
    with torch.no_grad():
        shapes = free_shapes(small.network, args, named)
        program = torch.export.export(small.network, tuple(args), named, dynamic_shapes=shapes)
    for node in program.graph.nodes:  # where in our code an operator came from is of no use to a reader
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node"):
            node.meta.pop(key, None)
    facts = {
        "format": "lowbits geta sub-network 1",
        "sparsity": small.sparsity,
        "bits": small.bits,
        "containers": {name: module.container for name, module in _packed(small).items()},
        "kept": small.kept,
        "of": small.full,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.export.save(program, folder / PROGRAM)
        (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error.strerror}); name another folder.") from error


def load(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return a saved sub-network, to be called as the model was, and what `subnetwork.json` says.

    Args:
        folder: of `save`.
    Raises:
        CheckpointError: it holds no sub-network, or one that is torn.
    """
    folder = Path(folder)
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        with warnings.catch_warnings():
            # torch 2.11 reads its own file into a buffer that it then warns of.
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            program = torch.export.load(folder / PROGRAM)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no sub-network ({error.filename} is missing); name another.") from error
    except (OSError, ValueError, RuntimeError, AssertionError, KeyError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{folder} holds a torn sub-network: {reason}. Save it again.") from error
    return program.module(check_guards=False), facts


def _packed(small: SubNetwork) -> dict[str, PackedWeight]:
    """Return the packed weights by parameter."""
    found = {}
    for node in small.network.graph.nodes:
        if node.op == "call_module":
            module = small.network.get_submodule(str(node.target))
            if isinstance(module, PackedWeight):
                found[str(node.meta["lowbits"])] = module
    return found


_FEED_FORWARD = ("intermediate_size", "n_inner")


def save_pretrained(small: SubNetwork, graph: Graph, model: nn.Module, keep: Tensor, folder: Path) -> None:
    """Write a `transformers` folder for `from_pretrained`: smaller tensors, float32 values on the integer grid.

    Possible where the architecture's config can say what is left: as many feed-forward units in every layer, and where
    the config has `head_dim` as many heads. The bits stand in `subnetwork.json`; `save` writes packed integers.

    Args:
        small: the sub-network.
        graph: of the model.
        model: the trained `transformers` model.
        keep: bool `[units]`, as for `construct`.
        folder: made if it is not there.
    Raises:
        ConversionError: the config cannot say it; the message names the first tensor that does not fit.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_diff_dict"):
        raise ConversionError(f"{type(model).__name__} has no transformers config; use geta.save(...).")
    if any(name.endswith(".input") for name in small.bits):
        raise ConversionError(
            f"{type(model).__name__}: a transformers folder cannot say how inputs are quantized; use geta.save(...)."
        )
    slices = graph.kept_slices(keep)
    state = {name: _cut(tensor, slices.get(name)) for name, tensor in _float_state(model).items()}
    kind: Any = type(model)
    smaller = kind(_config(config, state, graph))
    wanted = smaller.state_dict()
    for name, tensor in wanted.items():
        if name not in state or state[name].shape != tensor.shape:
            have = list(state[name].shape) if name in state else "nothing"
            raise ConversionError(
                f"{type(model).__name__}: {name} has {have} left, but a {type(config).__name__} can only say "
                f"{list(tensor.shape)}; use geta.save(...), which takes any sub-network."
            )
    _check_buffers(smaller, slices)
    smaller.load_state_dict({name: state[name] for name in wanted})
    _check_same(small, smaller.eval(), graph)
    smaller.save_pretrained(folder)
    facts = {"sparsity": small.sparsity, "bits": small.bits, "kept": small.kept, "of": small.full}
    (Path(folder) / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def _float_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state with quantized weights in place of the trained ones, without the quantizers."""
    state = {n: t.detach() for n, t in model.state_dict().items() if "_quantizer." not in n and ".weight_fn." not in n}
    for name, quantizer in weight_quantizers(model).items():
        state[name] = quantizer(state[name])
    return state


def _cut(tensor: Tensor, slices: list[Tensor] | None) -> Tensor:
    for axis, mask in enumerate(slices or []):
        tensor = tensor.index_select(axis, mask.nonzero().squeeze(1).to(tensor.device))
    return tensor.clone()


def _config(config: PretrainedConfig, state: Mapping[str, Tensor], graph: Graph) -> PretrainedConfig:
    """Say the new sizes in the fields that a config has, read off the first layer."""
    new, fields = copy.deepcopy(config), config.to_dict()
    for field in _FEED_FORWARD:
        size = (fields[field] or 4 * getattr(config, "hidden_size", 0)) if field in fields else 0
        found = [d.members[0] for d in graph.dimensions if d.size == size and "[" not in d.name]
        if found:
            setattr(new, field, int(state[found[0].name].shape[found[0].axis]))
    if fields.get("head_dim"):
        for field, heads in _heads(config, state).items():
            setattr(new, field, heads)
    return new


def _heads(config: Any, state: Mapping[str, Tensor]) -> dict[str, int]:
    """Count heads by their rows, at an unchanged size of a head."""
    size = config.head_dim
    found = {}
    for field, suffix in (("num_attention_heads", "q_proj.weight"), ("num_key_value_heads", "k_proj.weight")):
        rows = [tensor.shape[0] for name, tensor in state.items() if name.endswith(suffix)]
        if rows and rows[0] % size == 0 and hasattr(config, field):
            found[field] = rows[0] // size
    return found


def _check_buffers(smaller: nn.Module, slices: Mapping[str, list[Tensor]]) -> None:
    """Buffers that no file holds are made anew from the config: none of them may have been cut."""
    for name, masks in slices.items():
        if name in dict(smaller.named_buffers()) and not all(bool(mask.all()) for mask in masks):
            raise ConversionError(
                f"{name} was cut, but a transformers model makes it anew from its config; use geta.save(...), which "
                "takes any sub-network."
            )


@torch.no_grad()
def _check_same(small: SubNetwork, smaller: nn.Module, graph: Graph) -> None:
    args, kwargs = graph.example
    with evaluating(smaller):
        want, got = (pytree.tree_leaves(network(*args, **kwargs)) for network in (small, smaller))
    for a, b in zip(want, got, strict=True):
        if isinstance(a, Tensor) and not torch.allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(a.abs().max()))):
            raise ConversionError(
                "the transformers model does not compute what the sub-network computes: its code derives something "
                "else from the smaller config. Use geta.save(...), which takes any sub-network."
            )
