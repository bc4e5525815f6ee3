# SPDX-License-Identifier: Apache-2.0
"""`lowbits graph MODEL`: what can be pruned from a model, what goes with it, and what cannot be pruned and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from lowbits import models
from lowbits.cli._options import parse
from lowbits.errors import CheckpointError, ConversionError, RunError
from lowbits.methods import geta

__all__ = ["Graph", "main"]

_VOCABULARY, _BLOCK = 32000, 1024  # of a named size, which has neither
_EXAMPLES = """  lowbits graph gpt2-small
  lowbits graph llama-7b --out llama.html
  lowbits graph path/to/a/transformers/folder --out graph.svg --keep '*.embed_tokens.weight'"""


@dataclass(frozen=True)
class Graph:
    """Trace a model and draw its dependency graph: slices that can be pruned, and those that must go with them.

    No weights are read and nothing is computed, so a model of any size is traced in seconds to a minute.

    Args:
        model: name of a size (gpt2-small, llama-7b, ...), or a transformers folder, of which config.json is enough.
        out: a page (.html) or a drawing (.svg); graph.html if not given.
        keep: parameters that shall not be pruned, * for any part of a name.
    """

    model: tyro.conf.Positional[str]
    out: Path = Path("graph.html")
    keep: tuple[str, ...] = field(default=())


def main(arguments: Sequence[str]) -> int:
    """Run `lowbits graph`.

    Args:
        arguments: the words after it.

    Returns:
        0.
    """
    told = parse(Graph, arguments, prog="lowbits graph", examples=_EXAMPLES)
    if told.out.suffix not in (".html", ".svg"):
        raise RunError(f"--out {told.out}: a graph is written as .html or .svg; name such a file.")
    model, inputs = _model(told.model)
    graph = geta.trace(model, (), inputs, keep=told.keep)
    text = geta.page(graph, f"Dependency graph of {told.model}") if told.out.suffix == ".html" else geta.svg(graph)
    try:
        told.out.parent.mkdir(parents=True, exist_ok=True)
        told.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{told.out} cannot be written ({error.strerror}); name another file with --out.") from error
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    console.print(_dimensions(graph))
    console.print(_kept(graph))
    console.print(f"{len(graph.dimensions)} dimensions, {graph.units:,} units; drawn in {told.out}")
    return 0


def _dimensions(graph: geta.Graph) -> Table:
    """One row for dimensions that differ in the number of their layer only."""
    table = Table("can be pruned", "units", "times", "with", title="")
    rows: dict[tuple[str, int], list[geta.Dimension]] = {}
    for dimension in graph.dimensions:
        rows.setdefault((_numberless(dimension.name), dimension.size), []).append(dimension)
    for (name, size), found in rows.items():
        others = [layer.rpartition(".")[2] for layer in found[0].layers]
        table.add_row(name.replace("[", r"\["), f"{size:,}", str(len(found)), ", ".join(dict.fromkeys(others)))
    return table


def _kept(graph: geta.Graph) -> Table:
    table = Table("cannot be pruned", "slices", "times", "reason")
    rows: dict[tuple[str, int], list[geta.Kept]] = {}
    for kept in graph.kept:
        rows.setdefault((_numberless(kept.name), kept.size), []).append(kept)
    for (name, size), found in rows.items():
        table.add_row(name.replace("[", r"\["), f"{size:,}", str(len(found)), found[0].reason.replace("[", r"\["))
    return table


def _numberless(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _model(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Return a model without data, and inputs for it."""
    from transformers import AutoModelForCausalLM

    if not Path(name).is_dir():
        config = models.config(name, _VOCABULARY, _BLOCK)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    else:
        model = _of_folder(Path(name))
    return model, _inputs(name, model)


def _of_folder(folder: Path) -> torch.nn.Module:
    import transformers

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json, so it is no transformers folder; name another.")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}/config.json cannot be read: {str(error).splitlines()[0]}") from error
    kind = getattr(transformers, (config.architectures or [""])[0] or "_", None)
    with torch.device("meta"):
        if kind is None:
            return transformers.AutoModel.from_config(config)
        return kind._from_config(config, attn_implementation="sdpa")


def _inputs(name: str, model: Any) -> dict[str, Any]:
    """Return two examples of what the model mainly takes."""
    kind = getattr(model, "main_input_name", "")
    if kind == "input_ids":
        return {kind: torch.zeros(2, 7, dtype=torch.long, device="meta")}
    if kind == "pixel_values":
        size, channels = getattr(model.config, "image_size", 224), getattr(model.config, "num_channels", 3)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {kind: torch.zeros(2, channels, height, width, device="meta")}
    raise ConversionError(
        f"{name}: {type(model).__name__} takes {kind or 'inputs'}, for which there is no example here; use "
        "lowbits.methods.geta.trace from Python with an example of your own."
    )
