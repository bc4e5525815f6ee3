# SPDX-License-Identifier: Apache-2.0
"""Write a model whose weights lie on few points into one file, and read it back bit for bit.

The file is a safetensors file:

    codes/NAME    uint8    packed in ceil(log2 L) bits each, or a Huffman stream
    begins/NAME   uint64   where each 4,096 symbols of the stream begin (Huffman alone)
    low/NAME      float32  [B]; float64 for a weight in float64
    high/NAME     likewise
    points/NAME   likewise, [L], where the points were learned
    lengths       uint8    bits of each symbol's code; one code for all tensors (Huffman alone)
    plain/NAME    any      what is not coded

and its one entry of metadata a JSON text: shapes, buckets, ties, SHA-256 of every tensor and of this text itself.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbits.errors import CheckpointError, FormatError
from lowbits.export._bits import bit_width, pack_bits, unpack_bits
from lowbits.export._disk import write_whole
from lowbits.export._huffman import CHUNK, HuffmanCode
from lowbits.export._points import Buckets, PointTensor
from lowbits.export._sizes import Sizes, measure
from lowbits.quantizers import PerBlock, PerGroup, PerRow, PerTensor

FORMAT = "lowbits-points-1"
_KEY = "lowbits"
_BUCKETS: dict[str, type[Buckets]] = {kind.__name__: kind for kind in (PerTensor, PerRow, PerBlock, PerGroup)}


class Coding(Enum):
    """How codes become bytes."""

    PACKED = "packed"
    HUFFMAN = "huffman"


@dataclass(frozen=True)
class CodedModel:
    """The weights of a model, some of them on few points.

    Args:
        coded: weights on few points, by name.
        plain: everything else of the state dict.
        ties: names that are another name's tensor.
    """

    coded: Mapping[str, PointTensor]
    plain: Mapping[str, Tensor]
    ties: Mapping[str, str] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights as ordinary tensors, under the names of the model before it was quantized."""
        found = {**self.plain, **{name: coded.dequantize() for name, coded in self.coded.items()}}
        return {**found, **{alias: found[name] for alias, name in self.ties.items()}}

    def counts(self) -> list[int]:
        """Return how often each code occurs, over all tensors."""
        largest = max((coded.points.numel() for coded in self.coded.values()), default=1)
        total = sum(torch.bincount(c.codes.reshape(-1), minlength=largest).cpu() for c in self.coded.values())
        return total.tolist() if isinstance(total, Tensor) else []


def save_coded(path: str | Path, model: CodedModel, coding: Coding = Coding.HUFFMAN) -> Sizes:
    """Write a model, and say where the bytes are.

    Args:
        path: of the file; an older one is replaced when the new one is complete.
        model: what to write.
        coding: of the codes.
    Returns:
        The `Sizes`; `sizes.file` is the size of the file.
    Raises:
        FormatError: nothing is coded, or two tensors have one name.
        RunError: the file cannot be written.
    """
    data, sizes = _serialized(model, dict(_parts(model, coding, _stream)))
    write_whole(Path(path), data)
    return sizes


def coded_sizes(model: CodedModel, coding: Coding = Coding.HUFFMAN) -> Sizes:
    """Return what `save_coded` would, from the counts of the codes alone, and write nothing.

    Args:
        model: what would be written.
        coding: of the codes.
    """
    return _serialized(model, dict(_parts(model, coding, _blank)))[1]


def load_coded(path: str | Path) -> CodedModel:
    """Read and check a file of `save_coded`; needs no training code.

    Args:
        path: of the file.
    Raises:
        CheckpointError: it is missing, torn, altered, or of another kind; names the file and the tensor.
    """
    path = Path(path)
    tensors, manifest = _verified(path)
    code = HuffmanCode(tuple(tensors["lengths"].tolist())) if "lengths" in tensors else None
    try:
        coded = {name: _point_tensor(name, entry, tensors, code) for name, entry in manifest["coded"].items()}
    except (FormatError, CheckpointError) as error:
        raise CheckpointError(f"{path} cannot be decoded: {error}") from error
    plain = {key.removeprefix("plain/"): t for key, t in tensors.items() if key.startswith("plain/")}
    return CodedModel(coded, plain, manifest["ties"])


def _serialized(model: CodedModel, tensors: dict[str, Tensor]) -> tuple[bytes, Sizes]:
    from safetensors.torch import save

    entries = {
        name: {
            "shape": list(c.codes.shape),
            "dtype": str(c.dtype).removeprefix("torch."),
            "levels": c.points.numel(),
            "learned": c.learned,
            "transposed": c.transposed,
            "buckets": [type(c.buckets).__name__, *vars(c.buckets).values()],
        }
        for name, c in model.coded.items()
    }
    coding = Coding.HUFFMAN if "lengths" in tensors else Coding.PACKED
    digests = {key: _digest(tensor) for key, tensor in sorted(tensors.items())}
    manifest = {"format": FORMAT, "coding": coding.value, "coded": entries, "ties": dict(model.ties), "sha256": digests}
    text = json.dumps(manifest, sort_keys=True)
    # One entry: safetensors writes several in an order that changes from run to run.
    sealed = json.dumps({"manifest": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})
    data = save(tensors, {_KEY: sealed})
    return data, measure(tensors, len(data), model.counts(), _dense_bytes(model))


