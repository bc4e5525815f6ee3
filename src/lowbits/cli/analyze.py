# SPDX-License-Identifier: Apache-2.0
"""`lowbits analyze WHAT RUN_OR_CHECKPOINT`: look at a trained model with the instruments of `lowbits.analysis`.

Each analysis prints a table and writes a JSON file beside the run, `<run>/analysis/<what>-<checkpoint>.json`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from lowbits.cli._analyze_landscape import Sharpness, Surface
from lowbits.cli._analyze_options import Options
from lowbits.cli._analyze_quality import Fewshot, Perplexity, Ptq
from lowbits.cli._analyze_tensors import Gradients, Memory, Outliers
from lowbits.cli._options import parse
from lowbits.errors import UnknownNameError

__all__ = ["ANALYSES", "main"]

ANALYSES: dict[str, type[Options]] = {
    "sharpness": Sharpness,
    "surface": Surface,
    "outliers": Outliers,
    "gradients": Gradients,
    "memory": Memory,
    "ptq": Ptq,
    "perplexity": Perplexity,
    "fewshot": Fewshot,
}
_EXAMPLES = {
    "outliers": "\n  lowbits analyze outliers runs/w8a8/checkpoints/step-00000400 --against "
    "runs/w8a8/checkpoints/step-00000200",
    "memory": "\n  lowbits analyze memory gpt2-large --recipe w8a8_faithful --micro-batches 4 8 16",
    "ptq": " --to w4_channel a8_token",
    "perplexity": " --files wiki.test.raw",
    "fewshot": " --tasks arc_easy hellaswag --limit 200",
}


def main(arguments: Sequence[str]) -> int:
    """Run `lowbits analyze`.

    Args:
        arguments: the words after it.

    Returns:
        0, or 2 if there are no words; errors are raised.
    """
    words = list(arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0 if words else 2
    what = words[0]
    if what not in ANALYSES:
        raise UnknownNameError("analysis", what, ANALYSES, where="lowbits analyze --help")
    examples = f"  lowbits analyze {what} runs/demo/w8a8/seed-0{_EXAMPLES.get(what, '')}"
    options = parse(ANALYSES[what], words[1:], prog=f"lowbits analyze {what}", examples=examples)
    subject = options.open()
    outcome = options.run(subject)
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    console.print(outcome.shown)
    path = subject.place(what, options.out)
    if path is not None:
        subject.write(what, outcome.result, path)
    for line in (outcome.note, f"wrote {path}" if path else ""):
        if line:
            console.print(line, soft_wrap=True, markup=False)
    return 0


def _help() -> str:
    lines = [f"  {name:<11}{(kind.__doc__ or '').splitlines()[0]}" for name, kind in ANALYSES.items()]
    head = "usage: lowbits analyze WHAT RUN_OR_CHECKPOINT [options]"
    return "\n".join([head, "", *lines, "", "`lowbits analyze WHAT --help` explains an analysis and its options."])
