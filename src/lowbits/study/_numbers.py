# SPDX-License-Identifier: Apache-2.0
"""Write numbers for people: the same in the page, the table and the sentences."""

from __future__ import annotations

from lowbits.study._statistics import Spread

UNKNOWN = "–"


def nats(value: float | None, signed: bool = False) -> str:
    """Return a loss or a gap with the digits that it deserves.

    >>> nats(0.01234, signed=True), nats(3.14159), nats(None)
    ('+0.0123', '3.1416', '–')
    """
    if value is None:
        return UNKNOWN
    digits = 4 if abs(value) < 10 else 2
    return f"{value:+z.{digits}f}" if signed else f"{value:.{digits}f}"


def with_spread(spread: Spread, digits: int = 4) -> str:
    """Return `mean ± standard deviation`, the latter where it is known.

    >>> with_spread(Spread.of([3.0, 3.2]), digits=2)
    '3.10 ± 0.14'
    """
    if spread.mean is None:
        return UNKNOWN
    tail = "" if spread.spread is None else f" ± {spread.spread:.{digits}f}"
    return f"{spread.mean:.{digits}f}{tail}"


def decibels(value: float | None) -> str:
    """Return a ratio of powers.

    >>> decibels(20.43), decibels(None)
    ('20.4 dB', '–')
    """
    return UNKNOWN if value is None else f"{value:.1f} dB"


def sigmas(value: float | None) -> str:
    """Return a gap in units of the seed spread.

    >>> sigmas(2.345), sigmas(-0.01), sigmas(None)
    ('+2.3', '+0.0', '–')
    """
    return UNKNOWN if value is None else f"{value:+z.1f}"


def count(value: float | None, unit: str = "") -> str:
    """Return a count that can be read at a glance.

    >>> count(819200), count(1_843_000, "parameters"), count(12345)
    ('819 k', '1.84 M parameters', '12.3 k')
    """
    if value is None:
        return UNKNOWN
    text = f"{value:,.0f}" if value < 1e4 else _scaled(value, "")
    return f"{text} {unit}".strip()


def size(value: float | None) -> str:
    """Return bytes in the decimal unit that suits them.

    >>> size(7_200_000), size(999), size(1.5e9)
    ('7.2 MB', '999 B', '1.5 GB')
    """
    if value is None:
        return UNKNOWN
    return f"{value:.0f} B" if value < 1e3 else _scaled(value, "B")


def _scaled(value: float, unit: str) -> str:
    """Three digits and a decimal prefix."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}{unit}"
    return f"{value / 1e3:.3g} k{unit}"


def duration(value: float | None) -> str:
    """Return seconds as a person says them.

    >>> duration(8.31), duration(95), duration(7384)
    ('8.3 s', '1 min 35 s', '2 h 3 min')
    """
    if value is None:
        return UNKNOWN
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours else f"{minutes} min {seconds} s"


def ratio(value: float | None) -> str:
    """Return a multiple.

    >>> ratio(1.044)
    '1.04×'
    """
    return UNKNOWN if value is None else f"{value:.2f}×"


def listed(names: list[str] | tuple[str, ...]) -> str:
    """Return names as English lists them.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
