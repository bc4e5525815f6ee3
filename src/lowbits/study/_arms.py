# SPDX-License-Identifier: Apache-2.0
"""One arm of a comparison: a recipe, and what its runs under several seeds came to."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lowbits.study._changes import folder_name
from lowbits.study._curves import Curve, Reach, difference, mean_curve, series, smoothed
from lowbits.study._layer_errors import ErrorHistory, Layers, Worst, history, layers_of, worst_layers
from lowbits.study._methods import MethodTable, method_curves, method_tables
from lowbits.study._phases import PHASE, Mark, marks
from lowbits.study._records import Line, Record, finite
from lowbits.study._statistics import Gap, Spread

BASELINE, NULL, RECIPE = "baseline", "null", "recipe"
# The order in which a table names what went wrong.
TROUBLE = ("diverged", "failed", "interrupted", "unfinished", "missing")


@dataclass(frozen=True)
class Plan:
    """What an arm is meant to be.

    Args:
        name: of the arm.
        recipe: the named recipe that it trains.
        role: `baseline`, `null` (the baseline again, other seeds) or `recipe`.
        seeds: of its runs.
        quantizes: what the recipe quantizes, in words.
        method: what it does beside, in the words of `lowbits.methods.named`; empty for what all arms have in common.
        changes: which layers it keeps in high precision, and its phases, as words of the arm.
    """

    name: str
    recipe: str
    role: str
    seeds: tuple[int, ...]
    quantizes: str = ""
    method: str = ""
    changes: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return folder_name(self.name)


@dataclass(frozen=True)
class Outcome:
    """One run in short.

    Args:
        seed: its seed.
        directory: its folder, relative to the comparison's.
        status: `finished`, `diverged`, `interrupted`, `failed`, `unfinished` or `missing`.
        message: why it did not finish, or where it diverged.
        steps: optimizer steps done.
        val_loss_on: final validation loss in nats, quantizers on.
        val_loss_off: the same with the quantizers off.
        skipped_steps: steps left out for a non-finite loss or gradient.
        spikes: loss spikes.
        diverged_at: the step, for a diverged run.
        diverged_layer: the layer that first produced a non-finite number.
        diverged_role: its operand.
        events: what the log reports out of the ordinary, as sentences.
    """

    seed: int
    directory: str
    status: str
    message: str
    steps: int
    val_loss_on: float | None
    val_loss_off: float | None
    skipped_steps: int
    spikes: int
    diverged_at: int | None
    diverged_layer: str | None
    diverged_role: str | None
    events: tuple[str, ...]


@dataclass(frozen=True)
class Arm:
    """Everything that the report says about one arm; losses in nats, memory in bytes.

    Args:
        name: of the arm.
        recipe: the named recipe.
        role: `baseline`, `null` or `recipe`.
        quantizes: in words.
        seeds: as planned.
        status: in words, for example `3 of 3 finished`.
        verdict: `baseline`, `same`, `suggestive`, `worse`, `better`, `single`, `unstable` or `none`.
        words: the verdict as a phrase.
        loss_on: final validation loss with the quantizers on, finished runs.
        loss_off: the same with the quantizers off.
        perplexity: exp of loss_on, run by run.
        gap: loss_on against the baseline; None for the baseline and where there is nothing to compare.
        reach: tokens and time to the target loss (iso-quality).
        tokens: seen by a finished run.
        seconds: training time alone of a finished run.
        tokens_per_second: of the finished runs.
        execution: `simulated`, `native`, or which GEMMs are native alone, and why not all; `high precision` where none
            is quantized.
        memory_measured: bytes by category.
        memory_stored: bytes by category, were every quantized tensor stored in its few bits.
        peak_memory: most bytes at any time: allocated on CUDA, of the whole process on a CPU.
        parameters: of the model.
        converted_layers: linear layers under the recipe.
        linear_flops_share: their share of the FLOPs of all linear layers.
        validation: loss_on over training.
        training: smoothed training loss over training.
        gap_curve: validation loss minus the baseline's mean, over training.
        errors_step: the step of `errors`.
        errors: quantization error by layer and operand, last of the first run that logged it.
        error_history: the same over the steps of that run.
        worst: the layer that fares worst in each role, in `errors`.
        phases: where they begin.
        method_curves: each number that the method logged, over training.
        method_tables: what the first finished run's method found.
        sample: text generated by the first finished run.
        runs: each run in short.
    """

    name: str
    recipe: str
    role: str
    quantizes: str
    seeds: tuple[int, ...]
    status: str
    verdict: str = "none"
    words: str = ""
    loss_on: Spread = field(default_factory=lambda: Spread.of([]))
    loss_off: Spread = field(default_factory=lambda: Spread.of([]))
    perplexity: Spread = field(default_factory=lambda: Spread.of([]))
    gap: Gap | None = None
    reach: Reach = Reach()
    tokens: float | None = None
    seconds: float | None = None
    tokens_per_second: Spread = field(default_factory=lambda: Spread.of([]))
    execution: str = ""
    memory_measured: dict[str, float] = field(default_factory=dict)
    memory_stored: dict[str, float] = field(default_factory=dict)
    peak_memory: float | None = None
    parameters: int | None = None
    converted_layers: int | None = None
    linear_flops_share: float | None = None
    validation: Curve = Curve()
    training: Curve = Curve()
    gap_curve: Curve = Curve()
    errors_step: int | None = None
    errors: Layers = field(default_factory=dict)
    error_history: ErrorHistory = ErrorHistory()
    worst: tuple[Worst, ...] = ()
    phases: tuple[Mark, ...] = ()
    method_curves: dict[str, Curve] = field(default_factory=dict)
    method_tables: tuple[MethodTable, ...] = ()
    sample: str = ""
    runs: tuple[Outcome, ...] = ()


def finished(records: Iterable[Record]) -> list[Record]:
    """Return the runs that came to a result."""
    return [r for r in records if r.status == "finished"]


def measure(plan: Plan, records: Sequence[Record], root: str) -> Arm:
    """Return an arm with all that its own runs tell; what needs the baseline is added later.

    Args:
        plan: what the arm is meant to be.
        records: its runs, in the order of the seeds.
        root: path of the comparison, to shorten the paths of the runs.
    """
    done = finished(records)
    first = done[0].result if done else {}
    measured, stored = _memory(done)
    with_errors = next((r for r in [*done, *records] if r.errors), None)
    errors = layers_of(with_errors.errors[-1]) if with_errors else {}
    losses = [float(r.result["val_loss_on"]) for r in done]
    return Arm(
        name=plan.name,
        recipe=plan.recipe,
        role=plan.role,
        quantizes=plan.quantizes,
        seeds=plan.seeds,
        status=_status_words(records, len(done)),
        loss_on=Spread.of(losses),
        loss_off=_spread(done, "val_loss_off"),
        perplexity=Spread.of([math.exp(min(loss, 700.0)) for loss in losses]),
        tokens=_mean(done, "tokens"),
        seconds=_mean(done, "seconds"),
        tokens_per_second=_spread(done, "tokens_per_second"),
        execution=_execution(done[0]) if done else "",
        memory_measured=measured,
        memory_stored=stored,
        peak_memory=_mean(done, "peak_memory_bytes"),
        parameters=first.get("parameters"),
        converted_layers=first.get("converted_layers"),
        linear_flops_share=finite(first.get("linear_flops_share")),
        validation=mean_curve([series(r.evaluations, "loss_on") for r in records]),
        training=mean_curve([smoothed(series(r.steps, "loss")) for r in records]),
        errors_step=int(with_errors.errors[-1]["step"]) if with_errors else None,
        errors=errors,
        error_history=history(with_errors.errors) if with_errors else ErrorHistory(),
        worst=worst_layers(errors),
        phases=marks(records),
        method_curves=method_curves(records),
        method_tables=method_tables(first),
        sample=str(first.get("sample") or "").rstrip(),
        runs=tuple(_outcome(r, root) for r in records),
    )


def with_gap_curve(arm: Arm, records: Sequence[Record], baseline: Arm) -> Curve:
    """Return validation loss minus the baseline's mean, for every arm but the baseline itself."""
    return Curve() if arm.role == BASELINE else difference(records, baseline.validation)


