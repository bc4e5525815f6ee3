# SPDX-License-Identifier: Apache-2.0
"""`lowbits compare` and `lowbits report`: what a person types, and one line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowbits.cli import compare as command
from lowbits.cli import main
from lowbits.study import Summary, summarize
from lowbits.train import Run
from tests.study.synthetic import example, write_comparison, write_run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[object, ...]]:
    """Collect what `compare` is asked for instead of training."""
    write_comparison(tmp_path / "done", [{"name": "bf16", "seeds": [0]}])
    write_run(tmp_path / "done", "bf16", 0, 3.0)
    summary, seen = summarize(tmp_path / "done"), []

    def note(recipes: object, seeds: object, base: Run, out: Path, *, jobs: int | None) -> Summary:
        seen.append((list(recipes), list(seeds), base, out, jobs))  # type: ignore[call-overload]
        return summary

    monkeypatch.setattr(command, "compare", note)
    return seen


def test_words_become_a_comparison(asked: list[tuple[object, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    words = "compare bf16 null w8a8 --seeds 2 --seed 5 --jobs 1 --steps 7 --lr 0.01 --out runs/x"
    assert main(words.split()) == 0
    ((recipes, seeds, base, out, jobs),) = asked
    assert (recipes, seeds, out, jobs) == (["bf16", "null", "w8a8"], [5, 6], Path("runs/x"), 1)
    assert isinstance(base, Run) and base.steps == 7 and base.optimizer.lr == 0.01
    assert capsys.readouterr().out.endswith("report: runs/x/report.html\n")


def test_a_run_file_gives_the_base(asked: list[tuple[object, ...]], tmp_path: Path) -> None:
    file = tmp_path / "mine_for_compare.py"
    file.write_text("from lowbits.train import Run\ndef run():\n    return Run(steps=11, block=64)\n")
    assert main(["compare", str(file), "bf16", "w8a8", "--steps", "9", "--out", str(tmp_path / "x")]) == 0
    base = asked[0][2]
    assert isinstance(base, Run) and (base.steps, base.block) == (9, 64)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("compare bf16 w8a9 --out {}/x", "no recipe is called 'w8a9'; did you mean 'w8a8'"),
        ("compare bf16 w8a8 --recipe w8a8 --out {}/x", "recipes are given as words"),
        ("compare bf16 --seeds 0 --out {}/x", "--seeds is the number of runs"),
        ("compare bf16 --jobs 0 --out {}/x", "jobs is the number of runs at a time"),
        ("compare bf16 --data {}/none --out {}/x", "no token data"),
        ("compare bf16 --out {}/file", "file"),
        ("report {}/none", "no runs here"),
    ],
)
def test_mistakes_end_in_one_line(words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(words.replace("{}", str(tmp_path)).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lowbits: error: ") and message in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_report_tells_incomplete_from_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(example(tmp_path / "x"))]) == 1
    assert "worse" in capsys.readouterr().out and (tmp_path / "x" / "report.html").exists()
    write_run(tmp_path / "y", "bf16", 0, 3.0)
    assert main(["report", str(tmp_path / "y")]) == 0
