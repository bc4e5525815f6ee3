# SPDX-License-Identifier: Apache-2.0
"""`lowbits analyze sharpness` and `surface`: the loss around the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lowbits import analysis
from lowbits.cli._analyze_options import Options, Outcome, table
from lowbits.cli._subject import Subject
from lowbits.errors import RunError


@dataclass(frozen=True, kw_only=True)
class Sharpness(Options):
    """By how much does the loss rise within a small ball around the weights?

    Weights in a flat place tolerate rounding. m-sharpness: for each batch of m sequences the highest loss found within
    a relative distance rho of the weights, minus the loss at the weights; the mean over batches. Measured twice: at the
    rounded weights in ordinary arithmetic, and at the master weights with the quantizers on.

    Args:
        rho: radius of the ball, relative to the norm of all weights.
        steps: gradient steps of the inner search; one is the classical estimate, five come close to the maximum.
    """

    rho: float = 0.01
    steps: tuple[int, ...] = (1, 5)

    def run(self, subject: Subject) -> Outcome:
        """Measure both ways with each number of steps."""
        batches = subject.batches(self.data, self.batches, self.batch_size)
        shown = table("weights", "quantizers", "steps", "loss", "rise of the loss", "standard error")
        rows = []
        for steps in self.steps:
            with analysis.dequantized(subject.model) as model:
                rounded = analysis.m_sharpness(model, analysis.causal_loss, batches, rho=self.rho, steps=steps)
            master = analysis.m_sharpness(subject.model, analysis.causal_loss, batches, rho=self.rho, steps=steps)
            for weights, quantizers, found in (("rounded", "off", rounded), ("master", "on", master)):
                numbers = (f"{x:.4f}" for x in (found.loss, found.value, found.standard_error))
                shown.add_row(weights, quantizers, str(steps), *numbers)
                rows.append({"weights": weights, "quantizers": quantizers, **asdict(found)})
        return Outcome(shown, {"batch_size": self.batch_size, "results": rows})


@dataclass(frozen=True, kw_only=True)
class Surface(Options):
    """Cut a plane through the loss around the weights, along two random filter-normalised directions.

    The same seed cuts two models of one architecture along the same directions, so that their pictures compare. Taken
    at the rounded weights with the quantizers off. Writes an HTML heat map beside the JSON file.

    Args:
        span: how far to go either way; 1 moves each row of weights by its own norm.
        points: points an axis, odd.
        seed: of the two directions.
    """

    span: float = 1.0
    points: int = 21
    seed: int = 0

    def run(self, subject: Subject) -> Outcome:
        """Evaluate the grid, print the two axes and draw the whole."""
        batches = subject.batches(self.data, self.batches, self.batch_size)
        with analysis.dequantized(subject.model) as model:
            first, second = (analysis.filter_normalised_direction(model, 2 * self.seed + i) for i in (0, 1))
            found = analysis.loss_surface(
                model, analysis.causal_loss, batches, (first, second), span=self.span, points=self.points
            )
        middle, every = self.points // 2, max(1, self.points // 10)
        shown = table("loss along", *(f"{c:+.2f}" for c in found.coordinates[::every]))
        for name, line in (("d1", [row[middle] for row in found.losses]), ("d2", list(found.losses[middle]))):
            shown.add_row(name, *(f"{x:.3f}" for x in line[::every]))
        return Outcome(
            shown, {"seed": self.seed, "batch_size": self.batch_size, **asdict(found)}, self._draw(subject, found)
        )

    def _draw(self, subject: Subject, found: analysis.Surface) -> str:
        place = subject.place("surface", self.out)
        if place is None:
            return ""
        page = place.with_suffix(".html")
        picture = analysis.heat_map(found, f"{subject.recipe or 'high precision'}, {subject.source.name}")
        try:
            page.parent.mkdir(parents=True, exist_ok=True)
            picture.write_html(page, include_plotlyjs=True)
        except OSError as error:
            raise RunError(f"{page} cannot be written ({error.strerror}); name another file with --out.") from error
        return f"drew {page}"
