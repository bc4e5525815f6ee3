# SPDX-License-Identifier: Apache-2.0
"""`lowbits analyze outliers`, `gradients` and `memory`: what flows through the layers, and what is kept of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbits import analysis, models, recipes
from lowbits.analysis import ChannelStatistics
from lowbits.cli._analyze_options import Options, Outcome, table
from lowbits.cli._subject import Subject, open_subject
from lowbits.errors import SpecError
from lowbits.formats import INT4, INT8
from lowbits.nn import convert_
from lowbits.quantizers import PerRow, PerTensor, QuantSpec

_GRADIENT_SPECS = {
    "int8 tensor": QuantSpec(INT8, PerTensor()),
    "int8 token": QuantSpec(INT8, PerRow()),
    "int4 tensor": QuantSpec(INT4, PerTensor()),
    "int4 token": QuantSpec(INT4, PerRow()),
}


@dataclass(frozen=True, kw_only=True)
class Outliers(Options):
    """Which input channels of which layers are far larger than the rest, and do they persist?

    One such channel sets the scale of a whole row and rounds the row's other values to 0: the reason why activations
    fail at 4 bits. A channel counts when its maximum is over 6 times the layer's median channel maximum.

    Args:
        against: an earlier checkpoint of the same model, to see whether the same channels stood out then.
    """

    against: Path | None = None

    def run(self, subject: Subject) -> Outcome:
        """Describe the input of every linear layer."""
        found = self._channels(subject)
        earlier = self._channels(open_subject(self.against, self.recipe, self.device)) if self.against else {}
        kept = analysis.overlaps(earlier, found)
        columns = ["max / median", "outliers", "kurtosis"] + ["same as earlier"] * bool(earlier)
        shown = table("input of", *columns)
        for name, s in found.items():
            same = f"{kept[name, name]:.0%}" if (name, name) in kept else "-"
            shown.add_row(name, f"{s.ratio:.1f}", str(len(s.outliers)), f"{s.kurtosis:.1f}", *[same] * bool(earlier))
        result: dict[str, object] = {
            "layers": {n: {"ratio": s.ratio, "outliers": s.outliers, "kurtosis": s.kurtosis} for n, s in found.items()},
            "overlap_between_layers": _pairs(analysis.overlaps(found, found)),
        }
        if self.against:
            result |= {"against": str(self.against), "overlap_with_earlier": _pairs(kept)}
        return Outcome(shown, result)

    def _channels(self, subject: Subject) -> dict[str, ChannelStatistics]:
        def forward(model: nn.Module, ids: Tensor) -> object:
            return model(input_ids=ids, use_cache=False)

        batches = subject.batches(self.data, self.batches, self.batch_size)
        return analysis.input_channels(subject.model, forward, batches)


def _pairs(overlaps: Mapping[tuple[str, str], float]) -> list[dict[str, object]]:
    return [{"layers": pair, "jaccard": value} for pair, value in overlaps.items()]


@dataclass(frozen=True, kw_only=True)
class Gradients(Options):
    """What would few bits do to the output gradients of each layer?

    Shares flushed to zero for 8 and 4 bits, one scale for all or one a token, and the cosine of the angle by which the
    weight gradient would turn. The gradients are those of one batch, with the model's own quantizers on.
    """

    def run(self, subject: Subject) -> Outcome:
        """Measure every layer under four quantizers."""
        batch = subject.batches(self.data, 1, self.batch_size)[0]
        found = analysis.output_gradients(subject.model, analysis.causal_loss, batch)
        shown = table("gradient of", *_GRADIENT_SPECS, "lowest cosine", title="share of the entries flushed to zero")
        layers = {}
        for name, (gradient, x) in found.items():
            rows = {key: analysis.gradient_sparsity(gradient, x, spec) for key, spec in _GRADIENT_SPECS.items()}
            lowest = min(row.weight_gradient_cosine for row in rows.values())
            shown.add_row(name, *(f"{row.zero:.1%}" for row in rows.values()), f"{lowest:.4f}")
            measured = {key: asdict(row) for key, row in rows.items()}
            layers[name] = {"share_by_decade": analysis.magnitude_histogram(gradient), **measured}
        return Outcome(shown, {"layers": layers})


@dataclass(frozen=True, kw_only=True)
class Memory(Options):
    """How much memory does a training step take, by category, and how much would it take in few bits?

    Computed from shapes alone, so the model need not exist: in the place of a run the name of a size (gpt2-small,
    llama-1b, ...) does as well.

    Args:
        micro_batches: numbers of sequences to compute for.
        length: tokens in a sequence; as in training if not given, 1024 for a named size.
        float32: train in float32 instead of bf16 autocast.
    """

    micro_batches: tuple[int, ...] = (4, 8, 16)
    length: int | None = None
    float32: bool = False

    def open(self) -> Subject:
        """Load the model, or take a named size without its weights."""
        if str(self.where) not in models.SIZES:
            return super().open()
        recipe = self.recipe or "bf16"
        with torch.device("meta"):  # shapes only: a 7B model takes no memory to ask about
            model = models.build(str(self.where), 50257, self.length or 1024, seed=0)
        convert_(model, recipes.named(recipe), verbose=False)
        return Subject(model, self.where, None, {}, recipe, torch.device("cpu"))

    def run(self, subject: Subject) -> Outcome:
        """Write the ledger of each micro-batch."""
        compute = subject.config.get("compute")
        if subject.config.get("dropout") or (isinstance(compute, dict) and compute.get("gradient_checkpointing")):
            raise SpecError(
                f"{subject.source} was trained with dropout or gradient checkpointing, for which the ledger has no "
                "rule; `memory` in the run's result.json holds what was counted."
            )
        length = self.length or subject.block
        device = "cuda" if subject.home is None else subject.device.type  # a size is asked about for a GPU
        precision = "float32" if self.float32 else "bf16 autocast"
        title = f"MiB of a training step, {length} tokens a sequence, {precision}, {subject.recipe or 'not converted'}"
        columns = ("weights", "gradients", "optimizer", "saved", "temporaries", "peak", "saved in few bits")
        shown = table("sequences", *columns, title=title)
        ledgers = []
        for batch in self.micro_batches:
            ledger = analysis.predict_memory(subject.model, batch, length, autocast=not self.float32, device=device)
            few = ledger.memory.stored_in_few_bits.saved_activations
            parts = (*asdict(ledger.memory.measured).values(), ledger.temporaries, ledger.peak, few)
            shown.add_row(str(batch), *(f"{part / 2**20:,.1f}" for part in parts))
            saved = {kind.value: nbytes for kind, nbytes in ledger.saved.items()}
            ledgers.append({"batch": batch, "peak": ledger.peak, "saved": saved} | ledger.memory.as_json())
        return Outcome(shown, {"length": length, "precision": precision, "rules_of": device, "ledgers": ledgers})
