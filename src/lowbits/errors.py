# SPDX-License-Identifier: Apache-2.0
"""Name what went wrong, the rule that was broken, the value, and the remedy.

    LowbitsError
    |-- FormatError           a number format that cannot exist, or a value it cannot hold
    |-- SpecError             a quantizer whose parts contradict each other
    |-- ShapeError            a tensor whose shape does not fit a granularity
    |-- NativeError           native execution was asked for where the hardware cannot do it
    |-- ConversionError       a model in which nothing, or the wrong thing, would be converted
    |-- UnknownNameError      a recipe, model or layer name that does not exist
    |-- DataError             text, tokenizer or shards that cannot be used
    |-- CheckpointError       a checkpoint that is torn, altered, or of another run
    |-- RunError              a run that cannot start or go on (folder in use, no device, diverged, disk full)

The command line prints one line of any of them and exits with 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LowbitsError(Exception):
    """Base of every error that the library raises on purpose."""


class FormatError(LowbitsError):
    """A number format that cannot exist, or a value that it cannot hold."""


class SpecError(LowbitsError):
    """A quantizer whose parts contradict each other."""


class ShapeError(LowbitsError):
    """A tensor whose shape does not fit the granularity."""


class NativeError(LowbitsError):
    """Native execution was asked for where the scales or the device do not allow it."""


class ConversionError(LowbitsError):
    """A model in which nothing, or the wrong thing, would be converted."""


class DataError(LowbitsError):
    """Text, a tokenizer or token shards that cannot be used."""


class CheckpointError(LowbitsError):
    """A checkpoint that is torn, altered, or belongs to another run."""


class RunError(LowbitsError):
    """A run that cannot start or cannot go on."""


class UnknownNameError(LowbitsError):
    """A name that does not exist; the message offers the nearest ones.

    Args:
        kind: what the name should have been, for example `recipe`.
        name: what was asked for.
        known: every name that exists.
        where: where to see them all, for example `lowbits recipes`.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], where: str = "") -> None:
        known = list(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known: {', '.join(known[:12])}."
        more = f" `{where}` lists them all." if where else ""
        super().__init__(f"no {kind} is called {name!r}; {hint}{more}")
