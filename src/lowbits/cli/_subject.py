# SPDX-License-Identifier: Apache-2.0
"""Open what `lowbits analyze` is pointed at: a run, one of its checkpoints, or any Hugging Face model folder."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbits import models
from lowbits.analysis import provenance
from lowbits.data import TokenData, check_vocabulary
from lowbits.errors import CheckpointError, DataError, RunError
from lowbits.methods import Method, named
from lowbits.nn import Keep, Phase, convert_, phase_at, set_phase_, set_step_
from lowbits.train import Device, Run, load_model_, newest_intact, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS_BESIDE = "stdlib-tokens"  # where `train` and `compare` prepare the packaged default


@dataclass(frozen=True)
class Subject:
    """A model and what is known of its training.

    Args:
        model: converted as in its training, float32, in evaluation mode, on `device`.
        source: folder of the weights, or the name of a size.
        home: folder in which results are written; None if there is none.
        config: the resolved run; empty for a bare model folder.
        recipe: name of the recipe that the model is converted to, None if it is not.
        device: where it is.
        method: that the model was trained with.
    """

    model: PreTrainedModel
    source: Path
    home: Path | None
    config: dict[str, object]
    recipe: str | None
    device: torch.device
    method: Method = field(default_factory=Method)

    @property
    def block(self) -> int:
        """Tokens in a sequence: as in training, else what the model takes, at most 1024."""
        longest = getattr(self.model.config, "max_position_embeddings", 1024)
        block = self.config.get("block")
        return block if isinstance(block, int) else min(longest, 1024)

    def data(self, folder: Path | None) -> TokenData:
        """Open the given folder of tokens, or the one that the run was trained on.

        Raises:
            DataError: it is not known or not there, or does not fit the model.
        """
        trained_on = self.config.get("data")
        if folder is None and trained_on == "stdlib" and self.home is not None:
            folder = self.home.parent / _TOKENS_BESIDE
        elif folder is None and isinstance(trained_on, str):
            folder = Path(trained_on)
        if folder is None:
            raise DataError(f"{self.source} does not say what it was trained on; name tokens with --data FOLDER.")
        if not folder.is_dir():
            raise DataError(f"{folder}, the data of this run, is not there; name tokens with --data FOLDER.")
        data = TokenData.open(folder)
        check_vocabulary(data, self.model.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr, index]
        return data

    def batches(self, folder: Path | None, number: int, size: int) -> list[Tensor]:
        """Return the first validation batches, on the model's device."""
        data = self.data(folder)
        return [ids.to(self.device) for ids in data.val_batches(size, self.block, number * size)]

    def place(self, what: str, out: Path | None) -> Path | None:
        """Return where a result goes: `out`, or a file in the run's folder, or nowhere."""
        if out is not None or self.home is None:
            return out
        return self.home / "analysis" / f"{what}-{self.source.name}.json"

    def write(self, what: str, result: dict[str, object], path: Path) -> None:
        """Write a result as JSON; what is not finite becomes null.

        Raises:
            RunError: the file cannot be written.
        """
        content = {"analysis": what, "model": str(self.source), "recipe": self.recipe}
        content |= {"provenance": provenance(self.device), **result}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise RunError(f"{path} cannot be written ({error.strerror}); name another file with --out.") from error


def _finite(value: object) -> object:
    """Replace what JSON cannot hold, all the way down."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_subject(path: Path, recipe: str | None, device: Device) -> Subject:
    """Load the newest intact checkpoint of a run, a given checkpoint, or a model folder, and convert the model.

    Args:
        path: what the user pointed at.
        recipe: convert to this one instead of the run's own.
        device: where to put the model.
    Raises:
        CheckpointError: there is no model, or it is torn.
        RunError: CUDA was asked for and is absent, or the run's recipe has no name and none was given.
        UnknownNameError: no recipe has this name.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    source, home, config = _locate(path)
    name, method = recipe or _recipe_name(config, source), _method_of(config, source)
    where = chosen_device(device)
    seed = config.get("seed", 0)
    seed = seed if isinstance(seed, int) else 0
    if type(method) is Method:
        # vocabulary and length matter for fresh weights alone
        model = models.build(str(source), vocab_size=1, block=1, seed=0)
    else:
        model = models.untrained(source)
    if name is not None:
        head, split = bool(config.get("quantize_head")), bool(config.get("split_qkv"))
        run = Run(recipe=name, quantize_head=head, split_qkv=split)
        choose = run.choose(model.get_output_embeddings())
        convert_(model, choose, keep=_keep_of(config), seed=seed, verbose=False)
        set_step_(model, 0)
        phase = Phase(0) if recipe else _last_phase(config, source)
        set_phase_(model, forward=phase.forward, backward=phase.backward)
    if type(method) is not Method:
        method.prepare_(model, seed)
        load_model_(source, model)
    return Subject(model.eval().to(where), source, home, config, name, where, method)  # type: ignore[arg-type]


