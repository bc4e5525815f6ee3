# SPDX-License-Identifier: Apache-2.0
"""The law of docs/architecture.md: imports point upwards, third parties stay in place, files stay short."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "lowbits"
FILES = sorted(SOURCE.rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 80
NAMELESS = {"utils", "util", "helpers", "helper", "common", "misc"}


def layers() -> dict[str, set[str]]:
    """Read the layers from the page, top first, each with the third parties that it names in brackets."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^  (\w+)(?:/|\.py) .*?(?:\(([\w, ]+)\))?$", page.split("```")[1], re.MULTILINE)
    return {name: {party.strip() for party in parties.split(",") if party} for name, parties in rows}


LAYERS = layers()
ORDER = list(LAYERS)


def allowed(layer: str) -> set[str]:
    """Return the third parties of a layer: its own, and those of the layers above, except triton."""
    above = set().union(*(LAYERS[name] for name in ORDER[: ORDER.index(layer)])) - {"triton"}
    return LAYERS[layer] | above


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Yield line and absolute dotted name of all that a file imports, wherever in the file it does."""
    package = ["lowbits", *file.relative_to(SOURCE).parent.parts]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "lowbits":  # `from lowbits import nn` imports the package nn
                yield from ((node.lineno, f"lowbits.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def layer_of(file: Path) -> str:
    """Return the first name below src/lowbits: the layer that a file belongs to."""
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def breaches(file: Path) -> Iterator[str]:
    """Yield a line for every import of a file that the law forbids."""
    layer = layer_of(file)
    for line, name in imports(file):
        top, *rest = name.split(".")
        where = f"{file.relative_to(ROOT)}:{line} imports {name}"
        if top == "lowbits":
            target = rest[0] if rest else ""
            if target not in ORDER:
                yield f"{where}: no such layer in docs/architecture.md"
            elif ORDER.index(target) > ORDER.index(layer):
                yield f"{where}: {target} stands below {layer}"
            elif target != layer and any(part.startswith("_") for part in rest):
                yield f"{where}: a private module of another package"
        elif top not in sys.stdlib_module_names and top not in allowed(layer):
            yield f"{where}: {layer} may import {', '.join(sorted(allowed(layer))) or 'the standard library'} alone"


def test_the_page_lists_every_package() -> None:
    found = {layer_of(file) for file in FILES if file.parent != SOURCE or file.name != "__init__.py"}
    assert found <= set(ORDER), f"packages without a layer in docs/architecture.md: {sorted(found - set(ORDER))}"
    assert ORDER[0] == "errors" and ORDER[-1] == "cli" and LAYERS["formats"] == {"torch"}


def test_imports_point_upwards() -> None:
    wrong = [line for file in FILES if layer_of(file) in ORDER for line in breaches(file)]
    assert not wrong, "\n".join(wrong)


def test_the_law_sees_a_breach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "src" / "lowbits" / "formats" / "_bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text(
        "import triton\nfrom ..nn import Recipe\nfrom lowbits import cli\ndef f():\n    import numpy.random\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(f"{__name__}.SOURCE", tmp_path / "src" / "lowbits")
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert [line.split(" ")[2].rstrip(":") for line in breaches(bad)] == [
        "triton",
        "lowbits.nn",
        "lowbits.cli",
        "numpy.random",
    ]


def test_files_and_functions_are_short_and_named_for_what_they_hold() -> None:
    wrong = []
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        where = file.relative_to(ROOT)
        if (lines := text.count("\n")) > MAX_FILE_LINES:
            wrong.append(f"{where}: {lines} lines, at most {MAX_FILE_LINES}: split it by what it holds")
        if NAMELESS & {part.strip("_").removesuffix(".py") for part in where.parts}:
            wrong.append(f"{where}: name the module for what it holds")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > MAX_FUNCTION_LINES:
                    wrong.append(f"{where}:{node.lineno} {node.name}: {size} lines, at most {MAX_FUNCTION_LINES}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(SOURCE).as_posix())
def test_no_autograd_function_returns_a_cast(file: Path) -> None:
    """Graphs of torch 2.11 lose the gradient of a result that `.to` gave back unchanged: `as_dtype` instead."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ClassDef) or not any(ast.unparse(base).endswith("Function") for base in node.bases):
            continue
        forward = next(part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "forward")
        returned = [
            ast.unparse(part.value) for part in ast.walk(forward) if isinstance(part, ast.Return) and part.value
        ]
        assert not [text for text in returned if re.search(r"\.to\([^()]*\)$", text)], f"{node.name} in {file}"
