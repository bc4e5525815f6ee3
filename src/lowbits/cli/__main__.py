# SPDX-License-Identifier: Apache-2.0
"""Let `torchrun -m lowbits.cli train ...` start one process a device."""

from __future__ import annotations

import sys

from lowbits.cli import main

sys.exit(main())
