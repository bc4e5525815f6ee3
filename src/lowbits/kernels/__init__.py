# SPDX-License-Identifier: Apache-2.0
"""One entry a GEMM; which implementation runs is decided here and nowhere else."""

from lowbits.kernels._blocks import pack_operand, quantize_operand, unpack_operand
from lowbits.kernels._c_compiler import library as c_library
from lowbits.kernels._coded import Coded, illegal_on_hardware
from lowbits.kernels._decoded import Decoded
from lowbits.kernels._each import quantize_each
from lowbits.kernels._gemm import INT32_TERMS, Execution, Operand, scaled_mm
from lowbits.kernels._memory import pack_memory, unpack_memory
from lowbits.kernels._operators import as_dtype
from lowbits.kernels._row_operands import decode_operand
from lowbits.kernels._rows import quantize_both
from lowbits.kernels._units import missing_unit

__all__ = [
    "INT32_TERMS",
    "Coded",
    "Decoded",
    "Execution",
    "Operand",
    "as_dtype",
    "c_library",
    "decode_operand",
    "illegal_on_hardware",
    "missing_unit",
    "pack_memory",
    "pack_operand",
    "quantize_both",
    "quantize_each",
    "quantize_operand",
    "scaled_mm",
    "unpack_memory",
    "unpack_operand",
]
