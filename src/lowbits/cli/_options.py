# SPDX-License-Identifier: Apache-2.0
"""Turn words into dataclasses: tyro with the few rules that a `Run` needs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import NoneType
from typing import Any, TypeVar, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

T = TypeVar("T")

_registry = ConstructorRegistry()
# Nested options are written without the path that leads to them; what only Python can say is not shown.
_STYLE = (tyro.conf.OmitArgPrefixes, tyro.conf.SuppressFixed, tyro.conf.EnumChoicesFromValues)


def parse(kind: type[T], arguments: Sequence[str], *, prog: str, examples: str, default: T | None = None) -> T:
    """Read a dataclass from the command line; --help shows its docstring and the examples.

    Args:
        kind: a dataclass; its `Run` fields, if any, become options without a prefix.
        arguments: the words after the command.
        prog: the command, for the help.
        examples: lines below the description.
        default: values of the options that are not given.
    """
    text = (inspect.getdoc(kind) or "").split("\nArgs:")[0].rstrip()
    read: Any = tyro.cli(  # its overloads have none for an optional default
        kind,
        prog=prog,
        description=f"{text}\n\nExamples:\n{examples}",
        args=arguments,
        default=default,
        config=_STYLE,
        registry=_registry,
    )
    return read


@_registry.primitive_rule
def _name_or_object(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """A recipe or a model is a name on the command line; a run file may bring the object itself."""
    kinds = [kind for kind in get_args(info.type) if kind is not NoneType]
    if str not in kinds or len(kinds) == 1:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: True,
        str_from_instance=lambda value: [value if isinstance(value, str) else "<of the run file>"],
    )
