# SPDX-License-Identifier: Apache-2.0
"""What every `lowbits analyze` has in common: its options, and what it hands back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lowbits.cli._subject import Subject, open_subject
from lowbits.errors import RunError
from lowbits.train import Device


@dataclass(frozen=True)
class Outcome:
    """What an analysis found.

    Args:
        shown: for the terminal.
        result: for the JSON file.
        note: a line below the table.
    """

    shown: Table
    result: dict[str, object]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Options(ABC):
    """Options of every analysis.

    Args:
        where: the --out folder of a run (its newest checkpoint), a checkpoint, or any Hugging Face model folder.
        recipe: quantizers to see the model under, instead of those that it was trained with.
        data: a folder of `lowbits data prepare`; the run's own if not given. Its validation split is read.
        batches: validation batches.
        batch_size: sequences in a batch.
        device: auto takes CUDA where there is one.
        out: file for the JSON result, if not beside the run.
    """

    where: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]]
    recipe: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    data: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    batches: int = 4
    batch_size: int = 8
    device: Device = Device.AUTO
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None

    def __post_init__(self) -> None:
        if self.batches < 1 or self.batch_size < 1:
            raise RunError(f"batches and batch-size are at least 1, got {self.batches} and {self.batch_size}.")

    def open(self) -> Subject:
        """Load the model."""
        return open_subject(self.where, self.recipe, self.device)

    @abstractmethod
    def run(self, subject: Subject) -> Outcome:
        """Carry out the analysis."""


def table(first: str, *others: str, title: str | None = None) -> Table:
    """Return an empty table, its first column on the left and the others on the right."""
    made = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    made.add_column(first, no_wrap=True)
    for column in others:
        made.add_column(column, justify="right")
    return made
