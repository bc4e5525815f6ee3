# SPDX-License-Identifier: Apache-2.0
"""Where a number comes from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from lowbits.analysis import device_name, provenance


def test_provenance_names_versions_device_and_commit(repository: Path) -> None:
    found = provenance(torch.device("cpu"))
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"] == torch.__version__  # type: ignore[index]
    assert found["device"] == device_name(torch.device("cpu")) and " " not in str(found["device"])
    if not (repository / ".git").exists():
        pytest.skip("not a git checkout")
    git = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=True).stdout
    assert head.startswith(str(found["commit"]).rstrip("+"))
