# SPDX-License-Identifier: Apache-2.0
"""`lowbits report`: write the report of a comparison again, from what its runs left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from lowbits.cli._options import parse
from lowbits.cli.compare import report_to
from lowbits.study import write_report

__all__ = ["Report", "main"]

_EXAMPLES = """  lowbits report runs/study
  lowbits report runs        (any folder of <recipe>/seed-<n> runs; bf16 is the baseline, or else the first by name)"""


@dataclass(frozen=True)
class Report:
    """Read the runs of a comparison, finished or not, and write report.html and report.json beside them.

    Args:
        folder: what `lowbits compare` was given as --out.
    """

    folder: tyro.conf.Positional[Path]


def main(arguments: Sequence[str]) -> int:
    """Run `lowbits report`.

    Args:
        arguments: the words after it.

    Returns:
        0 if every run came to its end, diverged ones included; 1 if some did not.
    """
    folder = parse(Report, arguments, prog="lowbits report", examples=_EXAMPLES).folder
    return report_to(write_report(folder), folder)
