# SPDX-License-Identifier: Apache-2.0
"""Compare recipes on equal terms, and report what they cost.

    compare(["bf16", "null", "w8a8", "w4_tensor"], seeds=(0, 1, 2), base=Run(...), out=Path("runs/study"))
    write_report(Path("runs/study"))

`compare` trains every recipe under every seed, each run in a process of its own; `summarize` reads what they left and
says what can and what cannot be told from chance; `write_report` shows it.
"""

from __future__ import annotations

from lowbits.study._compare import compare
from lowbits.study._report import write_report
from lowbits.study._summary import Summary, summarize
from lowbits.study._table import print_summary

__all__ = ["Summary", "compare", "print_summary", "summarize", "write_report"]
