"""A training that is killed again and again ends with the weights of one that isn't."""

from __future__ import annotations

from pathlib import Path

import pytest
from failure_drill import Drill


@pytest.mark.slow
@pytest.mark.launcher
def test_killed_twice(tmp_path: Path) -> None:
    """`python tests/finetuning/failure_drill.py` kills it ten times."""
    assert Drill(tmp_path, batches=8).run(kills=2, seed=1) == []
