# SPDX-License-Identifier: Apache-2.0
"""`lowbits train`: one model under one recipe, and perhaps a method."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lowbits.cli._options import parse
from lowbits.errors import RunError
from lowbits.methods import named
from lowbits.train import Run, train

__all__ = ["Train", "main"]

_EXAMPLES = """  lowbits train --recipe w8a8 --steps 200 --out runs/first
  lowbits train --model llama-15m --data runs/data/mine --recipe fp8_rowwise --lr 1e-3 --out runs/llama
  lowbits train --recipe w8a8 --steps 200 --out runs/first --resume      (the same words, after a crash)
  lowbits train --method METHOD --help                                   (a method, and the options that it adds)
  lowbits train --recipe nvfp4 --keep.last 0.15 --phases 82%:forward=off --out runs/nvfp4
  lowbits train --recipe w8a8 --keep.first 1 --keep.names '*.mlp.c_proj' --phases 0:off 10%:on --out runs/careful
  lowbits train experiments/mine.py --seed 1 --out runs/mine             (a file with `def run() -> Run`)
  torchrun --nproc-per-node 2 -m lowbits.cli train --out runs/two"""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one model under one recipe; everything goes to the folder --out.

    A Python file as the first word gives the run: it defines `run() -> Run`. The options change what it says.

    Exit code: 0 finished, 2 an error, 3 diverged, 130 Ctrl-C and 143 SIGTERM (saved; --resume goes on).

    Args:
        out: folder of the run; it must not hold another one.
        resume: go on from the newest intact checkpoint in --out, or start if there is none.
        method: what the run does beside its recipe, a module of lowbits.methods; its own options are listed below.
        run: the run.
    """

    out: Path
    resume: bool = False
    method: str = "none"
    run: Run = field(default_factory=Run)


def main(arguments: Sequence[str]) -> int:
    """Run `lowbits train`.

    Args:
        arguments: the words after it.

    Returns:
        0 for a finished run, 3 for a diverged one, 128 + the signal's number for an interrupted one.
    """
    base, words = Run(), list(arguments)
    if words and words[0].endswith(".py"):
        base, words = run_of_file(Path(words[0])), words[1:]
    base = with_method(base, words)
    # tyro marks a field without a default by this value.
    from tyro import MISSING

    default = Train(out=MISSING, method=base.method.name, run=base)
    chosen = parse(Train, words, prog="lowbits train", examples=_EXAMPLES, default=default)
    result = train(chosen.run, chosen.out, resume=chosen.resume)
    if os.environ.get("RANK", "0") == "0":  # torchrun numbers its processes so
        print(_summary(result, chosen.out))
    if result["status"] == "interrupted":
        return 128 + signal.Signals[str(result.get("signal", "SIGINT"))].value
    return 3 if result["status"] == "diverged" else 0


def with_method(base: Run, words: Sequence[str]) -> Run:
    """Return the run with the method that the words name: its fields are options then.

    Args:
        base: whose own method stays, with its values, where the words name it or none.
        words: of the command line.
    Raises:
        UnknownNameError: there is no such method.
        RunError: a value does not fit its field.
    """
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    reader.add_argument("--method", default=base.method.name, nargs="?")
    word = reader.parse_known_args(words)[0].method or ""
    return base if word == base.method.name else replace(base, method=named(word))


def run_of_file(path: Path) -> Run:
    """Return what the function `run` of a Python file returns.

    Args:
        path: of the file.
    Raises:
        RunError: there is no such file, no such function, or it returns something else.
    """
    if not path.is_file():
        raise RunError(f"there is no run file {path}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickles of the file look it up by name
    spec.loader.exec_module(module)
    function = getattr(module, "run", None)
    if not callable(function):
        raise RunError(f"{path} defines no function `run`; it has to be `def run() -> Run`.")
    run = function()
    if not isinstance(run, Run):
        raise RunError(f"{path}: run() returned a {type(run).__name__}, it has to return a lowbits.train.Run.")
    return run


def _summary(result: dict[str, object], out: Path) -> str:
    """What a person wants to know at the end, in a few lines."""
    lines = [f"{result['recipe']}: {result['status']} after {result['steps']} steps, {result['seconds']} s of training"]
    if result["val_loss_on"] is not None:
        lines.append(f"validation loss {result['val_loss_on']:.4f}, quantizers off {result['val_loss_off']:.4f}")
    if result["status"] == "diverged":
        lines.append(f"first in the {result['diverged_role']} of {result['diverged_layer']}")
    if result["sample"]:
        lines += ["sample:", *(f"  {line}" for line in str(result["sample"]).splitlines())]
    lines.append(f"everything is in {out}")
    return "\n".join(lines)
