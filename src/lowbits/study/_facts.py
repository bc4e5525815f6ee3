# SPDX-License-Identifier: Apache-2.0
"""What a reader must know to trust or repeat a comparison: model, data, budget, machine, versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lowbits.study._arms import Arm
from lowbits.study._numbers import count
from lowbits.study._records import Line, Record, finite

Facts = tuple[tuple[str, str], ...]
# Told in `setup`, or different in every run.
_NOT_ENVIRONMENT = ("device", "device type", "processes", "time")
_DATA = {"stdlib": "stdlib (the source code of Python's standard library)"}


def setup(told: Line, records: Sequence[Record], arms: Sequence[Arm]) -> Facts:
    """Return model, data, budget and device as labels and values.

    Args:
        told: comparison.json; empty where there is none.
        records: every run of the comparison.
        arms: in short.
    """
    config = told.get("base") or next((r.config for r in records if r.config), {})
    result = next((r.result for r in records if r.status == "finished"), {})
    device = next((str(r.environment["device"]) for r in records if r.environment.get("device")), "")
    facts = {
        "Model": _joined(config.get("model"), _counted(result, "parameters", "parameters")),
        "Data": _joined(
            _DATA.get(str(config.get("data")), config.get("data")), _counted(config, "block", "tokens a sequence")
        ),
        "Budget": _joined(_counted(result, "steps", "steps"), _counted(result, "tokens", "tokens a run")),
        "Device": device,
        "At a time": _counted(told, "runs_at_a_time", "runs, the cores shared out evenly"),
        "Seeds": "; ".join(
            f"{', '.join(names)}: {', '.join(map(str, seeds))}" for seeds, names in _by_seeds(arms).items()
        ),
    }
    return tuple((label, value) for label, value in facts.items() if value)


def _counted(facts: Line, key: str, unit: str) -> str:
    value = finite(facts.get(key))
    return "" if value is None else count(value, unit)


def _by_seeds(arms: Sequence[Arm]) -> dict[tuple[int, ...], list[str]]:
    groups: dict[tuple[int, ...], list[str]] = {}
    for arm in arms:
        groups.setdefault(arm.seeds, []).append(arm.name)
    return groups


def environment(records: Sequence[Record]) -> Facts:
    """Return versions, commit and threads; a value that differs between the runs shows every form it took."""
    values: dict[str, dict[str, None]] = {}
    for record in records:
        for label, value in _flat(record.environment).items():
            values.setdefault(label, {})[value] = None
    return tuple((label, " | ".join(forms)) for label, forms in values.items() if label not in _NOT_ENVIRONMENT)


def _flat(environment: Mapping[str, object], prefix: str = "") -> Line:
    """`{"versions": {"torch": "2"}, "a": {"b": 1}}` becomes `{"torch": "2", "a b": "1"}`."""
    flat: Line = {}
    for key, value in environment.items():
        label = f"{prefix} {key}".strip().replace("_", " ")
        if isinstance(value, Mapping):
            flat |= _flat({str(k): v for k, v in value.items()}, "" if key == "versions" else label)
        elif value not in (None, ""):
            flat[label] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return flat


def _joined(*parts: object) -> str:
    return ", ".join(str(part) for part in parts if part)
