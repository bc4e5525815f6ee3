# SPDX-License-Identifier: Apache-2.0
"""Write the state of a training into a checkpoint's files and read it back, bit for bit.

Random streams and the data position are pure functions of (seed, step) and need no bytes here. Optimizer state is
stored as the optimizer stores it: codes stay codes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbits.errors import CheckpointError
from lowbits.train._run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPTIMIZER = "optimizer.safetensors"
TRAINER = "trainer.json"
LAYOUTS = "layouts"  # one entry: safetensors writes several in any order, and equal checkpoints are equal files


@dataclass
class Progress:
    """Count what a run has done; all of it goes into a checkpoint.

    Args:
        step: optimizer steps done, skipped ones too.
        tokens: tokens seen.
        seconds: training time alone, summed over resumes.
        skipped: steps left out for a non-finite loss or gradient.
        streak: how many of them came last, in a row.
        spikes: loss spikes reported.
        recent: losses of the last steps, finite ones, oldest first.
        peak_bytes: largest memory use seen.
        evaluation: `loss_on` and `loss_off` of the last evaluation; empty before the first.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    streak: int = 0
    spikes: int = 0
    recent: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    evaluation: dict[str, float | None] = field(default_factory=dict)


def save_state(
    folder: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    run: Mapping[str, object],
) -> None:
    """Write model, optimizer and progress into a folder that `transformers` can load.

    Args:
        folder: exists, empty.
        model: not wrapped.
        optimizer: of the model's parameters.
        progress: of the run.
        run: the resolved run, to recognise the checkpoint by.
    """
    from safetensors.torch import save_file
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for every checkpoint would tear the training's own apart
    model.save_pretrained(folder)
    save_file(
        _optimizer_tensors(model, optimizer), folder / OPTIMIZER, metadata={LAYOUTS: json.dumps(_layouts(optimizer))}
    )
    text = json.dumps({"progress": asdict(progress), "run": run}, indent=2, allow_nan=False)
    (folder / TRAINER).write_text(text + "\n", encoding="utf-8")


def load_state_(
    folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, run: Mapping[str, object]
) -> Progress:
    """Load a verified checkpoint into a model and its optimizer, and return the progress.

    Args:
        folder: of the checkpoint.
        model: built and converted as at the start of the run.
        optimizer: likewise.
        run: the resolved run.
    Raises:
        CheckpointError: the checkpoint is of another run or architecture.
    """
    trainer = json.loads((folder / TRAINER).read_text(encoding="utf-8"))
    from safetensors.torch import load_file

    check_same_run(folder, trainer["run"], run)
    load_model_(folder, model)
    _load_optimizer_(folder, model, optimizer, load_file(folder / OPTIMIZER))
    return Progress(**trainer["progress"])


def check_same_run(where: Path, theirs: Mapping[str, object], ours: Mapping[str, object]) -> None:
    """Refuse to continue one run with the options of another; when to save and what to watch may change.

    An option that the version of then did not have yet had the value that is its default now.

    Raises:
        CheckpointError: names the first option that differs, and both values.
    """
    theirs, ours = _flat(Run().resolved()) | _flat(theirs), _flat(ours)
    for name in sorted(theirs.keys() | ours.keys()):
        if not name.startswith(("saving.", "watching.")) and theirs.get(name) != ours.get(name):
            raise CheckpointError(
                f"{where} belongs to another run: its {name} is {theirs.get(name)!r}, asked for is {ours.get(name)!r}. "
                "Repeat its options to resume it, or choose another --out."
            )


def _flat(value: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat


def load_model_(folder: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint into the model that it was written from.

    Args:
        folder: of the checkpoint.
        model: converted and prepared as at the start of the run.
    Raises:
        CheckpointError: it lacks tensors of the model, or has others.
    """
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(path)
    try:
        report = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split()[:40])
        raise CheckpointError(f"{folder} is of another architecture: {reason}") from error
    state = model.state_dict()
    loaded = {state[name].data_ptr() for name in tensors if name in state}
    missing = [
        name for name in report.missing_keys if state[name].data_ptr() not in loaded
    ]  # a tied head is stored once
    for what, names in (("lacks", missing), ("has the unknown", report.unexpected_keys)):
        if names:
            raise CheckpointError(f"{folder} is of another architecture: it {what} {names[0]} ({len(names)} tensors).")


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters in its own order, which `state_dict` counts in."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`h.0.weight:first.codes -> tensor`; contiguous copies where a tensor is a view."""
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {
        f"{name}:{key}": value.contiguous()
        for index, name in enumerate(_names(model, optimizer))
        for key, value in state.get(index, {}).items()
    }


def _layouts(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """How each group stores its moments, in words; these go into the header of the file."""
    groups = enumerate(optimizer.state_dict()["param_groups"])
    return {f"group {i}, {key}": text for i, group in groups for key, text in group.items() if isinstance(text, str)}


def _load_optimizer_(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    from safetensors import safe_open

    with safe_open(folder / OPTIMIZER, "pt") as file:
        theirs = json.loads((file.metadata() or {}).get(LAYOUTS, "{}"))
    for key, layout in _layouts(optimizer).items():
        if theirs.get(key, layout) != layout:
            raise CheckpointError(
                f"{folder}: {key} is stored as {theirs[key]!r}, this version stores it as {layout!r}. Resume with the "
                "version of lowbits that wrote it."
            )
    numbers = {name: index for index, name in enumerate(_names(model, optimizer))}
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        name, _, part = key.rpartition(":")
        if name not in numbers:
            raise CheckpointError(f"{folder} is of another architecture: it has optimizer state for {name}.")
        state.setdefault(numbers[name], {})[part] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
