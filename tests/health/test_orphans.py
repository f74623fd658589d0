"""A rank killed under the real `deepspeed` launcher: everything that the job started ends with a failure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from eventually import eventually
from ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.launcher]

SUPPORT = Path(__file__).parents[1] / "support"
MARK = "DS_VSHAPE_TEST_JOB"
# Ends something of the job in a folder, whose processes have a mark.
Kill = Callable[[Path, str], None]
# Trains until it is ended.
SCRIPT = f"""
import os, sys
sys.path.insert(0, {str(SUPPORT)!r})
import ranks
import deepspeed
from pipelines import Job, data
deepspeed.init_distributed("gloo")
*_, section, folder = sys.argv
open(f"{{folder}}/pid{{os.environ['RANK']}}", "w").write(str(os.getpid()))
engine = Job(eval(section), 2, 32).engine()
for batch in range(10**6):
    engine.train_batch(data(engine, batch))
    open(f"{{folder}}/trains{{os.environ['RANK']}}", "w").close()
"""
# No schedule of the table is within its limit, so that training waits for the plan.
PLANS = {"name": "adaptive", "memory_limit": 0.75, "planning_seconds": 600}


def of_job(mark: str, word: str = "") -> Iterator[psutil.Process]:
    """The processes that have the job's mark in their environment, as all have that one of them starts; those with
    `word` in their command."""
    for process in psutil.process_iter():
        # It may end at any moment.
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE and (
                    not word or word in process.cmdline()):
                yield process


def kill_rank(victim: int) -> Kill:
    """Of rank `victim`."""
    return lambda folder, mark: os.kill(int((folder / f"pid{victim}").read_text()), signal.SIGKILL)


def terminate_launcher(folder: Path, mark: str) -> None:
    """The process that started the ranks; the one that the user started would leave it running (DeepSpeed's runner.py).
    The planner is stopped meanwhile."""
    for process in list(of_job(mark, "ds_vshape.schedule.worker")):
        process.suspend()
    for process in list(of_job(mark, "deepspeed.launcher.launch")):
        process.terminate()


def kill_while(phase: str, section: object, kill: Kill, folder: Path) -> None:
    script, pids, mark = folder / "train.py", [folder / f"pid{rank}" for rank in range(2)], uuid.uuid4().hex
    script.write_text(SCRIPT)
    command = [Path(sys.executable).with_name("deepspeed"), "--hostfile", os.devnull, "--num_gpus", "2",
               "--master_port", str(free_port()), script, repr(section), folder]
    environment = {**os.environ, MARK: mark, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
                   "XDG_CACHE_HOME": str(folder / "cache")}

    def is_there() -> bool:
        if phase == "training":
            return all((folder / f"trains{rank}").exists() for rank in range(2))
        return any(of_job(mark, "ds_vshape.schedule.worker"))

    with open(folder / "log", "w") as log:
        launcher = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log,
                                    start_new_session=True)
    try:
        eventually(phase, is_there, 120)
        assert {int(path.read_text()) for path in pids} < {process.pid for process in of_job(mark)}
        kill(folder, mark)
        assert launcher.wait(timeout=60) != 0
        eventually("no process is left", lambda: not list(of_job(mark)), 30)
    except BaseException:
        print((folder / "log").read_text()[-4000:])
        raise
    finally:
        for process in of_job(mark):
            process.kill()


def test_a_rank_killed_in_training_takes_all_with_it(tmp_path: Path) -> None:
    kill_while("training", "v-half", kill_rank(1), tmp_path)


def test_a_killed_rank_takes_its_planner_with_it(tmp_path: Path) -> None:
    kill_while("planning", PLANS, kill_rank(0), tmp_path)


def test_a_terminated_launcher_takes_ranks_and_a_stopped_planner_with_it(tmp_path: Path) -> None:
    kill_while("planning", PLANS, terminate_launcher, tmp_path)
