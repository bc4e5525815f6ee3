# SPDX-License-Identifier: Apache-2.0
"""Find a method by its name: the module tree is the registry."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lowbits.errors import RunError, UnknownNameError
from lowbits.methods._contract import Method

NONE = "none"


def names() -> list[str]:
    """Return the name of every method: the public modules of `lowbits.methods`."""
    found = pkgutil.iter_modules([str(Path(__file__).parent)])
    return sorted(module.name for module in found if not module.name.startswith("_"))


def named(words: str) -> Method:
    """Return the method that is meant by `name` or `name,field=value,...`; `none` is ordinary training.

    The name is that of a module of `lowbits.methods`; its one public subclass of `Method` is taken.

    Args:
        words: for example `gaussws`, or `gaussws,b_init=5,noise=uniform`.
    Raises:
        UnknownNameError: no method, or no field of it, has this name; the message offers the nearest.
        RunError: a value is none of its field's, or the module has no method that can be meant.
    """
    name, *settings = words.split(",")
    return of_fields(name, {field: text for field, _, text in (setting.partition("=") for setting in settings)})


def of_fields(name: str, settings: Mapping[str, str]) -> Method:
    """Return the method of a name with some of its fields, as a run's config.json has them.

    Args:
        name: a module of `lowbits.methods`, or `none`.
        settings: field -> its value as text.
    Raises:
        UnknownNameError: no method, or no field of it, has this name.
        RunError: a value is none of its field's.
    """
    kind = Method if name == NONE else _kind(name)
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for field, text in settings.items():
        if field not in (f.name for f in fields(kind)):
            raise UnknownNameError(f"field of {name}", field, [f.name for f in fields(kind)])
        values[field] = _value(f"{name}: {field}", text, hints[field])
    return kind(**values)


def _kind(name: str) -> type[Method]:
    if name not in names():
        raise UnknownNameError("method", name, [*names(), NONE], where="lowbits train --help")
    module = importlib.import_module(f"lowbits.methods.{name}")
    public = (getattr(module, key) for key in module.__all__)
    kinds = [value for value in public if isinstance(value, type) and issubclass(value, Method)]
    if len(kinds) != 1:
        raise RunError(f"lowbits.methods.{name} has {len(kinds)} public methods, so it cannot be named; import it.")
    return kinds[0]


def _value(where: str, text: str, hint: Any) -> object:
    """Read a value of a field's type; of a union, the first type that takes it."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for kind in kinds:
        if kind is NoneType and text == "none":
            return None
        if kind is bool and text in ("true", "false"):
            return text == "true"
        if kind in (int, float, str) or (isinstance(kind, type) and issubclass(kind, Enum)):
            try:
                return kind(text)
            except ValueError:
                continue
    raise RunError(f"{where} cannot be {text!r}; it is {' or '.join(_words(kind) for kind in kinds)}.")


def _words(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(str(member.value) for member in kind)
    return NONE if kind is NoneType else getattr(kind, "__name__", str(kind))
