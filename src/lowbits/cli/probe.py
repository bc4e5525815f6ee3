# SPDX-License-Identifier: Apache-2.0
"""`lowbits probe WHAT`: rank the layers of a model by what a recipe does to them, and propose which to keep."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from lowbits import analysis, models, recipes
from lowbits.analysis import LayerProbe, Whole
from lowbits.cli._analyze_options import Options, Outcome, table
from lowbits.cli._options import parse
from lowbits.cli._probe_picture import picture
from lowbits.cli._subject import Subject, chosen_device, open_subject
from lowbits.data import TokenData
from lowbits.errors import ConversionError, DataError, RunError
from lowbits.nn import Keep, convert_, quantized_layers, set_step_

__all__ = ["Probe", "main"]

_DEFAULT = "nvfp4"
_PUBLISHED = 0.15  # of the linear layers, mostly the last blocks (arXiv:2509.25149, sec. 4.1)
_NOTHING, _PROPOSAL, _LAST = "nothing kept", "the proposal kept", "the last 15 % of the blocks kept"
_EXAMPLES = """  lowbits probe runs/demo/bf16/seed-0 --recipe nvfp4
  lowbits probe runs/demo/bf16/seed-0 --recipe mxfp4 --share 0.1 --batches 8
  lowbits probe gpt2-nano --data runs/demo/stdlib-tokens"""


@dataclass(frozen=True, kw_only=True)
class Probe(Options):
    """Which layers does a recipe hurt most, and which should stay in high precision?

    Runs real batches in high precision and computes the three GEMMs of every layer a second time as the recipe says:
    the relative errors of Y (fprop), dX (dgrad) and dW (wgrad). The error of dW is what the NVFP4 paper ranks layers
    by; the worst that fit into --share of the FLOPs are proposed, ready to be given to `lowbits train`. Then the
    whole model is run with none, those, and the last 15 % of the blocks kept, so that the proposal can be judged.

    In the place of a run the name of a size (gpt2-nano, ...) does as well, with --data; its weights are fresh, and
    layers of a trained model may rank differently: a checkpoint of a short run in bf16 tells more.

    Writes `<run>/analysis/probe-<checkpoint>.json` and a picture beside it.

    Args:
        share: of the FLOPs of all layers under the recipe that may stay in high precision, 0 to 1.
        length: tokens in a sequence; as in training if not given, 128 for a named size.
    """

    share: float = _PUBLISHED
    length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise RunError(f"share is a part of the FLOPs between 0 and 1, got {self.share}.")
        if self.length is not None and self.length < 2:
            raise RunError(f"length is at least 2 tokens, got {self.length}.")

    def open(self) -> Subject:
        """Load the model, or make a named size with fresh weights, and convert all its layers."""
        if str(self.where) in models.SIZES:
            return self._fresh()
        subject = open_subject(self.where, self.recipe, self.device)
        if subject.recipe is None or (self.recipe is None and recipes.named(subject.recipe).plain):
            convert_(subject.model, recipes.named(_DEFAULT), verbose=False)
            set_step_(subject.model, 0)
            subject = replace(subject, recipe=_DEFAULT)
        _check_recipe(str(subject.recipe))
        return subject if self.length is None else replace(subject, config={**subject.config, "block": self.length})

    def _fresh(self) -> Subject:
        recipe, length = self.recipe or _DEFAULT, self.length or 128
        _check_recipe(recipe)
        if self.data is None:
            raise DataError(
                f"{self.where} is a size, so it has no data of its own; name tokens with --data FOLDER "
                "(`lowbits data prepare stdlib --out FOLDER` makes some)."
            )
        vocabulary = TokenData.open(self.data).vocab_size
        model = models.build(str(self.where), vocabulary, length, seed=0)
        convert_(model, recipes.named(recipe), verbose=False)
        device = chosen_device(self.device)
        return Subject(model.eval().to(device), self.where, None, {"block": length}, recipe, device)  # type: ignore[arg-type]

    def run(self, subject: Subject) -> Outcome:
        """Probe, propose, and judge the proposal."""
        batches = subject.batches(self.data, self.batches, self.batch_size)
        found, wholes, kept, published = self._measure(subject, batches)
        names = list(analysis.linear_layers(subject.model))
        patterns = analysis.as_patterns(kept, names)
        share = sum(found[name].flops_share for name in kept)
        shares = {_PROPOSAL: share, _LAST: sum(found[name].flops_share for name in published if name in found)}
        result: dict[str, object] = {
            "batches": len(batches),
            "batch_size": self.batch_size,
            "layers": {name: asdict(layer) for name, layer in found.items()},
            "keep": {"names": patterns, "layers": kept, "flops_share": share, "share_asked_for": self.share},
            "last_blocks": {"layers": published, "flops_share": shares[_LAST]},
            "whole_model": {name: asdict(whole) for name, whole in wholes.items()},
        }
        advice = [*self._advice(subject, patterns, share), *_unsettled(found, kept, len(batches))]
        lines = [*_judged(wholes, shares), "", *advice, *self._draw(subject, found, kept)]
        return Outcome(_ranking(found, kept), result, "\n".join(lines))

    def _measure(
        self, subject: Subject, batches: Sequence[Tensor]
    ) -> tuple[dict[str, LayerProbe], dict[str, Whole], list[str], list[str]]:
        model, loss, published = subject.model, analysis.causal_loss, list[str]()
        with suppress(ConversionError):  # a model without a list of blocks
            published = list(Keep(last=_PUBLISHED).layers(model))
        layers = len(quantized_layers(model))
        with _progress() as bar:
            task = bar.add_task("layers", total=layers * len(batches))
            found = analysis.probe_layers(model, loss, batches, lambda: bar.advance(task))
            kept = analysis.propose_keep(found, self.share)
            variants = {_NOTHING: [], _PROPOSAL: kept} | ({_LAST: published} if published else {})
            task = bar.add_task("whole model", total=(1 + len(variants)) * len(batches))
            wholes = analysis.probe_model(model, loss, batches, variants, lambda: bar.advance(task))
        return found, wholes, kept, published

    def _advice(self, subject: Subject, patterns: Sequence[str], share: float) -> list[str]:
        if not patterns:
            return [f"No layer fits into {self.share:.0%} of the FLOPs; allow more with --share."]
        words = " ".join(shlex.quote(pattern) for pattern in patterns)
        lines = [f"proposal: {share:.1%} of the FLOPs under the recipe would stay in high precision"]
        lines.append(f"  lowbits train --recipe {subject.recipe} --keep.names {words}")
        if str(self.where) in models.SIZES:
            lines.append("The weights are fresh: probe a checkpoint of a short run before you rely on it.")
        return lines

    def _draw(self, subject: Subject, found: Mapping[str, LayerProbe], kept: Sequence[str]) -> list[str]:
        place = subject.place("probe", self.out)
        if place is None:
            return []
        page = place.with_suffix(".html")
        title = f"{subject.recipe}: relative error of each layer's outputs, {subject.source.name}"
        try:
            page.parent.mkdir(parents=True, exist_ok=True)
            picture(found, kept, title).write_html(page, include_plotlyjs=True)
        except OSError as error:
            raise RunError(f"{page} cannot be written ({error.strerror}); name another file with --out.") from error
        return [f"drew {page}"]


def main(arguments: Sequence[str]) -> int:
    """Run `lowbits probe`.

    Args:
        arguments: the words after it.

    Returns:
        0; errors are raised.
    """
    options = parse(Probe, arguments, prog="lowbits probe", examples=_EXAMPLES)
    subject = options.open()
    outcome = options.run(subject)
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    console.print(outcome.shown)
    console.print(escape(outcome.note), soft_wrap=True)
    path = subject.place("probe", options.out)
    if path is not None:
        subject.write("probe", outcome.result, path)
        console.print(f"wrote {path}", soft_wrap=True, markup=False)
    return 0


def _check_recipe(name: str) -> None:
    if recipes.named(name).plain:
        raise RunError(f"recipe {name} quantizes no GEMM, so there is nothing to probe; take {_DEFAULT}.")


def _progress() -> Progress:
    """On stderr, so that the table can be piped; gone when it is over."""
    columns = TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _ranking(found: Mapping[str, LayerProbe], kept: Sequence[str]) -> Table:
    """The layers, the worst first."""
    columns = ("dW (wgrad)", "+-", "dX (dgrad)", "Y (fprop)", "FLOPs", "keep")
    shown = table("layer", *columns, title="relative error of what the layer's GEMMs return")
    for name in sorted(found, key=lambda name: -found[name].wgrad):
        layer = found[name]
        spread = "" if layer.wgrad_deviation != layer.wgrad_deviation else f"{layer.wgrad_deviation:.4f}"
        errors = (f"{layer.wgrad:.4f}", spread, f"{layer.dgrad:.4f}", f"{layer.fprop:.4f}")
        shown.add_row(name, *errors, f"{layer.flops_share:.1%}", "keep" if name in kept else "")
    return shown


def _unsettled(found: Mapping[str, LayerProbe], kept: Sequence[str], batches: int) -> list[str]:
    """Say so where the batches do not tell the last layer that is kept from the first one that is not."""
    last = min(kept, key=lambda name: found[name].wgrad, default=None)
    others = [name for name in found if name not in kept]
    first = max(others, key=lambda name: found[name].wgrad, default=None)
    if last is None or first is None:
        return []
    variance = (found[last].wgrad_deviation ** 2 + found[first].wgrad_deviation ** 2) / batches
    if abs(found[last].wgrad - found[first].wgrad) > 2 * variance**0.5:
        return []
    told = f"{batches} batches do not tell {last} (kept) from {first} (not kept)"
    return [f"{told}; --batches {4 * batches} halves the noise."]


def _judged(wholes: Mapping[str, Whole], shares: Mapping[str, float]) -> list[str]:
    """The whole model under the recipe, line by line."""
    width = max(map(len, wholes)) + 16
    base = wholes["high precision"].loss
    lines = ["the whole model:"]
    for name, whole in wholes.items():
        label = f"{name} ({shares[name]:.1%})" if name in shares else name
        change = "" if name == "high precision" else f" ({whole.loss - base:+.4f})"
        error = "" if name == "high precision" else f"   error of all weight gradients {whole.gradient_error:.4f}"
        lines.append(f"  {label:<{width}} loss {whole.loss:.4f}{change:<10}{error}")
    return lines
