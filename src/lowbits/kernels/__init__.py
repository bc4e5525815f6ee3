# SPDX-License-Identifier: Apache-2.0
"""One entry a GEMM; which implementation runs is decided here and nowhere else."""

from lowbits.kernels._blocks import Decoded, pack_operand, quantize_operand, unpack_operand
from lowbits.kernels._c_compiler import library as c_library
from lowbits.kernels._gemm import Execution, Operand, illegal_on_hardware, scaled_mm

__all__ = [
    "Decoded",
    "Execution",
    "Operand",
    "c_library",
    "illegal_on_hardware",
    "pack_operand",
    "quantize_operand",
    "scaled_mm",
    "unpack_operand",
]
