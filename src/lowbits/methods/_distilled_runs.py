# SPDX-License-Identifier: Apache-2.0
"""What quantized distillation and differentiable quantization have in common in a run of `lowbits train`."""

from __future__ import annotations

import copy
import math
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lowbits.errors import DataError, RunError, ShapeError
from lowbits.export import Buckets, Coding, coded_sizes
from lowbits.methods._contract import Table
from lowbits.methods._distillation_loss import Mixing, TopK, distillation_loss
from lowbits.methods._levels import Levels
from lowbits.methods._quantized_weights import Choose
from lowbits.methods._teacher import Teacher, load_teacher
from lowbits.methods._teacher_cache import CacheSettings, TeacherCache, content_keys
from lowbits.methods._weight_views import coded_model, viewed
from lowbits.nn import Recipe, quantized_layers
from lowbits.quantizers import PerBlock, PerGroup, PerRow, PerTensor

SELF, NONE, CACHED = "self", "none", "cached"
_SOURCE = "_distillation_source"
FILE = "coded.safetensors"
UNQUANTIZED = 32  # bits of weights that stay as they are


class Cut(Enum):
    """How weights are cut into buckets that share a range.

    - BUCKET: consecutive elements of the flattened tensor, as published;
    - GROUP: consecutive elements of a row, so that removing a row moves no other;
    - ROW: a whole row;
    - TENSOR: a whole tensor.
    """

    BUCKET = "bucket"
    GROUP = "group"
    ROW = "row"
    TENSOR = "tensor"

    def buckets(self, size: int) -> Buckets:
        """Return the granularity.

        Args:
            size: of a bucket or a group.
        """
        match self:
            case Cut.BUCKET:
                return PerBlock(size)
            case Cut.GROUP:
                return PerGroup(size)
            case Cut.ROW:
                return PerRow()
            case Cut.TENSOR:
                return PerTensor()


class Ends(Enum):
    """Whether the first and the last layer, embedding and output head, are quantized too."""

    QUANTIZED = "quantized"
    KEPT = "kept"


def levels_of(model: nn.Module, levels: Levels, ends: Ends) -> Levels | Choose:
    """Return what `quantize_weights_` takes: all weights, or all but embeddings and head.

    Args:
        model: a causal language model of transformers.
        levels: of every weight.
        ends: whether embeddings and head are quantized.
    """
    if ends is Ends.QUANTIZED:
        return levels
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None

    def choose(name: str, module: nn.Module, parameter: nn.Parameter) -> Levels | None:
        return None if isinstance(module, nn.Embedding) or module is head else levels

    return choose


class Source:
    """Where a run's soft targets come from: a teacher, a cache, or both.

    It is no module: the student's optimizer and checkpoints never see it.

    Args:
        teacher: or None.
        cache: read first, and filled where there is a teacher; or None.
    """

    def __init__(self, teacher: Teacher | None, cache: TeacherCache | None) -> None:
        self.teacher, self.cache = teacher, cache

    def __call__(self, ids: Tensor) -> Tensor | TopK:
        """Return the teacher's view of each next token, for all positions but the last."""
        if self.cache is None:
            return self.logits(ids)
        keys = content_keys(ids)
        if self.teacher is not None and self.cache.missing(keys):
            self.cache.append(keys, self.logits(ids))
        top = self.cache.read(keys)
        log_probs, classes, rest = (part.to(ids.device) for part in (top.log_probs, top.classes, top.rest))
        return TopK(log_probs, classes, rest, top.num_classes, top.temperature)

    def logits(self, ids: Tensor) -> Tensor:
        """Return the teacher's own, whatever is cached."""
        assert self.teacher is not None
        if next(self.teacher.model.parameters()).device != ids.device:
            self.teacher.to(ids.device)
        return self.teacher(input_ids=ids, use_cache=False)[:, :-1]


def attach_source_(model: nn.Module, words: str, folder: str, k: int, temperature: float) -> None:
    """Give a student its teacher, before anything is quantized.

    Args:
        model: the student, converted; a causal language model of transformers.
        words: `self` for its own weights as they are now, in high precision; `none`; `cached`; or a folder.
        folder: of the cache, or empty.
        k: classes that a new cache keeps.
        temperature: of the targets.
    Raises:
        RunError: the words contradict each other, or the teacher does not fit the memory.
        ShapeError: the teacher, or the cached one, has another vocabulary.
        DataError: the cache is empty or damaged, or of another teacher or temperature.
    """
    if folder and words == NONE:
        raise RunError("distillation: a cache is of a teacher, and there is none; leave cache or teacher=none out.")
    if words == CACHED and not folder:
        raise RunError("distillation: teacher=cached needs cache=FOLDER, which an earlier run with a teacher filled.")
    if folder and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1 and words != CACHED:
        raise RunError("distillation: one process can write a cache; fill it in one, then train with teacher=cached.")
    if words == SELF and not getattr(getattr(model, "config", None), "_name_or_path", ""):
        raise RunError(
            "distillation: teacher=self, but the model has fresh weights, which know nothing. Take a trained one as "
            "the student (--model FOLDER), or name a teacher: --teacher FOLDER, or none for labels alone."
        )
    vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", 0))
    teacher, cache = None, None
    if words == SELF:
        teacher = Teacher(_in_high_precision(copy.deepcopy(model)))
    elif words not in (NONE, CACHED):
        teacher = load_teacher(words)
    if teacher is not None:
        teacher.check_vocabulary(vocabulary)
        if folder:
            settings = CacheSettings(teacher.fingerprint, vocabulary, min(k, vocabulary), temperature)
            cache = TeacherCache.create(folder, settings)
    elif words == CACHED:
        cache = _filled_cache(Path(folder), vocabulary, temperature)
    setattr(model, _SOURCE, None if words == NONE else Source(teacher, cache))


