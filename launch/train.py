"""The main job, composed from configs/: checked, shown or started, once or for each combination of a sweep.

    python launch/train.py schedule=v-half parallel.pipe=4
    python launch/train.py --dry-run schedule=v-half parallel.pipe=4 model=9.6b machine=a100
    python launch/train.py --multirun schedule=v-half,v-zb parallel.pipe=2,4
    python launch/train.py bench=schedules

Overrides choose a file of a group (schedule=v-half) or set a key (parallel.pipe=4). All jobs of the command line are
checked before the first one starts. Each job's ranks are processes of the `deepspeed` launcher that run train_rank.py
with the same overrides, and write to runs/. All other options are hydra's, such as --cfg job. To use files of your own,
put them into a folder with the groups of configs/, and add hydra.searchpath=[file://FOLDER].
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# `python -m launch.train` looks for modules in the present folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import hydra
from command import command, command_line, environment
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from result import JobResult
from rich.console import Console
from rich.table import Table

from ds_vshape.config.section import ConfigError
from ds_vshape.layouts.composition import CONFIGS, Composed, compose_jobs
from ds_vshape.layouts.job import Job
from ds_vshape.layouts.job_costs import predict_job
from ds_vshape.layouts.report import print_job
from ds_vshape.layouts.rules import read_job

_DRY_RUN = "--dry-run"
_CLUSTER_SCRIPT = Path(__file__).resolve().with_name("cluster") / "deepspeed.sh"


@dataclass(frozen=True)
class Done:
    """A job that has ended: its overrides, the launcher's exit status, and where its result is."""

    overrides: tuple[str, ...]
    status: int
    result: Path


def check_hosts(job: Job) -> None:
    """Raises ConfigError if the job needs several hosts and no hostfile names them; a dry run doesn't need one."""
    if len(job.hosts) > 1 and job.hostfile is None:
        raise ConfigError(f"hostfile = null: {job.ranks} ranks need {len(job.hosts)} hosts of machine.slots = "
                          f"{job.machine.slots}; name them in a hostfile")


def start(composed: Composed) -> int:
    """Start the ranks and wait for them; the launcher's exit status."""
    arguments = command(composed.job, composed.overrides)
    own = Path(sys.executable).with_name(arguments[0])
    if own.exists():  # the environment that runs this needn't be the active one
        arguments[0] = str(own)
    variables = {**environment(composed.job)}
    if composed.job.hostfile is not None:
        # Checks the hosts, then runs the same command.
        variables["HOSTFILE"] = os.path.abspath(composed.job.hostfile)
        arguments = ["bash", str(_CLUSTER_SCRIPT), *arguments[arguments.index("--master_port"):]]
    with subprocess.Popen(arguments, env={**os.environ, **variables}) as process:
        # The launcher ends its ranks, which would continue without it.
        signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
        return process.wait()


def start_all(arguments: Sequence[str]) -> int:
    """Start job after job in hydra's output folders; 1 if any failed, after all of them."""
    done: list[Done] = []

    @hydra.main(config_path=str(CONFIGS), config_name="train", version_base="1.3")
    def one(config: DictConfig) -> None:
        own = HydraConfig.get()
        searched = [each for each in own.overrides.hydra if each.startswith("hydra.searchpath=")]
        task = [*own.overrides.task, *searched]
        if config.result is None:
            config.result = f"{own.runtime.output_dir}/result.json"
            task.append(f"result={config.result}")
        job = read_job(OmegaConf.to_container(config, resolve=True))
        done.append(Done(tuple(own.overrides.task), start(Composed(tuple(task), job)), Path(config.result)))

    sys.argv[1:] = arguments
    one()
    if len(done) > 1:
        Console(width=150).print(_summary(done))
    return int(any(each.status for each in done))


def _summary(done: Sequence[Done]) -> Table:
    """The results of a sweep's jobs, each named by the overrides that not all of them share."""
    common = set.intersection(*(set(each.overrides) for each in done))
    table = Table(title="the sweep's jobs: seconds a batch, bubbles and the last loss", title_justify="left")
    for column in ("job", "s a batch", "predicted bubble", "measured bubble", "loss", "result"):
        table.add_column(column, justify="left" if column in ("job", "result") else "right")
    for each in done:
        name = " ".join(override for override in each.overrides if override not in common)
        if each.status:
            table.add_row(name, *["-"] * 4, f"failed with status {each.status}")
        else:
            result = JobResult.read(each.result)
            table.add_row(name, f"{result.batch_seconds:.3f}", f"{result.predicted_bubble:.1%}",
                          f"{result.measured_bubble:.1%}", f"{result.loss:.6f}", os.path.relpath(each.result))
    return table


def main() -> int:
    arguments = [argument for argument in sys.argv[1:] if argument != _DRY_RUN]
    asked = get_args_parser().parse_intermixed_args(arguments)
    # hydra itself wants its options first.
    arguments = [*(argument for argument in arguments if argument not in asked.overrides), *asked.overrides]
    if asked.help or asked.hydra_help or asked.cfg or asked.info or asked.shell_completion:
        return start_all(arguments)
    try:
        if asked.config_dir or asked.config_name or asked.config_path:
            raise ConfigError("the config is configs/train.yaml; files of your own are found with "
                              "hydra.searchpath=[file://FOLDER]")
        jobs = compose_jobs(asked.overrides, asked.multirun)
        if _DRY_RUN not in sys.argv:
            for composed in jobs:
                check_hosts(composed.job)
            return start_all(arguments)
        console = Console(width=None if sys.stdout.isatty() else 200)
        for composed in jobs:
            print_job(composed.job, predict_job(composed.job), console)
            line = command_line(composed.job, composed.overrides)
            console.print(line, soft_wrap=True, highlight=False, markup=False)  # whatever the width, to be copied
    except ValueError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