_Encode = Callable[[PointTensor, HuffmanCode | None], tuple[np.ndarray, np.ndarray]]


def _stream(coded: PointTensor, code: HuffmanCode | None) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of the codes, and where the chunks of a Huffman stream begin."""
    codes = coded.codes.reshape(-1).cpu().numpy()
    if code is None:
        return pack_bits(codes, bit_width(coded.points.numel())), np.empty(0, np.uint64)
    return code.encode(codes)


def _blank(coded: PointTensor, code: HuffmanCode | None) -> tuple[np.ndarray, np.ndarray]:
    """As many zeros."""
    elements = coded.codes.numel()
    if code is None:
        return np.zeros(-(-elements * bit_width(coded.points.numel()) // 8), np.uint8), np.empty(0, np.uint64)
    counts = torch.bincount(coded.codes.reshape(-1), minlength=len(code.lengths)).tolist()
    return np.zeros(-(-code.bits(counts) // 8), np.uint8), np.zeros(-(-elements // CHUNK), np.uint64)


def _parts(model: CodedModel, coding: Coding, encode: _Encode) -> Iterator[tuple[str, Tensor]]:
    if not model.coded:
        raise FormatError("no weight is on few points; quantize some before saving, or write an ordinary checkpoint.")
    if twice := set(model.coded) & set(model.plain):
        raise FormatError(f"{sorted(twice)[0]} is both coded and plain; leave it out of one of them.")
    code = HuffmanCode.of_counts(model.counts()) if coding is Coding.HUFFMAN else None
    if code is not None:
        yield "lengths", torch.tensor(code.lengths, dtype=torch.uint8)
    for name, coded in model.coded.items():
        stream, begins = encode(coded, code)
        if code is not None:
            yield f"begins/{name}", torch.from_numpy(begins)
        yield f"codes/{name}", torch.from_numpy(stream)
        yield f"low/{name}", coded.low.cpu().clone()
        yield f"high/{name}", coded.high.cpu().clone()
        if coded.learned:
            yield f"points/{name}", coded.points.cpu().clone()
    for name, tensor in model.plain.items():
        yield f"plain/{name}", tensor.detach().cpu().clone().contiguous()


def _dense_bytes(model: CodedModel) -> int:
    coded = sum(c.codes.numel() * c.dtype.itemsize for c in model.coded.values())
    return coded + sum(tensor.nbytes for tensor in model.plain.values())


def _verified(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a file, and its manifest, each compared with its SHA-256."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; write it with lowbits.export.save_coded.")
    try:
        with safe_open(path, framework="pt") as file:
            sealed = (file.metadata() or {}).get(_KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is torn or no safetensors file ({error}); take it from a copy.") from error
    if sealed is None:
        raise CheckpointError(f"{path} was not written by lowbits.export.save_coded; load it with safetensors.")
    try:
        outer = json.loads(sealed)
        text, digest = outer["manifest"], outer["sha256"]
        manifest = json.loads(text) if hashlib.sha256(text.encode()).hexdigest() == digest else None
    except (ValueError, KeyError, TypeError, AttributeError):
        manifest = None
    if manifest is None:
        raise CheckpointError(f"{path} was altered: its manifest does not have its SHA-256; take it from a copy.")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path} is of format {manifest['format']}, this version reads {FORMAT}.")
    for key in sorted(set(tensors) | set(manifest["sha256"])):
        if key not in tensors or manifest["sha256"].get(key) != _digest(tensors[key]):
            raise CheckpointError(f"{path} was altered: {key} does not have its SHA-256; take it from a copy.")
    return tensors, manifest


def _point_tensor(
    name: str, entry: dict[str, Any], tensors: Mapping[str, Tensor], code: HuffmanCode | None
) -> PointTensor:
    levels, shape = entry["levels"], entry["shape"]
    stream, total = tensors[f"codes/{name}"].numpy(), math.prod(shape)
    if code is None:
        codes = unpack_bits(stream, bit_width(levels), total)
    else:
        codes = code.decode(stream, tensors[f"begins/{name}"].numpy(), total)
    if codes.size and int(codes.max()) >= levels:
        raise CheckpointError(f"{name} has {levels} levels, but a code is {int(codes.max())}.")
    small = torch.from_numpy(codes.astype(np.uint8 if levels <= 256 else np.int32)).view(shape)
    kind, *sizes = entry["buckets"]
    learned = entry["learned"]
    dtype = getattr(torch, entry["dtype"])
    low, high = tensors[f"low/{name}"], tensors[f"high/{name}"]
    points = tensors[f"points/{name}"] if learned else even_points(levels, low.dtype)
    return PointTensor(small, points, low, high, _BUCKETS[kind](*sizes), dtype, learned, entry["transposed"])


def even_points(levels: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Return 0, 1/n, ..., 1 with n = levels - 1.

    Args:
        levels: at least 2.
        dtype: of the result.
        device: of the result.
    """
    return (torch.arange(levels, dtype=dtype) / (levels - 1)).to(device)  # CUDA rounds this division differently


def _digest(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + data).hexdigest()
