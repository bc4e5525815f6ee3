# SPDX-License-Identifier: Apache-2.0
"""Tokens for tiny runs, made once a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.tiny import tokens


@pytest.fixture(scope="session")
def tiny_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of token data with a vocabulary of 300."""
    return tokens(tmp_path_factory.mktemp("tiny")).folder
