# SPDX-License-Identifier: Apache-2.0
"""Compile kernels for a GPU that need not be there, instead of launching them: the interpreter runs what a compiler
refuses (code behind a return, types that differ between branches).

    python -m tests.kernels.compiling
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from lowbits import optim
from lowbits.formats import INT8
from lowbits.kernels import (
    Coded,
    _blocks,
    _each,
    _matmul,
    _memory,
    _row_operands,
    _rows,
    decode_operand,
    pack_memory,
    pack_operand,
    quantize_both,
    quantize_each,
    quantize_operand,
    scaled_mm,
    unpack_memory,
    unpack_operand,
)
from lowbits.methods.geta import Quantizer, Slope, _launch
from lowbits.nn import Grid, StepInit, quantize_parameter
from lowbits.optim import GlobalNorm, _launched, _signature
from lowbits.quantizers import Noise, PerBlock, QuantSpec, Rounding
from lowbits.recipes import named

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def type_of(value: object) -> str:
    """How Triton writes the type of an argument."""
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    return "i64" if isinstance(value, int) and abs(value) >= 2**31 else "i32" if isinstance(value, int) else "fp32"


def torn_reductions(ttgir: str) -> list[str]:
    """Return the layouts whose lanes along the reduced axis are not neighbours; Triton 3.6 shuffles over others."""
    lanes = {
        name: json.loads(found)
        for name, found in re.findall(r"^(#\w+) = #ttg\.linear<.*?lane = (\[.*?\]), w", ttgir, re.M)
    }
    torn = []
    for axis, layout in re.findall(r'"tt\.reduce"\(.*?axis = (\d+) .*?\}\) : \(tensor<[^,]*, (.*?)>\)', ttgir, re.S):
        used = reduced_lanes(layout, int(axis), lanes)
        if used and used[-1] - used[0] + 1 != len(used):
            torn.append(layout)
    return torn


def reduced_lanes(layout: str, axis: int, lanes: dict[str, list[list[int]]]) -> list[int]:
    """Return the bits of the lane's number along an axis; those of a blocked layout are always neighbours."""
    sliced = re.fullmatch(r"#ttg\.slice<\{dim = (\d+), parent = (.*)\}>", layout)
    if sliced:
        return reduced_lanes(sliced[2], axis + (axis >= int(sliced[1])), lanes)
    return [bit for bit, basis in enumerate(lanes.get(layout, [])) if basis[axis]]


@contextmanager
def compiling() -> Iterator[set[str]]:
    """Compile in place of launching; yields the names and arguments of what was compiled."""
    seen: set[str] = set()

    def run(kernel: JITFunction, *args: object, grid: object = None, warmup: bool = False, **named_: Any) -> None:
        bound = dict(zip(kernel.arg_names, args, strict=False)) | named_
        signature, constants, attributes = {}, {}, {}
        for parameter in kernel.params:
            value = bound.get(parameter.name, parameter.default)
            if parameter.is_constexpr:
                signature[parameter.name], constants[(parameter.num,)] = "constexpr", getattr(value, "value", value)
                continue
            signature[parameter.name] = type_of(value)
            # As a launch has it: what is a multiple of 16 is read by more than one beside each other.
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        told = f"{kernel.fn.__name__} {signature} {constants}"
        if told not in seen:
            seen.add(told)
            source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
            made = triton_compile(source, target=TARGET, options={k: v for k, v in named_.items() if k in OPTIONS})
            torn = torn_reductions(made.asm["ttgir"])
            assert not torn, f"{kernel.fn.__name__} reduces over lanes that are not neighbours: {torn}"

    def launcher(kernel: JITFunction, grid: object) -> Any:
        return lambda *args, **named_: run(kernel, *args, **named_)

    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", run))
        stack.enter_context(patch.object(JITFunction, "__getitem__", launcher))
        for module, name in (
            (_blocks, "launches"), (_row_operands, "launches"), (_rows, "launches"), (_each, "launches"),
            (_matmul, "launches"), (_memory, "launches"),
            (_launched, "usable"), (_signature, "usable"), (_launch, "launchable"),
        ):  # fmt: skip
            stack.enter_context(patch.object(module, name, lambda *_: True))
        stack.enter_context(patch.object(_matmul, "multiprocessors", lambda _: 132))
        yield seen


def block_formats() -> None:
    noise = torch.tensor([3, *Noise.of(1, "layer", "role").key])
    x = torch.randn(64, 128).bfloat16()
    for name in ("nvfp4", "nvfp4_up", "nvfp4_sr_24bit", "mxfp4_floor", "fp8_block"):
        for spec in {spec for gemm in named(name).gemms.values() for spec in gemm if spec}:
            for of in (x, x.t()):
                assert quantize_operand(of, spec, noise, 1, torch.bfloat16) is not None
                packed = pack_operand(of, spec, noise, 1)
                assert packed is not None and unpack_operand(packed, torch.bfloat16) is not None


