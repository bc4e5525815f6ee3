# SPDX-License-Identifier: Apache-2.0
"""Write a sub-network as ONNX: packed integers and the operators that unpack them."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lowbits.errors import CheckpointError, ConversionError
from lowbits.methods.geta._construct import SubNetwork
from lowbits.methods.geta._trace import free_shapes


class _Flat(nn.Module):
    """Take tensors in a row, and return those of the result: a graph in ONNX knows no other structure."""

    def __init__(self, network: nn.Module, positional: int, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.positional, self.names = network, positional, list(names)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.names, given[self.positional :], strict=True))
        found = pytree.tree_leaves(self.network(*given[: self.positional], **named))
        return tuple(leaf for leaf in found if isinstance(leaf, Tensor))


def save_onnx(small: SubNetwork, path: Path, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> None:
    """Write an ONNX file; weights stay packed integers in it, unpacked where they are used.

    Args:
        small: the sub-network.
        path: ends with .onnx; nothing may be there.
        args: an example of its inputs, tensors; batch sizes and lengths stay free.
        kwargs: the same by name; the graph's inputs have these names.
    Raises:
        ConversionError: the package onnxscript, with which torch writes ONNX, is not installed.
        CheckpointError: the file is there already, or cannot be written.
    """
    path, named = Path(path), dict(kwargs or {})
    if importlib.util.find_spec("onnxscript") is None:
        raise ConversionError("torch writes ONNX with onnxscript, which is not installed; pip install 'lowbits[onnx]'.")
    if path.exists():
        raise CheckpointError(f"{path} is there already; name another file.")
    given = (*args, *named.values())
    flat = _Flat(small.network, len(args), list(named))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own exporter
        program = torch.export.export(flat, given, dynamic_shapes=(free_shapes(flat, given, {}),))
        # Guards on sizes become a module that the exporter calls without its inputs; torch 2.11 to 2.13.
        program.module = functools.partial(type(program).module, program, check_guards=False)
        names = [*(f"input_{number}" for number in range(len(args))), *named]
        written = torch.onnx.export(program, (), input_names=names, dynamo=True, optimize=False, verbose=False)
    assert written is not None
    try:
        written.save(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror}); name another file.") from error
