# SPDX-License-Identifier: Apache-2.0
"""`instructions`: how many the kernels have for an H200, counted in its machine code; no GPU is needed.

A program has no loop: what stands in its code is what each of its threads carries out, once.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from experiments.gaussian_weight_sampling.results import write
from lowbits.methods._pseudo_noise import _launch
from lowbits.methods.gaussws import Fidelity, Plan, PseudoNoise, Storage
from tests.kernels.compiling import type_of

TARGET = GPUTarget("cuda", 90, 32)
OPTIONS = ("num_warps", "enable_fp_fusion")
INTEGER = (
    "LOP3", "SHF", "ISETP", "SEL", "FSEL", "IADD3", "PRMT", "FMNMX", "VIMNMX", "VIADD", "LEA", "SGXT", "R2P", "P2R",
    "FSETP",
)  # fmt: skip
MULTIPROCESSORS, GHZ, INTEGERS_A_CYCLE, ISSUED_A_CYCLE, COPY_TB_S = 132, 1.755, 64, 128, 4.2
CASES: dict[str, tuple[Plan, torch.dtype]] = {
    "GaussWS": (Plan(), torch.float32),
    "GaussWS, masters in bfloat16": (Plan(), torch.bfloat16),
    "GaussWS, lite": (Plan(fidelity=Fidelity.LITE), torch.float32),
    "GaussWS, stored as e3m2": (Plan(storage=Storage.E3M2), torch.float32),
    "DiffQ matched": (Plan(noise=PseudoNoise.UNIFORM), torch.float32),
}


def machine_code(kernel: JITFunction, bound: dict[str, Any]) -> str:
    """Compile for the H200 and disassemble; addresses and sizes are multiples of 16, as those of real layers are."""
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        value, place = bound.get(parameter.name, parameter.default), (parameter.num,)
        if parameter.is_constexpr or value is None or value is True or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[place] = "constexpr", getattr(value, "value", value)
            continue
        signature[parameter.name] = type_of(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[place] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton_compile(source, target=TARGET, options={k: v for k, v in bound.items() if k in OPTIONS})
    tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        return subprocess.run([tool, "--dump-sass", file.name], capture_output=True, text=True, check=True).stdout


def counted(code: str, elements: int, warps: int) -> dict[str, float]:
    """Return instructions a weight: all, and those of the integer pipe."""
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_]*)", code)
    found, each = Counter(name for name in names if name != "NOP"), elements / (32 * warps)
    return {"all": found.total() / each, "integer": sum(found[name] for name in INTEGER) / each}


@contextmanager
def counting() -> Iterator[dict[str, dict[str, float]]]:
    """Count in place of launching; yields what was counted, by the kernel's name."""
    seen: dict[str, dict[str, float]] = {}

    def launcher(kernel: JITFunction, _: object) -> Any:
        def launch(*args: object, **more: Any) -> None:
            bound = dict(zip(kernel.arg_names, args, strict=False)) | more
            code = machine_code(kernel, bound)
            seen[kernel.fn.__name__] = counted(code, more["BR"] * more["BC"] * more["NB"], more["num_warps"])

        return launch

    with patch.object(JITFunction, "__getitem__", launcher):
        yield seen


def modelled(found: dict[str, float], bytes_: int) -> dict[str, float]:
    """Return picoseconds a weight by arithmetic and by memory: the larger one is the floor."""
    cycles = max(found["integer"] / INTEGERS_A_CYCLE, found["all"] / ISSUED_A_CYCLE)
    return {
        "arithmetic_ps": 1e3 * cycles / (MULTIPROCESSORS * GHZ),
        "memory_ps": bytes_ / COPY_TB_S,
    }


def main(shape: tuple[int, int] = (5632, 2048)) -> Path:
    """Count both kernels of every case."""
    rows: dict[str, dict[str, float]] = {}
    for name, (plan, dtype) in CASES.items():
        w, counter = torch.empty(shape, dtype=dtype), torch.tensor([1, 2, 3])
        b_i = torch.ones(math.ceil(shape[0] / 32), math.ceil(shape[1] / 32))
        with counting() as seen:
            y, slopes = _launch.add_noise(w, b_i, counter, plan, (0, 0), torch.bfloat16)
            _launch.gradients(y, counter, slopes, plan, (0, 0), dtype)
        wide = dtype.itemsize
        for kernel, bytes_ in (("add_noise", wide + 2), ("gradients", 2 + (wide if wide > 2 else 0))):
            rows[f"{name}, {kernel}"] = {**seen[kernel], "bytes": bytes_, **modelled(seen[kernel], bytes_)}
            print(f"{name}, {kernel}", rows[f"{name}, {kernel}"], flush=True)
    return write("instructions", {"target": "sm_90", "ghz": GHZ, "copy_tb_s": COPY_TB_S, "rows": rows}, [], "cpu")