def rows_and_codes() -> None:
    x, made = torch.randn(64, 128).bfloat16(), None
    for name in ("fp8_tensorwise", "fp8_rowwise", "fp8_rowwise_pow2", "int8_rowwise"):
        recipe = named(name)
        pairs = (recipe.fprop.lhs, recipe.wgrad.rhs), (recipe.dgrad.lhs, None), (None, recipe.dgrad.rhs)
        for along_k, along_r in pairs:
            a, b = quantize_both(x, along_k, along_r, None, None)
            made = a or b
    assert made is not None
    scaled_mm(made, made, torch.bfloat16)
    recipe = named("fp8_block")
    quantize_both(x, recipe.fprop.lhs, recipe.wgrad.rhs, None, None)
    quantize_both(x, recipe.fprop.rhs, recipe.dgrad.rhs, None, None)
    quantize_each([x, x], recipe.fprop.rhs, recipe.dgrad.rhs)
    for lhs, rhs in (recipe.fprop, recipe.wgrad):
        (a, _), (b, _) = quantize_both(x, lhs, None, None, None), quantize_both(x, rhs, None, None, None)
        assert a is not None and b is not None
        scaled_mm(a, b, torch.bfloat16)
    recipe = named("int8_rowwise")
    for dtype in (torch.bfloat16, torch.float32):
        quantize_each([torch.randn(64, 128).to(dtype)] * 2, recipe.fprop.rhs, recipe.dgrad.rhs)
    large = Coded(torch.zeros(128 * 132, 256, dtype=torch.int8), torch.ones(1, 1), made.spec, 256)
    scaled_mm(large, large, torch.bfloat16)


def operands_with_scales_of_rows() -> None:
    noise = torch.zeros(3, dtype=torch.int64)
    for name in ("w8a8g8_faithful", "a8_tensor", "fp8_tensorwise", "fp8_rowwise", "fp8_rowwise_pow2"):
        for spec in {spec for gemm in named(name).gemms.values() for spec in gemm if spec}:
            for dtype in (torch.bfloat16, torch.float32):
                made = quantize_operand(torch.randn(64, 128).to(dtype), spec, noise, 1, torch.bfloat16, codes=True)
                assert made is not None and made.packed is not None
                assert pack_operand(torch.randn(64, 128).to(dtype), spec, noise, 1) is not None
                for to, whole in ((torch.bfloat16, False), (torch.float32, True)):
                    assert decode_operand(made.packed, to, whole=whole) is not None


def memory() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        unpack_memory(pack_memory(torch.randn(1000).to(dtype), QuantSpec(INT8, PerBlock(128))), dtype)


def optimizers() -> None:
    def step(optimizer: type, start: Any, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        params = [nn.Parameter(start(torch.randn(64, 128)).to(dtype)) for _ in range(2)]
        made = optimizer(params, lr=1e-3, **options)
        for p in params:
            p.grad = torch.randn(p.shape, dtype=dtype)
        made.step()

    def codes(bits: float, init: StepInit) -> Any:
        return lambda x: quantize_parameter(x, Grid.of(bits), init)

    step(optim.AdamW8bit, lambda x: x, clip=GlobalNorm(1.0))
    step(optim.AdamW8bit, lambda x: x, torch.bfloat16, rounding=Rounding.STOCHASTIC, min_8bit_size=0)
    step(optim.AdamW8bit, codes(8, StepInit()), min_8bit_size=0)
    step(optim.AdamW4bit, codes(1.58, StepInit(per_channel=True)), min_8bit_size=0)
    step(optim.Lion8bit, codes(2, StepInit()), min_8bit_size=0)


def learned_steps() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for slope in Slope:
            x = torch.randn(64, 128, dtype=dtype, requires_grad=True)
            Quantizer(1.0, 8, slope)(x).sum().backward()
    slices = [_launch.Slices(torch.randn(64, 8), axis, torch.arange(3)) for axis in (0, 1)]
    for own in (None, torch.ones(3 * 8 + 3 * 64)):
        table = _launch.Table(slices, own)
        before, scalars = table.gather(), torch.rand(2, 3)
        table.products([s.parameter for s in slices], before, scalars)
        table.decay_(before, scalars, torch.rand(2), torch.rand(1))
        table.clear_()


def main() -> None:
    with compiling() as seen:
        for what in (block_formats, rows_and_codes, operands_with_scales_of_rows, memory, optimizers, learned_steps):
            before = len(seen)
            what()
            print(f"{what.__name__}: {len(seen) - before} kernels")
            if len(seen) == before:
                sys.exit(f"{what.__name__}: nothing was compiled")


if __name__ == "__main__":
    main()