def _filled_cache(folder: Path, vocabulary: int, temperature: float) -> TeacherCache:
    """Open a cache that is all that a run learns from, and say before training what is wrong with it."""
    cache = TeacherCache(folder)
    told = cache.settings
    if not len(cache):
        raise DataError(f"{folder} is empty; fill it with a run that has the teacher: teacher=FOLDER cache={folder}.")
    if told.num_classes != vocabulary:
        raise ShapeError(
            f"the teacher in {folder} has {told.num_classes} classes, the student {vocabulary}: their vocabularies "
            "differ. Fill a cache with a teacher of the student's tokenizer."
        )
    if told.temperature != temperature:
        raise DataError(
            f"{folder} was written at temperature {told.temperature}, the run wants {temperature}. Take "
            f"temperature={told.temperature}, or fill another cache."
        )
    return cache


def mixed_loss(model: nn.Module, ids: Tensor, mixing: Mixing) -> Tensor:
    """Return the loss of a causal language model with its attached teacher.

    Args:
        model: the student, perhaps wrapped by DDP.
        ids: int64, [batch, length].
        mixing: weight of the teacher and temperature.
    """
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    source: Source | None = getattr(getattr(model, "module", model), _SOURCE)
    if source is None:
        return distillation_loss(logits, logits, ids[:, 1:], Mixing(0.0))
    return distillation_loss(logits, source(ids), ids[:, 1:], mixing)


def teacher_loss(model: nn.Module, ids: Tensor, mixing: Mixing) -> Tensor:
    """Return the loss as `mixed_loss` does, without the cache: of labels alone where there is no teacher.

    Args:
        model: the student.
        ids: int64, [batch, length].
        mixing: weight of the teacher and temperature.
    """
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    source: Source | None = getattr(model, _SOURCE)
    if source is None or source.teacher is None:
        return distillation_loss(logits, logits, ids[:, 1:], Mixing(0.0))
    return distillation_loss(logits, source.logits(ids), ids[:, 1:], mixing)


def size_table(model: nn.Module) -> Table:
    """Return where the bytes of the finished model would be, packed and Huffman-coded.

    Args:
        model: with quantized weights.
    """
    coded = coded_model(model)
    found = {coding: coded_sizes(coded, coding) for coding in Coding}
    parts = ("codes", "begins", "ranges", "points", "lengths", "plain", "header", "file", "dense")
    rows: list[tuple[str | float | None, ...]] = [
        (part, *(float(getattr(sizes, part)) for sizes in found.values())) for part in parts
    ]
    rows.append(("times smaller than dense", *(round(sizes.ratio, 3) for sizes in found.values())))
    source: Source | None = getattr(model, _SOURCE, None)
    if source is not None and source.teacher is not None:
        full = 4 * sum(p.numel() for p in source.teacher.model.parameters())
        rows.append(("times smaller than the teacher in float32", *(round(full / x.file, 3) for x in found.values())))
    rows.append(("bits a coded weight", *(round(sizes.bits_a_weight, 4) for sizes in found.values())))
    note = (
        "Bytes of the file that lowbits.export.save_coded writes for this model; the Huffman-coded one is "
        f"{FILE} in the run's folder. Begins, lengths: of the Huffman code."
    )
    return Table("Size of the model", ("part", *(coding.value for coding in found)), tuple(rows), note)


def weight_metrics(model: nn.Module) -> dict[str, float]:
    """Return the relative error of the quantized weights and the entropy of their codes.

    Args:
        model: with quantized weights.
    """
    error = norm = 0.0
    counts = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        for place, view in viewed(model):
            coded = view.coded(place.parameter)
            error += (coded.dequantize() - place.parameter).double().square().sum().item()
            norm += place.parameter.double().square().sum().item()
            new = torch.bincount(coded.codes.reshape(-1).long()).cpu()
            size = max(len(counts), len(new))
            counts = pad(counts, (0, size - len(counts))) + pad(new, (0, size - len(new)))
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * shares.log2()).sum().item() + 0.0
    return {"relative error of weights": math.sqrt(error / max(norm, 1e-300)), "entropy of codes, bits": entropy}


def _in_high_precision(model: nn.Module) -> nn.Module:
    for layer in quantized_layers(model).values():
        layer.recipe = Recipe()
    return model
