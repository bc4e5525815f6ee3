# SPDX-License-Identifier: Apache-2.0
"""`lowbits export RUN`: the small file of a run of quantized distillation or of learned points."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from lowbits.cli._options import parse
from lowbits.errors import CheckpointError, RunError
from lowbits.export import Coding, save_coded
from lowbits.methods import Method, of_fields
from lowbits.methods.differentiable_quantization import DifferentiableQuantization
from lowbits.methods.distillation import QuantizedDistillation
from lowbits.train import newest_intact

__all__ = ["Export", "main"]

_EXAMPLES = """  lowbits export runs/student
  lowbits export runs/student --coding packed --out student.safetensors

In Python: model.load_state_dict(lowbits.export.load_coded(FILE).state_dict())"""


@dataclass(frozen=True)
class Export:
    """Write the weights of a run as packed or Huffman-coded levels, and say where the bytes are.

    Args:
        run: folder of `lowbits train --method distillation` or `differentiable_quantization`.
        out: file to write; coded.safetensors in the run's folder if not given.
        coding: of the levels.
    """

    run: tyro.conf.Positional[Path]
    out: Path | None = None
    coding: Coding = Coding.HUFFMAN


def main(arguments: Sequence[str]) -> int:
    """Run `lowbits export`.

    Args:
        arguments: the words after it.

    Returns:
        0.
    """
    told = parse(Export, arguments, prog="lowbits export", examples=_EXAMPLES)
    method = _method(told.run)
    if not isinstance(method, QuantizedDistillation | DifferentiableQuantization):
        raise RunError(
            f"{told.run} is a run of the method {method.name}: its weights are on no levels. Export one of "
            "distillation or differentiable_quantization."
        )
    checkpoint, complaints = newest_intact(told.run / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{told.run} holds no checkpoint; train it first.")
    for complaint in complaints:
        print(f"{complaint} Taking an older one.")
    out = told.out or told.run / "coded.safetensors"
    sizes = save_coded(out, method.deployed(checkpoint), told.coding)
    print(f"{checkpoint.name}: {sizes}\nwrote {out}")
    return 0


def _method(run: Path) -> Method:
    """The method that a run's config.json names, with its values."""
    try:
        fields = dict(json.loads((run / "config.json").read_text(encoding="utf-8"))["method"])
        name = str(fields.pop("name"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run} is no folder of `lowbits train`: its config.json cannot be read.") from error
    return of_fields(name, {key: str(value) for key, value in fields.items()})
