# SPDX-License-Identifier: Apache-2.0
"""Times, ceilings and results files of the speed benchmarks.

A results file holds rows, and the runs that they come from: one row a key, the newest. So a table can be measured in
parts, and a call that is cut off keeps what it has. Whatever is compared was measured in one run.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lowbits.analysis import provenance
from lowbits.errors import LowbitsError

RESULTS = Path(__file__).resolve().parent / "results"
# What kernels, compilers and peers raise where they cannot run; a row says so and the others are still measured.
FAILURES: tuple[type[Exception], ...] = (
    LowbitsError, RuntimeError, ImportError, AttributeError, ValueError, TypeError, AssertionError, KeyError,
)  # fmt: skip
if importlib.util.find_spec("triton") is not None:
    from triton.errors import TritonError

    FAILURES = (*FAILURES, TritonError)
Work = Callable[[], object]
Row = dict[str, Any]


def missing(package: str) -> bool:
    """Return whether a peer is not installed, and say so."""
    if importlib.util.find_spec(package) is not None:
        return False
    print(f"{package} is not installed, its rows are left out; pip install '.[peers]'", flush=True)
    return True


# --- times ----------------------------------------------------------------------------------------------------------


def device_ms(work: Work, device: torch.device, repeat: int | None = None) -> float:
    """Median time that a call takes on the device, in milliseconds.

    On CUDA: between two events, the L2 cache flushed before each call, as `triton.testing.do_bench` does; and the
    device is kept waiting until the host has launched everything, so that launches do not count. On a CPU: wall time.

    Args:
        work: what is timed.
        device: where it runs.
        repeat: calls; None for what fits into 150 ms, 10 to 100 (CPU: into a second, 3 to 10).
    """
    if device.type != "cuda":
        return _wall_ms(work, repeat)
    for _ in range(3):
        work()
    launch = host_ms(work, device)
    cache = torch.empty(2**28, dtype=torch.int8, device=device)
    wait = int((1.5 * launch + 0.02) * 2e6)  # cycles of a clock of at most 2 GHz
    calls = repeat or int(min(max(150 / max(_rough_ms(work), 1e-3), 10), 100))
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, stop in pairs:
        cache.zero_()
        torch.cuda._sleep(wait)
        start.record()
        work()
        stop.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(stop) for start, stop in pairs)


def steady_ms(work: Work, device: torch.device, repeat: int | None = None) -> float:
    """Median time of a call among calls in a row, in milliseconds: the device's, or the host's if that takes longer.

    Args:
        work: what is timed.
        device: where it runs.
        repeat: groups of calls, 5 by default; of calls on a CPU.
    """
    if device.type != "cuda":
        return _wall_ms(work, repeat)
    for _ in range(3):
        work()
    calls = int(min(max(20 / max(_rough_ms(work), 1e-3), 3), 50))
    times = []
    for _ in range(repeat or 5):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) * 1e3 / calls)
    return statistics.median(times)


def host_ms(work: Work, device: torch.device) -> float:
    """Median time until a call returns to the host, the device idle before it, in milliseconds."""
    times = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def _rough_ms(work: Work) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / 3 * 1e3


def _wall_ms(work: Work, repeat: int | None) -> float:
    work()
    times: list[float] = []
    while len(times) < (repeat or 10) and (repeat or len(times) < 3 or sum(times) < 1e3):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def release(device: torch.device) -> None:
    """Free what an arm left behind: compiled code, garbage, cached memory."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- ceilings -------------------------------------------------------------------------------------------------------


