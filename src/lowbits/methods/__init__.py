# SPDX-License-Identifier: Apache-2.0
"""One paper, one file: what it changes in a training run beside its recipe."""

from lowbits.methods._contract import Method, Position, Table
from lowbits.methods._names import named, names, of_fields

__all__ = ["Method", "Position", "Table", "named", "names", "of_fields"]
