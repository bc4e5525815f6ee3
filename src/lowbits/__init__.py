# SPDX-License-Identifier: Apache-2.0
"""Train neural networks in few bits: weights, activations, gradients and optimizer states.

Read `lowbits.formats`, `lowbits.quantizers`, `lowbits.nn` and `lowbits.recipes` in this order; they need torch alone.
"""

__all__: list[str] = []