def copy_gb_per_s(device: torch.device) -> float:
    """Bytes read and written by a copy within the device, 2 GiB on CUDA, in GB/s."""
    source = torch.ones(2**31 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / device_ms(lambda: target.copy_(source), device) / 1e6


def gemm_tflops(device: torch.device) -> dict[str, float]:
    """Rates of square GEMMs of torch, 8192 on CUDA: bf16, and FP8 with one scale a tensor where there is one."""
    n = 8192 if device.type == "cuda" else 1024
    x, w = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    found = {"bf16": 2 * n**3 / device_ms(lambda: x @ w.t(), device) / 1e9}
    if device.type == "cuda":
        one = torch.ones((), device=device)
        a, b = (t.to(torch.float8_e4m3fn) for t in (x, w))

        def multiply() -> torch.Tensor:
            return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

        try:
            found["fp8"] = 2 * n**3 / device_ms(multiply, device) / 1e9
        except FAILURES as error:
            print(f"no FP8 GEMM here: {first_line(error)}", flush=True)
    return found


# --- results --------------------------------------------------------------------------------------------------------


def first_line(error: Exception) -> str:
    """Return the kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]


class Report:
    """The rows of one benchmark: on the terminal, and in a results file that is written after each.

    Args:
        name: of the file.
        device: where it is measured.
        options: of the command line; `only`, `fresh` and `results` are used.
        ceilings: what the device reaches in this run.
        columns: header -> what it shows of a row; the first names the row.
    """

    def __init__(
        self, name: str, device: torch.device, options: argparse.Namespace, ceilings: Row,
        columns: dict[str, Callable[[Row], str]],
    ) -> None:  # fmt: skip
        told = provenance(device)
        self.device, self.columns, self.only = device, columns, [word.lower() for word in options.only]
        self.path = Path(options.results) / str(told["device"]) / f"{name}.json"
        asked = {key: value for key, value in vars(options).items() if key not in ("results", "fresh")}
        self.run = {"provenance": told, "options": asked, "ceilings": ceilings}
        self.name = str(told["time"])
        self.rows: dict[str, Row] = {}
        self.failed = False
        before = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() and not options.fresh else {}
        self.runs, self.known = before.get("runs", {}), {row["key"]: row for row in before.get("rows", [])}
        for what, value in ceilings.items():
            print(f"{what}: {value}", flush=True)

    def wants(self, key: str) -> bool:
        """Return whether a row was asked for."""
        return not self.only or any(word in key.lower() for word in self.only)

    def measure(self, key: str, make: Callable[[], Row], *, may_fail: bool = False) -> Row | None:
        """Measure, print and store a row; None where it cannot run, which the row then says."""
        release(self.device)
        try:
            row = make()
        except FAILURES as error:
            row, self.failed = {"failed": first_line(error)}, self.failed or not may_fail
        self.store(key, row)
        print("  ".join([f"{key:64}", *(f"{head} {text}" for head, text in self._cells(row))]), flush=True)
        if "failed" in row:
            self._check_device(key)
        return None if "failed" in row else row

    def _check_device(self, key: str) -> None:
        """After an illegal access nothing runs any more: better no rows than rows that fail for another's sake."""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            raise SystemExit(
                f"{key} broke the GPU's context ({first_line(error)}); leave it out with --only"
            ) from error

    def store(self, key: str, row: Row) -> None:
        """Store a row, in place of an earlier one of this key."""
        self.rows[key] = self.known[key] = {"key": key, **row, "run": self.name}
        self.runs[self.name] = self.run
        used = {one["run"] for one in self.known.values()}
        content = {"runs": {name: run for name, run in self.runs.items() if name in used},
                   "rows": list(self.known.values())}  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.path)

    def _cells(self, row: Row) -> list[tuple[str, str]]:
        if "failed" in row:
            return [("failed:", row["failed"])]
        return [(head, show(row)) for head, show in self.columns.items()]

    def show(self, title: str) -> int:
        """Print the table of this run; return what the process exits with."""
        table = Table(title=title, title_justify="left")
        for head in ("", *self.columns):
            table.add_column(head, justify="right" if head else "left", no_wrap=True)
        for key, row in self.rows.items():
            cells = ["failed"] if "failed" in row else [text for _, text in self._cells(row)]
            table.add_row(key, *cells)
        console = Console()
        (console if console.is_terminal else Console(width=190)).print(table)
        print(f"wrote {self.path}")
        return int(self.failed)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return the options that all of these benchmarks have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    made.add_argument("--peers", action="store_true", help="measure the peers that are installed, too")
    made.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows whose name contains one of these")
    made.add_argument("--repeat", type=int, help="calls that are timed; by default as many as are needed")
    made.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    made.add_argument("--results", default=str(RESULTS), metavar="FOLDER", help="where results files lie")
    return made


def number(key: str, form: str = ".2f") -> Callable[[Row], str]:
    """Return what shows a number of a row, a dash where it has none."""
    return lambda row: "-" if row.get(key) is None else format(row[key], form)


def sizes(texts: Sequence[str], parts: int) -> list[tuple[int, ...]]:
    """Return `16384x2048` and the like as numbers."""
    found = [tuple(int(n) for n in text.split("x")) for text in texts]
    wrong = [text for text, size in zip(texts, found, strict=True) if len(size) != parts]
    if wrong:
        raise SystemExit(f"a size has {parts} numbers with an x between them, got {', '.join(wrong)}")
    return found
