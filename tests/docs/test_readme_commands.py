"""A user's way through the READMEs: every command of their code blocks runs, in its order, as readme_commands.py says.

They run in a copy of the checkout whose folders are links, so that what they write stays out of it. Those that need
two hosts get the cluster of tests/conftest.py; sbatch, srun and scontrol are stand-ins that start the tasks here.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from clusters import AS_ROOT, Cluster
from ports import free_port
from readme_commands import CHANGES, FILES, ROOT, blocks, change_for, changed, commands, runs_here
from user_script import write_job

HOSTS = "launch/train.py hostfile|deepspeed.sh|openmpi.sh"
DONE: set[str] = set()

# Slurm's part in launch/cluster/slurm.sh: a job runs a copy of its script, a step starts all tasks.
STAND_INS = {
    "sbatch": 'copy=$(mktemp); cp "$1" "$copy"; shift\n'
              'SLURM_SUBMIT_DIR=$PWD SLURM_JOB_ID=$RANDOM SLURM_JOB_NODELIST=here SLURM_NTASKS=4 bash "$copy" "$@"',
    "scontrol": '[ "$*" = "show hostnames here" ] && echo 127.0.0.1',
    "srun": 'while [[ $1 == --* ]]; do shift; done\n'
            'for ((task = 0; task < SLURM_NTASKS; task++)); do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & done\n'
            'for ((task = 0; task < SLURM_NTASKS; task++)); do wait -n || exit 1; done',
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to all that a checkout has, the files that READMEs suppose a user has, and an environment set up."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.name not in {".git", ".venv", ".hypothesis", "runs"} and path.suffix != ".egg-info":
            (folder / path.name).symlink_to(path)
    write_job(folder)
    shutil.copy(ROOT / "tests" / "data" / "reference.json", folder / "schedules.json")
    (folder / "bin").mkdir()
    for name, text in STAND_INS.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    environment = folder / ".venv"
    environment.mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (environment / name).symlink_to(Path(sys.prefix) / name)
    # launch/setup_env.sh installs nothing where its stamp is the one it would leave.
    files = "setup.cfg pyproject.toml ds_vshape/__init__.py launch/setup_env.sh"
    stamp = subprocess.run(["bash", "-c", f"{{ cat {files}; pwd; }} | sha256sum"], cwd=folder, capture_output=True,
                           text=True, check=True).stdout.split()[0]
    (environment / ".ds_vshape_stamp").write_text(stamp + "\n")
    return folder


def test_every_block_is_known_and_every_change_is_used() -> None:
    """Nothing is passed over: each block names its language, and every change of a command is still needed."""
    found = [command for file in FILES for command in commands(file) if runs_here(command)]
    assert len(found) > 45
    used = [change_for(command) for command in found]
    assert [change.pattern for change in CHANGES if change not in used] == []


@pytest.mark.parametrize("text, found", [
    ("```bash\npip install x\n```", [("bash", ["pip install x"])]),
    ("1. so:\n\n   ```json\n   {\n     }\n\n   ```\n\n2. on", [("json", ["{", "  }"])]),
    ("text\n\n    pip install x\n", [("", ["pip install x"])]),
    ("```\npip\n```", [("", ["pip"])]),
    ("- a list\n    that goes on", []),
])
def test_blocks_have_languages(text: str, found: list[tuple[str, list[str]]]) -> None:
    assert list(blocks(text)) == found


@pytest.mark.slow
@pytest.mark.launcher
@pytest.mark.cluster
@pytest.mark.parametrize("file", FILES)
def test_every_command_runs(file: str, checkout: Path, request: pytest.FixtureRequest) -> None:
    fresh = [command for command in dict.fromkeys(commands(file)) if runs_here(command) and command not in DONE]
    DONE.update(fresh)
    # An earlier file's hosts may be there.
    shutil.copy(ROOT / "launch" / "cluster" / "hostfile", checkout / "my-hosts")
    on_hosts = [command for command in fresh if re.search(HOSTS, command) and "--dry-run" not in command]
    said = [run(changed(command, free_port()), checkout) for command in fresh if command not in on_hosts]
    assert not any(said), "\n\n".join(filter(None, said))
    if not on_hosts:
        return
    # Where two hosts can't be made this says why, after all else has run.
    hosts: Cluster = request.getfixturevalue("cluster")
    (checkout / "my-hosts").write_text("host-a slots=2\nhost-b slots=2\n")
    for command in on_hosts:
        hosts.run(["bash", "-c", f"cd {checkout} && {changed(command, 29500)}"], **AS_ROOT)


def run(command: str, checkout: Path) -> str | None:
    """What a command says in a shell of a user's, if it fails."""
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
                   "PATH": os.pathsep.join([str(checkout / "bin"), f"{sys.prefix}/bin", os.environ["PATH"]])}
    # The copy's own package, as after its installation.
    environment["PYTHONPATH"] = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(["bash", "-c", command], cwd=checkout, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, start_new_session=True) as process:
        try:
            said, _ = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f"$ {command}\nstill running after 240 s"
    return f"$ {command}\nstatus {process.returncode}\n{said[-3000:]}" if process.returncode else None
