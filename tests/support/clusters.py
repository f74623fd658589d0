"""Two hosts on this machine that jobs are started on, as on a cluster (bench/hosts.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hosts import INTERFACE, Host, missing, ssh_between, two_hosts

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "launch" / "cluster"
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@dataclass(frozen=True)
class Cluster:
    """Two hosts that let each other in; jobs are started on the first."""

    hosts: tuple[Host, Host]
    folder: Path
    ssh: Path

    def start(self, script: str, slots: tuple[int, ...], *arguments: str, **variables: str) -> str:
        """The output of a script of launch/cluster that starts a job on some slots of the hosts."""
        return self.run(["bash", str(SCRIPTS / script), *arguments], HOSTFILE=str(self.hostfile(slots)), **variables)

    def hostfile(self, slots: tuple[int, ...]) -> Path:
        """A hostfile with a number of slots for each host."""
        hostfile = self.folder / "hostfile"
        hostfile.write_text("# as many as there are slots for\n" + "".join(
            f"{host.name} slots={count}\n" for host, count in zip(self.hosts, slots)))
        return hostfile

    def run(self, command: list[str], **variables: str) -> str:
        """The output of a command that is run on the first host."""
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE,
                       "VIRTUAL_ENV": sys.prefix,
                       "PATH": os.pathsep.join([str(self.ssh), f"{sys.prefix}/bin", os.environ["PATH"]]), **variables}
        done = subprocess.run(self.hosts[0].command(command), cwd=self.folder, env=environment, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=240)
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout


def require(*programs: str) -> None:
    """Two hosts can be made here, with these programs too; else the test is skipped, or fails where it must run."""
    obstacle = missing(["ip", "unshare", *programs])
    if obstacle is not None:
        end = pytest.fail if os.environ.get("DS_VSHAPE_REQUIRE_CLUSTER") == "1" else pytest.skip
        end(f"two hosts on this machine: {obstacle}")


@contextmanager
def made_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster whose files are in `folder`."""
    require("pdsh", "ssh", "sshd", "mpirun")
    with two_hosts() as hosts, ssh_between(hosts, folder) as ssh:
        yield Cluster(hosts, folder, ssh)
