# SPDX-License-Identifier: Apache-2.0
"""Every package says what is public: `__all__` is complete (ruff sorts it), each name documented and typed."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

import lowbits

PACKAGES = ["lowbits"] + [f"lowbits.{name}" for _, name, package in pkgutil.iter_modules(lowbits.__path__) if package]


def bound(module: ModuleType) -> Iterator[str]:
    """Yield the public names that an `__init__` defines, or imports from its own private modules."""
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{module.__name__}."):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def own_doc(cls: type) -> str:
    """Return the docstring that a class itself states, not one inherited or made by `dataclass`."""
    doc = cls.__dict__.get("__doc__") or ""
    return "" if doc.startswith(f"{cls.__name__}(") else doc


def functions(name: str, value: object) -> Iterator[tuple[str, Callable[..., object]]]:
    """Yield the public functions that a public name brings: itself, or its methods and properties."""
    if inspect.isfunction(value):
        yield name, value
    elif isinstance(value, type):
        for key, member in vars(value).items():
            if key.startswith("_"):
                continue
            member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if inspect.isfunction(member):
                yield f"{name}.{key}", member


def complaints(module: ModuleType) -> Iterator[str]:
    """Yield what is undocumented or untyped among the public names of a package."""
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, type) and not own_doc(value):
            yield f"{name}: no docstring"
        for where, function in functions(name, value):
            if not inspect.getdoc(function):
                yield f"{where}: no docstring"
            signature = inspect.signature(function)
            untyped = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
            if signature.return_annotation is signature.empty:
                untyped.append("return")
            if missing := [p for p in untyped if p not in ("self", "cls")]:
                yield f"{where}: no type for {', '.join(missing)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_complete(package: str) -> None:
    module = importlib.import_module(package)
    public = {n for n in bound(module) if not n.startswith("_") and not inspect.ismodule(getattr(module, n))}
    assert module.__doc__, f"{package} has no docstring"
    assert all(hasattr(module, name) for name in module.__all__)
    missing = public - set(module.__all__)
    assert not missing, f"{package}.__all__ leaves out {sorted(missing)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_documented_and_typed(package: str) -> None:
    wrong = list(complaints(importlib.import_module(package)))
    assert not wrong, f"{package}:\n" + "\n".join(wrong)
