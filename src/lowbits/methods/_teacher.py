# SPDX-License-Identifier: Apache-2.0
"""Run a teacher: without gradients, in evaluation mode, never changed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbits.errors import CheckpointError, RunError, ShapeError


class Teacher:
    """Any module as a source of logits.

    It is no `nn.Module` and so never a part of the student: no optimizer, checkpoint or `.train()` reaches it.

    Args:
        model: returns logits, or an output with `.logits`. It is put into evaluation mode; its gradients are off.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the logits of a batch; arguments are the model's."""
        if any(module.training for module in self.model.modules()):
            self.model.eval()  # somebody called .train() on it: dropout and running statistics would change
        with torch.no_grad():
            output = self.model(*args, **kwargs)
        return output if isinstance(output, Tensor) else output.logits

    def to(self, device: torch.device | str) -> Teacher:
        """Move the model, and return self.

        Args:
            device: where it is to run.
        Raises:
            RunError: it does not fit.
        """
        try:
            self.model.to(device)
        except torch.OutOfMemoryError as error:
            raise RunError(_too_large(self.num_bytes, f"memory of {device}", None)) from error
        return self

    @property
    def num_bytes(self) -> int:
        """Bytes of parameters and buffers."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    @property
    def fingerprint(self) -> str:
        """Class and a digest of names, shapes and some elements of each tensor: another teacher has another."""
        digest = hashlib.blake2b(digest_size=8)
        for name, tensor in self.model.state_dict().items():
            flat = tensor.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // 64)].cpu().double()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + some.numpy().tobytes())
        return f"{type(self.model).__name__} {digest.hexdigest()}"

    def check_vocabulary(self, student_vocabulary: int) -> None:
        """Refuse a teacher whose classes are not the student's, before any training.

        Args:
            student_vocabulary: the number of the student's classes.
        Raises:
            ShapeError: they differ.
        """
        config = getattr(self.model, "config", None)
        own = getattr(config, "vocab_size", student_vocabulary)
        if own != student_vocabulary:
            raise ShapeError(
                f"the teacher's vocabulary has {own} entries, the student's {student_vocabulary}. Prepare the data "
                "with the teacher's tokenizer (lowbits data prepare --tokenizer TEACHER), or take another teacher."
            )


def load_teacher(
    folder: str | Path, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu", auto_class: Any = None
) -> Teacher:
    """Load a teacher from a transformers folder, or say before reading it that it does not fit.

    Args:
        folder: with config.json and safetensors files.
        dtype: of its weights.
        device: where it is to run.
        auto_class: of transformers; `AutoModelForCausalLM` where it is None.
    Raises:
        CheckpointError: the folder does not exist, holds no safetensors files, or is damaged.
        RunError: the teacher is larger than the free memory of the device.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"teacher {folder}: there is no config.json. A teacher is a folder written by save_pretrained, for example "
            "runs/NAME/checkpoints/step-00000500 of `lowbits train`."
        )
    need = _parameters_on_disk(folder) * dtype.itemsize
    free = free_memory(torch.device(device))
    if free is not None and need > free:
        raise RunError(f"teacher {folder}: {_too_large(need, f'memory of {device}', free)}")
    return Teacher(_loaded(folder, dtype, auto_class)).to(device)


def _loaded(folder: Path, dtype: torch.dtype, auto_class: Any) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    auto_class = AutoModelForCausalLM if auto_class is None else auto_class
    try:
        model, report = auto_class.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"teacher {folder} cannot be loaded: {reason}; take it from a copy.") from error
    if missing := sorted(report["missing_keys"]):  # transformers would draw them at random
        raise CheckpointError(
            f"teacher {folder} lacks {len(missing)} tensors, the first is {missing[0]}; take it from a copy, or load "
            "its own kind of model with auto_class."
        )
    return model


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a device, within the process's limits; None where that cannot be known.

    Args:
        device: CPU or CUDA.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [value for value in (_available(), _control_group()) if value is not None]
    return min(found, default=None)


def _available() -> int | None:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    if "SC_AVPHYS_PAGES" in names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _control_group() -> int | None:
    """What a container may still take; its page cache counts as used there, so this errs on the safe side."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (folder / name for name in ("memory.max", "memory.current"))
        return int(limit.read_text(encoding="ascii")) - int(used.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no control group, or no limit: "max"
        return None


def _parameters_on_disk(folder: Path) -> int:
    """Count the elements in the model's safetensors files, from their headers."""
    from safetensors import SafetensorError, safe_open

    count = 0
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118, it is no dict
                    count += int(torch.Size(file.get_slice(key).get_shape()).numel())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"teacher {folder}: {path.name} is torn ({error}); take it from a copy.") from error
    return count


def _weight_files(folder: Path) -> list[Path]:
    """The files with the model's weights: a checkpoint has others, of its optimizer, beside them."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            return [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"teacher {folder}: {index.name} is damaged; take it from a copy.") from error
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(f"teacher {folder}: there is no model.safetensors; save it with save_pretrained.")
    return [folder / "model.safetensors"]


def _too_large(need: int, where: str, free: int | None) -> str:
    has = "" if free is None else f", {free / 2**30:.2f} GiB are free"
    return (
        f"it needs {need / 2**30:.2f} GiB of the {where}{has}. Load it in fewer bytes a parameter, or write its logits "
        "to a TeacherCache on a machine where it fits, and train from the cache. Nothing has been changed."
    )