def _spread(records: Sequence[Record], key: str) -> Spread:
    return Spread.of([value for r in records if (value := finite(r.result.get(key))) is not None])


def _mean(records: Sequence[Record], key: str) -> float | None:
    return _spread(records, key).mean


def _memory(records: Sequence[Record]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean over the runs of bytes by category, measured and as stored in few bits."""
    ledgers = [r.result.get("memory") or {} for r in records]
    return _mean_ledger([x.get("measured") or {} for x in ledgers]), _mean_ledger(
        [x.get("stored_in_few_bits") or {} for x in ledgers]
    )


def _mean_ledger(ledgers: Sequence[Line]) -> dict[str, float]:
    names = list(dict.fromkeys(name for ledger in ledgers for name in ledger))
    columns = {name: [v for ledger in ledgers if (v := finite(ledger.get(name))) is not None] for name in names}
    return {name: statistics.fmean(values) for name, values in columns.items() if values}


def _execution(record: Record) -> str:
    gemms = [record.config.get("rule", {}).get(gemm) for gemm in ("fprop", "dgrad", "wgrad")]
    if all(gemm is not None and not any(gemm.values()) for gemm in gemms):
        return "high precision"
    return str(record.result.get("execution", ""))


def _status_words(records: Sequence[Record], num_finished: int) -> str:
    """`3 of 3 finished`, and what became of the others."""
    counts = Counter(r.status for r in records if r.status in TROUBLE)
    others = [f"{counts[status]} {status}" for status in TROUBLE if counts[status]]
    return ", ".join([f"{num_finished} of {len(records)} finished", *others])


def _outcome(record: Record, root: str) -> Outcome:
    result = record.result
    return Outcome(
        seed=record.seed,
        directory=str(record.directory).removeprefix(root).lstrip("/"),
        status=record.status,
        message=record.message or _where(result),
        steps=int(result.get("steps") or max((line["step"] for line in record.steps), default=0)),
        val_loss_on=finite(result.get("val_loss_on")),
        val_loss_off=finite(result.get("val_loss_off")),
        skipped_steps=int(result.get("skipped_steps") or 0),
        spikes=int(result.get("spikes") or 0),
        diverged_at=result.get("diverged_at"),
        diverged_layer=result.get("diverged_layer") or None,
        diverged_role=result.get("diverged_role") or None,
        events=tuple(_sentence(event) for event in record.events if event.get("event") != PHASE),
    )


def _where(result: Line) -> str:
    """Where a diverged run first lost its numbers."""
    if result.get("status") != "diverged":
        return ""
    step, layer, role = (result.get(f"diverged_{part}") for part in ("at", "layer", "role"))
    place = f", first in {layer}" + (f" ({role})" if role else "") if layer else ""
    return f"at step {step}{place}" if step is not None else f"at an unknown step{place}"


def _sentence(event: Line) -> str:
    """One event of the log as a sentence."""
    place = " ".join(str(event[key]) for key in ("layer", "role") if event.get(key))
    text = f"step {event.get('step', '?')}: {event.get('event', 'event')}"
    detail = "; ".join(part for part in (str(event.get("message") or ""), place) if part)
    return f"{text} ({detail})" if detail else text
