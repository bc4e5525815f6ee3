# SPDX-License-Identifier: Apache-2.0
"""How fast tensors are quantized, in GB/s of the bytes that must move, beside a copy; with `--peers` torchao's ways.

    python benchmarks/quantize.py --peers
    python benchmarks/quantize.py --only "int8 row" nvfp4 --sizes 16384x4096

Bytes that must move: x once for each read below, each result once, scales included.

- One read where every scale belongs to a group or a tile, or to a row of x along k: a program can hold it.
- Two where a scale belongs to a column, to all of x, or to both rows and columns: one for the largest magnitudes,
  one to quantize. NVFP4's outer scale is one of all of x.

A tensor that fits into the cache (weights) is read the second time from there, so a share of a copy may pass 1. x is
[R, K] bfloat16, random normal; `along k` is what fprop contracts, `along r` the transposed copy for wgrad. `host` is
the time until the call returns: on CUDA the rates are the device's alone. On a CPU the definition runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from measuring import (
    FAILURES,
    Report,
    Row,
    copy_gb_per_s,
    device_ms,
    first_line,
    host_ms,
    missing,
    number,
    parser,
    sizes,
)
from torch import Tensor

from lowbits.formats import E4M3, INT8
from lowbits.kernels import pack_operand, quantize_both, quantize_operand, unpack_operand
from lowbits.kernels._units import kernels
from lowbits.nn import Recipe
from lowbits.quantizers import (
    Noise,
    PackedTensor,
    PerGroup,
    PerRow,
    PerTensor,
    PerTile,
    PowerOfTwo,
    QTensor,
    QuantSpec,
    ReciprocalAmax,
    TwoLevel,
    quantize,
)
from lowbits.recipes import named

CUDA_SIZES = ("16384x2048", "16384x5632", "16384x4096", "16384x14336", "5632x2048", "14336x4096")
CPU_SIZES = ("512x512", "704x256")
WEIGHTS = ("5632x2048", "14336x4096", "704x256")  # what a weight's own blocks are measured on
ROWS = {
    "int8 row": QuantSpec(INT8, PerRow()),
    "fp8 row": QuantSpec(E4M3, PerRow(), ReciprocalAmax()),
    "fp8 tensor": QuantSpec(E4M3, PerTensor(), ReciprocalAmax()),
}
BLOCKS = ("nvfp4", "mxfp4", "mxfp8", "fp8_block")
CPU_BLOCKS = ("nvfp4",)
BLOCK = QuantSpec(E4M3, PerGroup(128), PowerOfTwo())
TILE = QuantSpec(E4M3, PerTile(128, 128), PowerOfTwo())
AXES = {"along k": (True, False), "along r": (False, True), "both": (True, True)}
NAMES = {"fprop.lhs": "x", "dgrad.lhs": "g", "wgrad.lhs": "g along r", "wgrad.rhs": "x along r", "fprop.rhs": "w"}


class Task(NamedTuple):
    """What is timed.

    Args:
        work: the call.
        reads: how often x must be read.
        source: bytes of x.
        kernel: whether a kernel of ours runs, rather than the definition.
    """

    work: Callable[[], Any]
    reads: int
    source: int
    kernel: bool | None = None


Make = Callable[[Tensor], Task]


def result_bytes(result: object) -> int:
    """Bytes of all tensors in a result."""
    if isinstance(result, Tensor):
        if hasattr(result, "__tensor_flatten__") and type(result) is not Tensor:
            return sum(result_bytes(getattr(result, name)) for name in result.__tensor_flatten__()[0])
        return result.nbytes
    if isinstance(result, PackedTensor):
        return sum(tensor.nbytes for tensor in result.tensors() if tensor is not None)
    if isinstance(result, QTensor):
        return result.values.nbytes + result.scale.nbytes
    if isinstance(result, tuple | list):
        return sum(result_bytes(one) for one in result)
    names = ("codes", "scale", "inner", "outer")
    return sum(result_bytes(getattr(result, name)) for name in names if getattr(result, name, None) is not None)


# --- ours -----------------------------------------------------------------------------------------------------------


def along(spec: QuantSpec, axes: tuple[bool, bool], x: Tensor) -> Task:
    """The codes that integer and FP8 units multiply, for one GEMM or for both that x enters."""
    of_k, of_r = (spec if asked else None for asked in axes)
    # A tile of 128x128 holds the groups of both axes.
    local = isinstance(spec.granularity, PerGroup | PerTile) or (isinstance(spec.granularity, PerRow) and not axes[1])
    return Task(lambda: quantize_both(x, of_k, of_r, None, None), 1 if local else 2, x.nbytes)


def noise_of(x: Tensor) -> Tensor:
    """What a layer keeps: the step, and two words of a key for each of its six operands."""
    return torch.arange(13, device=x.device)


def drawn(spec: QuantSpec, x: Tensor) -> Tensor | None:
    return spec.draw(Noise((1, 2)), x.shape, 0, device=x.device)


def operand(spec: QuantSpec, transposed: bool, x: Tensor) -> Task:
    """What a simulated GEMM multiplies: rotated, scaled, rounded, in bfloat16."""
    of, noise = x.t() if transposed else x, noise_of(x)
    kernel = quantize_operand(of, spec, noise, 1, x.dtype) is not None

    def definition() -> object:
        return quantize(of, spec, drawn(spec, of))

    def work() -> object:
        return quantize_operand(of, spec, noise, 1, x.dtype)

    return Task(work if kernel else definition, reads(spec), x.nbytes, kernel)


def packed(spec: QuantSpec, transposed: bool, x: Tensor) -> Task:
    """The codes that wait for backward."""
    of, noise = x.t() if transposed else x, noise_of(x)
    kernel = pack_operand(of, spec, noise, 1) is not None

    def definition() -> object:
        return quantize(of, spec, drawn(spec, of)).pack()

    return Task((lambda: pack_operand(of, spec, noise, 1)) if kernel else definition, reads(spec), x.nbytes, kernel)


def unpacked(spec: QuantSpec, transposed: bool, x: Tensor) -> Task:
    """Codes back into what a GEMM multiplies."""
    of = x.t() if transposed else x
    stored = pack_operand(of, spec, noise_of(x), 1) or quantize(of, spec, drawn(spec, of)).pack()
    kernel = unpack_operand(stored, x.dtype) is not None
    work = (lambda: unpack_operand(stored, x.dtype)) if kernel else stored.unpack
    return Task(work, 1, result_bytes(stored), kernel)


def reads(spec: QuantSpec) -> int:
    return 2 if isinstance(spec.scale, TwoLevel) else 1


def block_arms(name: str, recipe: Recipe, weight: bool) -> Iterator[tuple[str, Make]]:
    """The operands of a recipe: each by the kernel that simulation uses, X for wgrad as codes too."""
    for role, what in NAMES.items():
        spec = getattr(recipe, role[:5])[("lhs", "rhs").index(role[6:])]
        if spec is None or weight != (role == "fprop.rhs"):
            continue
        extra = [str(spec.rounding.value)] * (spec.rounding.value != "nearest") + ["rotated"] * bool(spec.transform)
        label, transposed = " ".join([name, what, *extra]), role.startswith("wgrad")
        yield f"{label}, quantize", functools.partial(operand, spec, transposed)
        if role == "wgrad.rhs":
            yield f"{label}, pack", functools.partial(packed, spec, transposed)
            yield f"{label}, unpack", functools.partial(unpacked, spec, transposed)


def arms(weight: bool, blocks: Sequence[str]) -> Iterator[tuple[str, Make]]:
    own = {"fp8 128x128": TILE} if weight else {"fp8 1x128": BLOCK}
    for name, spec in (ROWS | own).items():
        for axes, chosen in AXES.items():
            yield f"{name}, {axes}", functools.partial(along, spec, chosen)
    for name in blocks:
        yield from block_arms(name, named(name), weight)


# --- peers ----------------------------------------------------------------------------------------------------------


def compiled(function: Callable[..., object], x: Tensor, reads: int) -> Task:
    run = torch.compile(function, dynamic=False) if x.is_cuda else function
    return Task(lambda: run(x), reads, x.nbytes)


def torchao_fp8(row: bool, axes: tuple[bool, bool], x: Tensor) -> Task:
    from torchao.float8 import LinearMMConfig, ScalingGranularity
    from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic

    options: dict[str, Any] = {"scaling_granularity": ScalingGranularity.TENSORWISE}
    if row:
        options = {"scaling_granularity": ScalingGranularity.AXISWISE, "axiswise_dim": -1}
    config = LinearMMConfig()

    def cast(t: Tensor) -> tuple[Tensor, Tensor]:
        made: Any = hp_tensor_to_float8_dynamic(t, torch.float8_e4m3fn, config, **options)
        return made._data, made._scale

    def work(t: Tensor) -> list[object]:
        of_k = [cast(t)] if axes[0] else []
        return [*of_k, *([cast(t.t().contiguous())] if axes[1] else [])]

    return compiled(work, x, 1 if row and not axes[1] else 2)


def torchao_int8(axes: tuple[bool, bool], x: Tensor) -> Task:
    from torchao.prototype.quantized_training.int8 import quantize_int8_rowwise

    def work(t: Tensor) -> list[object]:
        asked = [t] * axes[0] + [t.t()] * axes[1]
        return [(codes.contiguous(), scale) for codes, scale in map(quantize_int8_rowwise, asked)]

    return compiled(work, x, 2 if axes[1] else 1)


def torchao_nvfp4(x: Tensor) -> Task:
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    return compiled(lambda t: nvfp4_quantize(t, 16, per_tensor_amax_to_scale(t.abs().amax())), x, 2)


def torchao_mx(name: str, x: Tensor) -> Task:
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    kind = torch.float8_e4m3fn if name == "mxfp8" else torch.float4_e2m1fn_x2
    return compiled(lambda t: to_mx(t, kind, 32), x, 1)


def torchao_blocks(kernel: str, x: Tensor) -> Task:
    from torchao.prototype.blockwise_fp8_training import kernels as theirs

    run = getattr(theirs, kernel)
    return Task(lambda: run(x), 1, x.nbytes)


def bitsandbytes_int8(both: bool, x: Tensor) -> Task:
    from bitsandbytes.functional import int8_double_quant, int8_vectorwise_quant

    half, run = x.half(), int8_double_quant if both else int8_vectorwise_quant
    return Task(lambda: [t for t in run(half) if isinstance(t, Tensor)], 2 if both else 1, half.nbytes)


def peer_arms(weight: bool) -> Iterator[tuple[str, str, Make]]:
    """Name, package, task. Compiled, as their layers are meant to be used; not on a CPU, where it takes minutes."""
    for axes, chosen in AXES.items():
        yield f"int8 row, {axes}, torchao", "torchao", functools.partial(torchao_int8, chosen)
        yield f"fp8 row, {axes}, torchao", "torchao", functools.partial(torchao_fp8, True, chosen)
        yield f"fp8 tensor, {axes}, torchao", "torchao", functools.partial(torchao_fp8, False, chosen)
    yield "int8 row, along k, bitsandbytes", "bitsandbytes", functools.partial(bitsandbytes_int8, False)
    yield "int8 row, both in one layout, bitsandbytes", "bitsandbytes", functools.partial(bitsandbytes_int8, True)
    if weight:
        name = "triton_fp8_blockwise_weight_quant_transposed_rhs"
        yield "fp8_block w, torchao", "torchao", functools.partial(torchao_blocks, name)
        return
    yield "nvfp4 x, torchao, packed", "torchao", torchao_nvfp4
    yield "mxfp8 x, torchao", "torchao", functools.partial(torchao_mx, "mxfp8")
    yield "mxfp4 x, torchao, packed", "torchao", functools.partial(torchao_mx, "mxfp4")
    for what, name in (("x", "lhs"), ("g along r", "transposed_lhs"), ("x along r", "rhs")):
        make = functools.partial(torchao_blocks, f"triton_fp8_blockwise_act_quant_{name}")
        yield f"fp8_block {what}, torchao", "torchao", make


# --- the table ------------------------------------------------------------------------------------------------------


def measure(make: Make, size: tuple[int, ...], device: torch.device, repeat: int | None, copy: float) -> Row:
    torch.manual_seed(0)
    x = torch.randn(size, device=device, dtype=torch.bfloat16)
    task = make(x)
    moved = task.reads * task.source + result_bytes(task.work())
    ms = device_ms(task.work, device, repeat)
    rate = moved / ms / 1e6
    row = {"size": "x".join(map(str, size)), "ms": ms, "bytes": moved, "reads": task.reads, "gb_per_s": rate}
    host = host_ms(task.work, device) if device.type == "cuda" else None
    return row | {"of_copy": rate / copy, "host_ms": host, "kernel": task.kernel}


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--sizes", nargs="+", metavar="RxK", help="of the tensors")
    made.add_argument("--recipes", nargs="+", metavar="NAME", help="whose block formats; default: " + ", ".join(BLOCKS))
    options = made.parse_args()
    device = torch.device(options.device)
    for name in ("rows", "blocks"):  # loaded, so that Triton's interpreter runs them where it is asked for
        kernels(name)
    cuda = device.type == "cuda"
    options.sizes = options.sizes or (CUDA_SIZES if cuda else CPU_SIZES)
    options.recipes = options.recipes or (BLOCKS if cuda else CPU_BLOCKS)
    absent = {package for package in ("torchao", "bitsandbytes") if options.peers and missing(package)}
    columns = {
        "ms": number("ms", ".3f"), "GB/s": number("gb_per_s", ".4g"), "of copy": number("of_copy", ".0%"),
        "reads": number("reads", "d"), "host ms": number("host_ms", ".3f"),
        "by": lambda row: {True: "kernel", False: "definition", None: ""}[row["kernel"]],
    }  # fmt: skip
    copy = copy_gb_per_s(device)
    report = Report("quantize", device, options, {"copy_gb_per_s": copy}, columns)
    for size, text in zip(sizes(options.sizes, 2), options.sizes, strict=True):
        weight = text in WEIGHTS
        known = [(name, make, False) for name, make in arms(weight, options.recipes)]
        if options.peers:
            known += [(name, make, True) for name, package, make in peer_arms(weight) if package not in absent]
        for name, make, peer in known:
            if report.wants(key := f"{text} {name}"):
                task = functools.partial(measure, make, size, device, options.repeat, copy)
                report.measure(key, task, may_fail=peer)
    return report.show("Quantizers; GB/s of the bytes that must move")


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except FAILURES as failure:
        raise SystemExit(first_line(failure)) from failure
