# SPDX-License-Identifier: Apache-2.0
"""`lowbits compare`: several recipes on equal terms, and a report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from lowbits.cli._options import parse
from lowbits.cli.train import run_of_file, with_method
from lowbits.errors import RunError
from lowbits.study import Summary, compare, print_summary
from lowbits.train import Run, Watching

__all__ = ["Compare", "main", "report_to"]

_EXAMPLES = """  lowbits compare bf16 null w8a8 w4_tensor --seeds 3 --out runs/study
  lowbits compare bf16 w8a8 w8a8g8 --model llama-15m --data runs/data/mine --steps 2000 --out runs/llama
  lowbits compare bf16 bf16+gaussws bf16+diffq,b_init=5 --out runs/methods      (arms with a method)
  lowbits compare bf16 nvfp4 nvfp4+80%:forward=off nvfp4+keep.last=0.15 --out runs/nvfp4      (each its own phases)
  lowbits compare bf16 w8a8 g8_token --seeds 3 --out runs/study     (finished runs stay, the new recipe is added)
  lowbits compare experiments/mine.py bf16 w8a8 --out runs/mine     (a file with `def run() -> Run`)"""
# A comparison looks at its curves more often than a single run does.
_WATCHING = Watching(eval_every=50, errors_every=50)
_PLAIN_WIDTH = 140


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Train several recipes on equal terms: same data, order, initialisation and budget, several seeds.

    The first recipe is the baseline. The word `null` trains the baseline again under other seeds: what that differs by
    is chance. RECIPE+METHOD is an arm with a method, RECIPE+METHOD,FIELD=VALUE,... one with other values of its
    fields; --method is what all other arms have in common. RECIPE+keep.last=0.15 keeps layers of that arm in high
    precision, RECIPE+82%:forward=off gives it a phase; --keep.last and --phases are for all arms. The same words after
    an interruption go on; finished runs are not run again. Recipes are given as words, the number of seeds by --seeds;
    --seed is the first of them.

    Args:
        recipes: the baseline, then what to compare with it; `lowbits recipes` lists the names.
        out: folder of the comparison.
        seeds: runs of each recipe; with fewer than 2 no gap can be told from chance.
        method: of the arms that name none, a module of lowbits.methods.
        jobs: runs at a time; one a GPU, or one a core on the CPU, if not given.
        run: what all runs have in common.
    """

    recipes: tyro.conf.Positional[Annotated[list[str], tyro.conf.arg(metavar="RECIPE ...")]]
    out: Path
    seeds: int = 3
    jobs: int | None = None
    method: str = "none"
    run: Run = field(default_factory=Run)


def main(arguments: Sequence[str]) -> int:
    """Run `lowbits compare`.

    Args:
        arguments: the words after it.

    Returns:
        0 if every run came to its end, diverged ones included; 1 if some did not (the report says which).
    """
    base, words = Run(watching=_WATCHING), list(arguments)
    if words and words[0].endswith(".py"):
        path = Path(words.pop(0))
        base = run_of_file(path)
        sys.path.insert(0, str(path.parent.resolve()))  # the processes of the runs import the file by its name
    base = with_method(base, words)
    default = Compare(recipes=tyro.MISSING, out=tyro.MISSING, method=base.method.name, run=base)
    chosen = parse(Compare, words, prog="lowbits compare", examples=_EXAMPLES, default=default)
    if chosen.run.recipe != base.recipe:
        raise RunError("compare: recipes are given as words, not by --recipe; for example `lowbits compare bf16 w8a8`.")
    if chosen.seeds < 1:
        raise RunError(f"compare: --seeds is the number of runs of each recipe, at least 1, got {chosen.seeds}.")
    first = chosen.run.seed
    summary = compare(chosen.recipes, range(first, first + chosen.seeds), chosen.run, chosen.out, jobs=chosen.jobs)
    return report_to(summary, chosen.out)


def report_to(summary: Summary, out: Path) -> int:
    """Print a summary and where its report lies; return the exit code.

    Args:
        summary: of a comparison.
        out: its folder.
    """
    console = Console(highlight=False, width=None if Console().is_terminal else _PLAIN_WIDTH)
    print_summary(summary, console)
    console.print(f"\nreport: {out / 'report.html'}", markup=False, soft_wrap=True)
    complete = all(run.status in ("finished", "diverged") for arm in summary.arms for run in arm.runs)
    return 0 if complete else 1
