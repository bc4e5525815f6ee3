# SPDX-License-Identifier: Apache-2.0
"""Store a trained model on a ladder of formats: each block in the smallest that its bits allow, in true bytes.

    b_t  ->  the first format of the ladder with m >= b_t - 2;   codes of `bits` bits, and an exponent byte a block

One safetensors file. Of a weight `NAME`: `NAME.rungs` (4 bits a block), `NAME.exponents` (E8M0: a byte a block, none
for BF16) and `NAME.codes` (bit streams, format after format, the blocks of each in row-major order). All other tensors
are stored as they are, or in BF16 where they were float32 matrices. What the file holds is what `load_ladder` returns;
its length is the size that is reported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbits.errors import CheckpointError, ConversionError
from lowbits.export import pack_bits, unpack_bits, write_whole
from lowbits.formats import BF16, FloatFormat
from lowbits.methods._pseudo_noise._blocks import Block, counts, elements, from_blocks, to_blocks
from lowbits.methods._pseudo_noise._formats import BY_NAME, LADDER, power_of_two, to_grid
from lowbits.methods._pseudo_noise._weight import NoisyWeight
from lowbits.nn import quantized_layers

_EXPONENT_BIAS = 127
_MARK = "lowbits-ladder-2"
FILE = "ladder.safetensors"


class Aggregate(Enum):
    """Which blocks share a format: none, or all of a layer, which then have that of the block with the most bits."""

    BLOCK = "block"
    LAYER = "layer"


@dataclass(frozen=True)
class Rung:
    """What one format holds of an exported model.

    Args:
        format: its name.
        blocks: how many blocks.
        weights: how many weights.
        bytes: of their codes and exponents.
    """

    format: str
    blocks: int
    weights: int
    bytes: int


def noisy_weights(model: nn.Module) -> dict[str, tuple[nn.Parameter, NoisyWeight]]:
    """Return the weights that a model sees through noise, by the name of the layer."""
    found = {}
    for name, layer in quantized_layers(model).items():
        if isinstance(layer.weight_fn, NoisyWeight) and isinstance(layer.weight, nn.Parameter):
            found[name] = (layer.weight, layer.weight_fn)
    return found


def weights_with_bits(model: nn.Module) -> dict[str, tuple[nn.Parameter, NoisyWeight]]:
    """Return those of them that have bit-widths: none without noise."""
    return {name: pair for name, pair in noisy_weights(model).items() if pair[1].b_i is not None}


def choose_rungs(
    bits: Tensor, aggregate: Aggregate = Aggregate.BLOCK, ladder: tuple[FloatFormat, ...] = LADDER
) -> Tensor:
    """Return the index of every block's format in the ladder, int64 [down, across].

    Args:
        bits: b_t, [down, across].
        aggregate: which blocks share a format.
        ladder: the formats, the smallest first.
    """
    if aggregate is Aggregate.LAYER:
        bits = bits.amax().expand_as(bits)
    chosen = torch.full(bits.shape, len(ladder) - 1, dtype=torch.int64)
    for place, fmt in reversed(list(enumerate(ladder))):
        chosen = torch.where(bits.cpu() <= fmt.mantissa_bits + 2, place, chosen)
    return chosen


def ladder_cast(w: Tensor, rungs: Tensor, block: Block, ladder: tuple[FloatFormat, ...] = LADDER) -> Tensor:
    """Return the weight as it will be read back from the file, float32.

    Args:
        w: [rows, columns].
        rungs: of `choose_rungs`.
        block: rows and columns of a block.
        ladder: the formats.
    """
    blocks, rungs = to_blocks(w.detach().float(), block), rungs.to(w.device)
    amax = blocks.abs().amax(-1)
    stored = blocks.to(torch.bfloat16).float()
    for place, fmt in enumerate(ladder):
        if fmt != BF16 and bool((rungs == place).any()):
            q, n = to_grid(blocks, amax, fmt)
            stored = torch.where((rungs == place).unsqueeze(-1), q * power_of_two(n, q.dtype).unsqueeze(-1), stored)
    return from_blocks(stored, w.shape, block)


def ladder_(model: nn.Module, aggregate: Aggregate = Aggregate.BLOCK, ladder: tuple[FloatFormat, ...] = LADDER) -> None:
    """Replace the weights of a model by what an exported file would hold, in place: to measure what is lost.

    Args:
        model: trained.
        aggregate: which blocks share a format.
        ladder: the formats, the smallest first; one alone is for all.
    """
    for parameter, weight in weights_with_bits(model).values():
        chosen = choose_rungs(weight.bits(), aggregate, ladder)
        parameter.data.copy_(ladder_cast(parameter, chosen, weight.plan.block, ladder))


@contextmanager
def on_the_ladder(model: nn.Module) -> Iterator[None]:
    """Give a model the weights that its exported file would hold, and take them back."""
    before = {parameter: parameter.detach().clone() for parameter, _ in weights_with_bits(model).values()}
    ladder_(model)
    try:
        yield
    finally:
        for parameter, own in before.items():
            parameter.data.copy_(own)


def ladder_sizes(
    model: nn.Module, aggregate: Aggregate = Aggregate.BLOCK, ladder: tuple[FloatFormat, ...] = LADDER
) -> list[Rung]:
    """Return what each format of the ladder holds, the smallest first; bytes of codes and exponents, exactly."""
    blocks, weights, exact = [0] * len(ladder), [0] * len(ladder), [0] * len(ladder)
    for parameter, weight in weights_with_bits(model).values():
        chosen = choose_rungs(weight.bits(), aggregate, ladder)
        sizes = elements(parameter.shape, weight.plan.block)
        for place, fmt in enumerate(ladder):
            here = chosen == place
            many, held = int(here.sum()), int(sizes[here].sum())
            blocks[place] += many
            weights[place] += held
            exact[place] += -(-held * fmt.bits // 8) + (many if fmt != BF16 else 0)
    return [Rung(fmt.name, *row) for fmt, *row in zip(ladder, blocks, weights, exact, strict=True)]


def save_ladder(
    model: nn.Module,
    path: str | Path,
    aggregate: Aggregate = Aggregate.BLOCK,
    ladder: tuple[FloatFormat, ...] = LADDER,
) -> int:
    """Write a trained model into one file and return its length in bytes.

    Args:
        model: with noisy weights.
        path: of the file; an older one is replaced as a whole.
        aggregate: which blocks share a format.
        ladder: formats of `LADDER` and `SMALLEST_LADDER`, the smallest first.
    Raises:
        ConversionError: no weight of the model has noise, so nothing says what it may be stored in.
        FormatError: a weight is not finite; names layer and block.
        RunError: the file cannot be written; an older one stands as it was.
    """
    from safetensors.torch import save

    found = weights_with_bits(model)
    if not found:
        raise ConversionError(
            "no weight of this model has noise with bit-widths; train it with GaussWS or matched DiffQ first."
        )
    tensors: dict[str, Tensor] = {}
    layout: dict[str, Any] = {"mark": _MARK, "ladder": [fmt.name for fmt in ladder], "weights": {}, "same": {}}
    stored: dict[int, str] = {}
    own = {id(parameter): weight for parameter, weight in found.values()}
    bits = {id(weight.b_i) for weight in own.values()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in stored:  # tied: an embedding and the head
            layout["same"][name] = stored[id(tensor)]
            continue
        stored[id(tensor)] = name
        if id(tensor) in own:
            weight = own[id(tensor)]
            weight.check_finite(tensor)
            rungs = choose_rungs(weight.bits(), aggregate, ladder)
            tensors |= _pack(name, tensor, rungs, weight.plan.block, ladder)
            layout["weights"][name] = [list(tensor.shape), list(weight.plan.block)]
        elif id(tensor) not in bits:
            matrix = tensor.dtype == torch.float32 and tensor.ndim >= 2
            tensors[name] = tensor.detach().to(torch.bfloat16 if matrix else tensor.dtype).cpu().contiguous().clone()
    data = save(tensors, metadata={"layout": json.dumps(layout)})
    write_whole(Path(path), data)
    return len(data)


def bit_forms(model: nn.Module) -> dict[str, AbstractContextManager[object]]:
    """Return the form of a model that its exported file would hold, `ladder`; none where there are no bits."""
    return {"ladder": on_the_ladder(model)} if weights_with_bits(model) else {}


def write_ladder(model: nn.Module, folder: Path) -> None:
    """Leave the exported file of a finished run in its folder, where there are bits."""
    if weights_with_bits(model):
        save_ladder(model, folder / FILE)


def load_ladder(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict that a file of `save_ladder` holds; exported weights as float32.

    Raises:
        CheckpointError: the file is damaged or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            layout = json.loads((file.metadata() or {}).get("layout", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no export: {error}. Export the model again.") from error
    if layout.get("mark") != _MARK or not set(layout["ladder"]) <= set(BY_NAME):
        raise CheckpointError(f"{path} is no export of this version ({_MARK}). Export the model again.")
    state: dict[str, Tensor] = {}
    ladder = tuple(BY_NAME[name] for name in layout["ladder"])
    for name, (shape, block) in layout["weights"].items():
        _check_parts(Path(path), name, tensors, (shape[0], shape[1]), (block[0], block[1]), ladder)
        state[name] = _unpack(name, tensors, (shape[0], shape[1]), (block[0], block[1]), ladder)
    state |= tensors
    return state | {name: state[other] for name, other in layout["same"].items()}


def _pack(name: str, w: Tensor, rungs: Tensor, block: Block, ladder: tuple[FloatFormat, ...]) -> dict[str, Tensor]:
    """Rungs, exponents and codes of one weight."""
    blocks = to_blocks(w.detach().float().cpu(), block).flatten(0, 1)
    amax, chosen, inside = blocks.abs().amax(-1), rungs.flatten(), _inside(w.shape, block)
    exponents, streams = [], []
    for place, fmt in enumerate(ladder):
        here = chosen == place
        if not bool(here.any()):
            continue
        if fmt == BF16:
            codes = blocks[here].to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
        else:
            q, n = to_grid(blocks[here], amax[here], fmt)
            codes = fmt.encode(q).to(torch.int32)
            exponents.append((n + _EXPONENT_BIAS).clamp(min=0).to(torch.uint8))
        streams.append(torch.from_numpy(pack_bits(codes[inside[here]].numpy(), fmt.bits)))
    nibbles = torch.from_numpy(pack_bits(chosen.numpy(), 4))
    none = torch.empty(0, dtype=torch.uint8)
    return {
        f"{name}.rungs": nibbles,
        f"{name}.exponents": torch.cat([none, *exponents]),
        f"{name}.codes": torch.cat([none, *streams]),
    }


def _check_parts(
    path: Path, name: str, tensors: dict[str, Tensor], shape: Block, block: Block, ladder: tuple[FloatFormat, ...]
) -> None:
    """Raise unless a weight's parts are there and as long as the choice of formats says."""
    parts = [tensors.get(f"{name}.{part}") for part in ("rungs", "exponents", "codes")]
    lengths, (down, across) = [-1 if part is None else part.numel() for part in parts], counts(shape, block)
    expected = [-(-down * across // 2), 0, 0]
    if parts[0] is not None and lengths[0] == expected[0]:
        chosen = torch.from_numpy(unpack_bits(parts[0].numpy(), 4, down * across).astype("int64")).view(down, across)
        sizes = elements(shape, block)
        for place, fmt in enumerate(ladder):
            expected[1] += int((chosen == place).sum()) if fmt != BF16 else 0
            expected[2] += -(-int(sizes[chosen == place].sum()) * fmt.bits // 8)
    if lengths != expected:
        raise CheckpointError(
            f"{path} is damaged: {name} has {lengths} bytes of formats, exponents and codes, and its formats ask for "
            f"{expected}. Export the model again."
        )


def _unpack(
    name: str, tensors: dict[str, Tensor], shape: tuple[int, int], block: Block, ladder: tuple[FloatFormat, ...]
) -> Tensor:
    """The inverse of `_pack`; takes its tensors out of the mapping."""
    down, across = counts(shape, block)
    nibbles, exponents, codes = (tensors.pop(f"{name}.{part}") for part in ("rungs", "exponents", "codes"))
    chosen = torch.from_numpy(unpack_bits(nibbles.numpy(), 4, down * across).astype("int64"))
    inside = _inside(shape, block)
    blocks = torch.zeros(down * across, block[0] * block[1])
    for place, fmt in enumerate(ladder):
        here = (chosen == place).unsqueeze(-1) & inside
        many, held = int((chosen == place).sum()), int(here.sum())
        length = -(-held * fmt.bits // 8)
        stream, codes = codes[:length], codes[length:]
        read = torch.from_numpy(unpack_bits(stream.numpy(), fmt.bits, held).astype("int64"))
        if fmt == BF16:
            blocks[here] = read.to(torch.int16).view(torch.bfloat16).float()
            continue
        n, exponents = exponents[:many].to(torch.int32) - _EXPONENT_BIAS, exponents[many:]
        spread = power_of_two(n, torch.float32).unsqueeze(-1).expand(-1, blocks.shape[1])[inside[chosen == place]]
        blocks[here] = fmt.decode(read.to(fmt.code_dtype)).float() * spread
    return from_blocks(blocks.view(down, across, -1), shape, block)


def _inside(shape: torch.Size | tuple[int, int], block: Block) -> Tensor:
    """Which elements of each block the matrix has, bool [blocks, elements]."""
    return to_blocks(torch.ones(tuple(shape), dtype=torch.bool), block).flatten(0, 1)
