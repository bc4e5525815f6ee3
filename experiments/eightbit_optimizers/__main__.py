# SPDX-License-Identifier: Apache-2.0
"""Placeholder."""

from experiments.eightbit_optimizers import language
from pathlib import Path
import sys

language.main(sys.argv[2], Path(sys.argv[3]))
