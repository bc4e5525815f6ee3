# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lowbits import formats, recipes
from lowbits.cli import COMMANDS, main


def test_help_names_every_command_and_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}" in text for name in COMMANDS) and "lowbits compare bf16 w8a8" in text
    assert main([]) == 2


def test_every_command_is_there() -> None:
    import importlib

    assert all(callable(importlib.import_module(f"lowbits.cli.{name}").main) for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "no command is called 'trian'; did you mean 'train'? `lowbits --help` lists them all."),
        (["formats", "e4m4"], "no format is called 'e4m4'; did you mean 'e4m3'"),
        (["recipes", "w8a9"], "no recipe is called 'w8a9'; did you mean 'w8a8'"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith(f"lowbits: error: {message}") and error.count("\n") == 1


def test_formats_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats"]) == 0
    table = {line.split("│")[1].strip(): line.split() for line in capsys.readouterr().out.splitlines() if "│" in line}
    assert list(table) == [fmt.name for fmt in formats.ALL]
    # OCP OFP8 1.0, table 1: E4M3 largest 448, smallest normal 2^-6, smallest subnormal 2^-9.
    words = [word for word in table["e4m3"] if word != "│"]
    assert " ".join(words) == "e4m3 8 256 -448 448 0.015625 0.00195312 yes yes"


def test_formats_prints_every_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats", "e2m1"]) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [float(row[3]) for row in rows] == [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def test_recipes_says_what_hardware_could_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    marks = {row[0]: " ".join(row[-3:]) for row in rows if row[0] in recipes.NAMED}
    assert set(marks) == set(recipes.NAMED)
    # Spec 2.5: G per token in wgrad varies along the contraction, row-wise scales never do.
    assert (marks["bf16"], marks["w8a8"], marks["w8a8g8"], marks["int8_rowwise"]) == (
        ". . .",
        "+ . .",
        "+ . x",
        "+ + +",
    )
    assert main(["recipes", "w8a8g8"]) == 0
    assert "fprop  int8 row x int8 row: could run on integer or FP8 units" in capsys.readouterr().out


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m lowbits.cli formats | true"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.stderr == ""


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)  # to Python: not installed
    monkeypatch.setattr("lowbits.cli.importlib.import_module", lambda name: __import__("rich.console"))
    assert main(["formats"]) == 2
    assert "rich is not installed; `pip install 'lowbits[train]'`" in capsys.readouterr().err