def _method_of(config: dict[str, Any], source: Path) -> Method:
    """The method of a run, with the values of its fields; those that came later have their defaults."""
    told = dict(config.get("method") or {"name": "none"})
    name = str(told.pop("name"))
    if ":" in name:
        raise RunError(
            f"{source} was trained with {name}, which only its Python file knows; use lowbits.analysis from Python."
        )
    default = named(name)
    values = {f.name: _as(getattr(default, f.name), told[f.name]) for f in fields(default) if f.name in told}
    return replace(default, **values)


def _as(like: object, value: Any) -> Any:
    """A value of a config in the type of the field's default."""
    if isinstance(like, Enum):
        return type(like)(value)
    if isinstance(like, Path) and value is not None:
        return Path(value)
    return tuple(value) if isinstance(value, list) else value


def _keep_of(config: dict[str, Any]) -> Keep:
    """The layers that the run kept in high precision; none for a run of before there was the option."""
    told = config.get("keep", {})
    return Keep(**{**told, "names": tuple(told.get("names", ()))})


def _last_phase(config: dict[str, Any], source: Path) -> Phase:
    """The phase of the last step before the checkpoint."""
    phases = [Phase(**told) for told in config.get("phases", ())]
    if not phases:
        return Phase(0)
    done = _read(source / "trainer.json")["progress"]["step"]  # type: ignore[index, call-overload]
    return phase_at(phases, done - 1, config["steps"])


def _locate(path: Path) -> tuple[Path, Path, dict[str, object]]:
    """Return the folder of the weights, the folder beside which to write, and the resolved run."""
    if (path / "checkpoints").is_dir():
        newest, _ = newest_intact(path / "checkpoints")
        if newest is None:
            raise CheckpointError(f"{path} has no checkpoint yet; let the run come to its first one.")
        return newest, path, _read(newest / "trainer.json").get("run", {})  # type: ignore[return-value]
    if (path / "trainer.json").is_file():
        verify(path)
        inside = path.parent.name == "checkpoints"
        return path, path.parent.parent if inside else path, _read(path / "trainer.json").get("run", {})  # type: ignore[return-value]
    if (path / "config.json").is_file():
        return path, path, {}
    what = "is no run, checkpoint or model folder" if path.is_dir() else "does not exist"
    raise CheckpointError(f"{path} {what}; name the --out folder of a run, or a folder with config.json and weights.")


def _read(path: Path) -> dict[str, object]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def _recipe_name(config: dict[str, object], source: Path) -> str | None:
    if not config:
        return None
    name = config.get("recipe")
    if name == "custom" or config.get("layers"):
        raise RunError(
            f"{source} was trained with a recipe that only its Python file knows; name one with --recipe "
            "(`lowbits recipes` lists them), or use lowbits.analysis from Python."
        )
    return str(name)


def chosen_device(wish: Device) -> torch.device:
    """Return the device that was asked for.

    Args:
        wish: auto takes CUDA where there is one.
    Raises:
        RunError: CUDA was asked for and is absent.
    """
    if wish is Device.CUDA and not torch.cuda.is_available():
        raise RunError("--device cuda was asked for, but torch sees no CUDA device here; use --device cpu or auto.")
    cuda = torch.cuda.is_available() and wish is not Device.CPU
    return torch.device("cuda" if cuda else "cpu")
