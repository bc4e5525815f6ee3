# SPDX-License-Identifier: Apache-2.0
"""One entry a GEMM; which implementation runs is decided here and nowhere else."""

from lowbits.kernels._c_compiler import library as c_library
from lowbits.kernels._gemm import Execution, illegal_on_hardware, scaled_mm

__all__ = ["Execution", "c_library", "illegal_on_hardware", "scaled_mm"]
