"""A training that is killed again and again ends with the weights of one that isn't."""

from __future__ import annotations

from pathlib import Path

import pytest
from failure_drill import Drill


@pytest.mark.slow
@pytest.mark.launcher
def test_killed_twice(tmp_path: Path) -> None:
    """`python tests/finetuning/failure_drill.py` kills it ten times."""
    drill = Drill(tmp_path, batches=8)
    assert drill.run(kills=2, seed=1) == []
    # As if it had been killed after its model was written.
    drill.finish("killed")
    assert "nothing to do: killed holds the model" in (tmp_path / "killed.log").read_text()
