"""The planner's loops are compiled before a plan's time counts, once."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from planner_problems import counted

from ds_vshape.schedule.adaptive import compilation, machine_code, plan


@pytest.mark.skipif(not machine_code.COMPILED, reason="there is nothing to compile without numba")
def test_it_is_known_whether_the_machine_code_is_there(tmp_path: Path) -> None:
    """On disk after the first run, for other processes too; gone with the folder."""
    compilation.compile_loops()
    assert compilation.is_done()
    script = "from ds_vshape.schedule.adaptive import compilation as c; print(c.is_done())"

    def found(**environment: str) -> str:
        return subprocess.run([sys.executable, "-c", script], env={**os.environ, **environment}, text=True,
                              capture_output=True, check=True).stdout.strip()

    assert found() == "True"
    assert found(NUMBA_CACHE_DIR=str(tmp_path)) == "False"


def test_code_of_another_line_does_not_count(tmp_path: Path) -> None:
    def fill() -> None:
        """A loop in this file."""

    loop = SimpleNamespace(signatures=[], stats=SimpleNamespace(cache_path=str(tmp_path)), py_func=fill)
    assert not compilation.is_compiled(loop)
    line = fill.__code__.co_firstlineno
    (tmp_path / f"test_compilation.fill-{line + 1}.py311.nbi").touch()
    assert not compilation.is_compiled(loop)
    (tmp_path / f"test_compilation.fill-{line}.py311.nbi").touch()
    assert compilation.is_compiled(loop)


def test_compiling_is_told_and_does_not_count(monkeypatch: pytest.MonkeyPatch,
                                              caplog: pytest.LogCaptureFixture) -> None:
    """By a clock that goes on by a tenth with each look, and by 1000 while compiling."""
    ticks = itertools.count()
    began: list[float] = []
    monkeypatch.setattr(compilation, "is_done", lambda memory: False)
    monkeypatch.setattr(compilation, "compile_loops", lambda memory: began.append(1000.0))
    found = plan(counted(2, 3, (10, 12, 8, 1), 3), 2.0, clock=lambda: next(ticks) / 10 + sum(began))
    assert began == [1000.0]
    assert 0 < found.planning_s < 100
    line, = caplog.messages
    assert "once after an installation" in line
    monkeypatch.setattr(compilation, "is_done", lambda memory: True)
    plan(counted(2, 3, (10, 12, 8, 1), 3), 0.1)
    assert caplog.messages == [line]
