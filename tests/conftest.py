"""What all tests share: a folder for plans, their clock, two hosts, and which cases and examples run in which order.

    @pytest.mark.quick_cases("v-half", "zb-h1")     of a parametrized test: these; the others are slow
    @pytest.mark.slow_cases("v-min")                of the others: these are slow, and the rest are drills
    --hypothesis-profile random                     looks for examples that the tests haven't seen yet
"""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

# As tests/run.sh has them, before torch is imported: with more threads sums are taken in another order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

if TYPE_CHECKING:
    from clusters import Cluster

# Every run tries the same examples, and none is judged by how long it takes: a busy machine fails no test.
_UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", _UNTIMED, derandomize=True)
settings.register_profile("random", _UNTIMED)
settings.load_profile("repeatable")


def hear_signals() -> None:
    """Let programs that this process starts end by the signals that it was told to ignore itself: by a shell that
    started it in the background, or by nohup. A program inherits that a signal is ignored, but no handler.
    """
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


hear_signals()

# Helpers that assert for tests: their failures show values, as those in tests do.
pytest.register_assert_rewrite("hugging_face_models", "kernel_cases", "pipelines", "planner_problems", "split_cases")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where plans are kept, empty at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ds_vshape"


@pytest.fixture
def processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time limits of plans count what the processor spends on them: how good they are doesn't depend on other work."""
    from ds_vshape.schedule import choose
    from ds_vshape.schedule.adaptive import plan
    monkeypatch.setattr(choose, "plan", partial(plan, clock=time.process_time))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two hosts on this machine."""
    from clusters import made_cluster
    with made_cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the cases slow, or drills, that no mark names; before -m looks at the marks. Files of slow tests come first,
    so that no process has a long one left when all others are done.
    """
    found: dict[str, set[str]] = defaultdict(set)
    named: dict[str, set[str]] = {}
    for item in items:
        quick, slow = (item.get_closest_marker(mark) for mark in ("quick_cases", "slow_cases"))
        if quick is None and slow is None:
            continue
        name, _, case = item.nodeid.rstrip("]").partition("[")
        found[name].add(case)
        named[name] = {*(quick.args if quick else ()), *(slow.args if slow else ())}
        if quick is None or case not in quick.args:
            item.add_marker(pytest.mark.slow if slow is None or case in slow.args else pytest.mark.drill)
    # Where one case alone was asked for, the others aren't collected.
    whole = not any("[" in argument for argument in config.args)
    unknown = {name: sorted(cases - found[name]) for name, cases in named.items() if cases - found[name]}
    if whole and unknown:
        raise pytest.UsageError(f"quick_cases or slow_cases name cases that there aren't: {unknown}")
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)
