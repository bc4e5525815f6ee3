# SPDX-License-Identifier: Apache-2.0
"""The pages tell the truth: their code runs, their tables are fresh, their links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MODULES = sorted(file for file in (ROOT / "src").rglob("*.py") if ">>> " in file.read_text(encoding="utf-8"))
CODE = [file for folder in ("src", "tests", "docs", "examples", "benchmarks") for file in (ROOT / folder).rglob("*.py")]


def name(path: Path) -> str:
    """Return a path as the repository knows it."""
    return path.relative_to(ROOT).as_posix()


def fences(page: Path, language: str) -> list[str]:
    """Return the code blocks of one language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run_doctest(text: str, where: str) -> None:
    """Run all examples of a text in one namespace and demand that every output is as printed."""
    test = doctest.DocTestParser().get_doctest(text, {}, where, where, 0)
    printed: list[str] = []
    assert not doctest.DocTestRunner().run(test, out=printed.append).failed, "".join(printed)


@pytest.mark.parametrize("module", MODULES, ids=name)
def test_examples_in_docstrings_are_true(module: Path) -> None:
    dotted = ".".join(module.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
    result = doctest.testmod(importlib.import_module(dotted))
    assert result.attempted and not result.failed


@pytest.mark.parametrize("page", [page for page in PAGES if fences(page, "pycon")], ids=name)
def test_sessions_in_pages_are_true(page: Path) -> None:
    run_doctest("\n".join(fences(page, "pycon")), name(page))


@pytest.mark.parametrize("page", [page for page in PAGES if fences(page, "python")], ids=name)
def test_code_in_pages_runs(page: Path) -> None:
    exec(compile("\n".join(fences(page, "python")), name(page), "exec", dont_inherit=True), {"__name__": "page"})


def test_the_readme_fits_one_screen() -> None:
    (code,) = fences(ROOT / "README.md", "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.parametrize("example", EXAMPLES, ids=name)
def test_examples_are_short_and_end_in_a_line_worth_reading(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 40
    runpy.run_path(str(example), run_name="__main__")
    assert re.search(r"\d", capsys.readouterr().out.splitlines()[-1])


def test_generated_tables_are_fresh() -> None:
    from docs.generate import stale

    pages = [name(page) for page in stale()]
    assert not pages, f"stale tables in {', '.join(pages)}: run `make docs` and commit"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r'"([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8")))
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}


def test_files_carry_the_licence() -> None:
    wrong = [name(file) for file in CODE if not file.read_text(encoding="utf-8").startswith("# SPDX-License-Id")]
    assert not wrong


def declared() -> dict[str, str]:
    """Return the requirements of pyproject.toml, extras included, by plain name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {re.split(r"[\[<>=;! ]", line)[0].lower().replace("_", "-"): line for line in lines}


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert set(declared()) - pinned == {"lowbits"}


def test_every_package_that_a_layer_may_import_is_declared() -> None:
    from tests.test_architecture import LAYERS

    allowed = {party.replace("_", "-") for parties in LAYERS.values() for party in parties}
    assert allowed - set(declared()) == set()


def test_make_lists_what_it_can_do() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE)
    shown = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"demo", "test", "check", "bench", "docs", "env"} <= set(targets)
    assert [target for target in targets if f"make {target} " not in shown] == []


def test_make_names_a_missing_python(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    for file in ("pyproject.toml", "constraints.txt"):
        (tmp_path / file).touch()
    result = subprocess.run(["make", "env", "PYTHON="], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode and "no Python >= 3.11" in result.stderr


def test_the_core_needs_torch_alone() -> None:
    others = ["transformers", "tokenizers", "safetensors", "rich", "tyro", "plotly", "jinja2"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({others}))\n"  # None: an import of it fails
        "from lowbits import formats, kernels, nn, optim, quantizers, recipes"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
