# SPDX-License-Identifier: Apache-2.0
"""What the tests of the data share: a small prepared folder, and one that cannot be written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from lowbits.data import TokenData, _shards, prepare
from tests.data.made_up import Memory, made_up

SHARD = 1000  # tokens, so that even little data has several


@pytest.fixture(scope="session")
def quiet() -> Console:
    return Console(file=StringIO())


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, quiet: Console) -> TokenData:
    """A folder with shards of 1000 tokens; read it, never change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_shards, "SHARD_TOKENS", SHARD)
        return prepare(Memory(made_up(120)), tmp_path_factory.mktemp("data") / "made-up", vocab_size=400, console=quiet)


@pytest.fixture
def unprivileged_folder() -> Iterator[Path]:
    """A folder that this process, which is not root while the test runs, can read and not write."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "locked"
        folder.mkdir()
        (folder / "secret.txt").write_text("text")
        (folder / "secret.txt").chmod(0)
        folder.chmod(0o555)
        Path(name).chmod(0o755)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # nobody
        yield folder
        os.seteuid(user)
        folder.chmod(0o755)
