# SPDX-License-Identifier: Apache-2.0
"""Turn words into dataclasses: tyro with the few rules that a `Run` needs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from lowbits.nn import Keep, Phase

T = TypeVar("T")

_KEEP_HELP = {
    "first": "blocks at the beginning that stay in high precision: a number (2), or a share of all blocks (0.15).",
    "last": "likewise at the end; the NVFP4 paper keeps about 0.15.",
    "names": "layers that do, by patterns of their names: '*.mlp.c_proj' 'lm_head'.",
}
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


@_registry.struct_rule
def _keep(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Which layers stay in high precision: --keep.first, --keep.last, --keep.names; `keep` alone counts checkpoints."""
    if info.type is not Keep:
        return None
    default = info.default if isinstance(info.default, Keep) else Keep()
    types: dict[str, Any] = {"first": int | float, "last": int | float, "names": tuple[str, ...]}
    return StructConstructorSpec(
        instantiate=lambda **values: Keep(**{name.removeprefix("keep."): value for name, value in values.items()}),
        fields=tuple(
            StructFieldSpec(f"keep.{name}", kind, getattr(default, name), helptext=_KEEP_HELP[name])
            for name, kind in types.items()
        ),
    )


@_registry.primitive_rule
def _phase(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Phase] | None:
    """When the quantizers of a pass are off: `82%:forward=off`."""
    if info.type is not Phase:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="START:on|off|forward=off|backward=off",
        instance_from_str=lambda words: Phase.parse(words[0]),
        is_instance=lambda value: isinstance(value, Phase),
        str_from_instance=lambda phase: [str(phase)],
    )


@_registry.primitive_rule
def _name_or_object(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """A recipe or a model is a name on the command line; a run file may bring the object itself."""
    kinds = [kind for kind in get_args(info.type) if kind is not NoneType]
    if get_origin(info.type) not in (Union, UnionType) or str not in kinds or len(kinds) == 1:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: True,
        str_from_instance=lambda value: [value if isinstance(value, str) else "<of the run file>"],
    )
