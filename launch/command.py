"""The `deepspeed` command of a job."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from ds_vshape.layouts.job import Job

_RANK_SCRIPT = Path(__file__).resolve().with_name("train_rank.py")


def command(job: Job, overrides: Sequence[str]) -> list[str]:
    """The command that starts all ranks of `job` from the present folder; `overrides` choose the job.

    It has the placeholder HOSTFILE where hosts are needed and not named.
    """
    here = Path.cwd()
    script = _RANK_SCRIPT.relative_to(here) if _RANK_SCRIPT.is_relative_to(here) else _RANK_SCRIPT
    if len(job.hosts) == 1 and job.hostfile is None:
        where = ["--hostfile", os.devnull, "--num_gpus", str(job.ranks)]
    else:
        where = ["--hostfile", job.hostfile or "HOSTFILE"]
    # The launcher would add the option --local_rank, which hydra can't parse; LOCAL_RANK is enough.
    return ["deepspeed", *where, "--master_port", str(job.port), "--no_local_rank", str(script),
            *(each for each in overrides if not each.startswith("hostfile="))]  # a file of this host alone


def environment(job: Job) -> dict[str, str]:
    """The environment variables of the command: on CPUs one thread a rank, unless the caller has set another number."""
    if job.machine.accelerator != "cpu":
        return {}
    return {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def command_line(job: Job, overrides: Sequence[str]) -> str:
    """Command and environment as a line for a shell."""
    return shlex.join([*(f"{key}={value}" for key, value in environment(job).items()), *command(job, overrides)])
