# SPDX-License-Identifier: Apache-2.0
"""The command line: `lowbits COMMAND ...`, one module a command, imported only when it is asked for.

A command is a module `lowbits.cli.<name>` with `main(arguments: list[str]) -> int`, which returns the exit code.
Every error that the library raises on purpose becomes one line on stderr and exit code 2.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib import metadata

from lowbits.errors import LowbitsError, UnknownNameError

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": "train one model under one recipe",
    "compare": "train several recipes on equal terms and write a report",
    "report": "write the report of a comparison again",
    "analyze": "look at a trained model: sharpness, outliers, memory, post-training quantization, ...",
    "probe": "rank the layers of a model by what a recipe does to them, propose which to keep",
    "graph": "draw what can be pruned from a model, what goes with it, and what cannot be pruned",
    "data": "turn text into token shards (data prepare), look at them (data info)",
    "formats": "print every number format: bits, largest, smallest, codes",
    "recipes": "print every recipe: what it quantizes, what integer hardware could run",
}

_EXAMPLES = """
Examples:
  lowbits recipes
  lowbits train --recipe w8a8 --steps 200 --out runs/first
  lowbits compare bf16 w8a8 w4_tensor --seeds 3 --out runs/study

`lowbits COMMAND --help` explains a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: the words after `lowbits`; those of the process if None.

    Returns:
        0 if all went well, 2 after an error (one line on stderr), 130 or 143 after Ctrl-C or SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(words)
    except LowbitsError as error:
        print(f"lowbits: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "lowbits").partition(".")[0]
        if package == "lowbits":
            raise
        print(f"lowbits: error: {package} is not installed; `pip install 'lowbits[train]'` brings it.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lowbits: interrupted", file=sys.stderr)
        return 130


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"lowbits {metadata.version('lowbits')}")
        return 0
    if words[0] not in COMMANDS:
        raise UnknownNameError("command", words[0], COMMANDS, where="lowbits --help")
    return importlib.import_module(f"lowbits.cli.{words[0]}").main(words[1:])


def _help() -> str:
    lines = [f"  {name:<10}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        ["usage: lowbits COMMAND [options]", "", "Train neural networks in few bits.", "", *lines, _EXAMPLES]
    )
