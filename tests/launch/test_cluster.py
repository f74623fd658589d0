"""Two hosts that share no network but a wire: the same training as on one, started as on a cluster.

The hosts are network namespaces with an sshd each (bench/hosts.py). Where that can't be, as for a user who isn't root,
these tests are skipped, and say why; with DS_VSHAPE_REQUIRE_CLUSTER=1, as in .ci/run, they fail instead.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from clusters import AS_ROOT, ROOT, SCRIPTS, Cluster
from hosts import Host, ssh_between, two_hosts
from result import JobResult

BATCHES = 3
WORDS = ["model=tiny", "schedule=v-half", "parallel.pipe=4", "data.micro_batches=4", f"batches={BATCHES}"]

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_the_losses_of_two_hosts_are_those_of_one(cluster: Cluster) -> None:
    def two_hosts_by_train() -> str:
        return cluster.run([sys.executable, str(ROOT / "launch" / "train.py"), *WORDS, f"result={results[0]}",
                            f"hostfile={cluster.hostfile((2, 2))}"])

    def one_host_by_script() -> str:
        return cluster.start("deepspeed.sh", (4,), "launch/train_rank.py", *WORDS, f"result={results[1]}")

    def two_hosts_by_mpirun() -> str:
        return cluster.start("openmpi.sh", (2, 2), "launch/train_rank.py", *WORDS, f"result={results[2]}", **AS_ROOT)

    results = [cluster.folder / name for name in ("across.json", "alone.json", "by_mpirun.json")]
    for start, named in ((two_hosts_by_train, True), (one_host_by_script, False), (two_hosts_by_mpirun, False)):
        said = start()
        # pdsh puts the host before each line.
        assert all((f"{host.name}: " in said) == named for host in cluster.hosts), said
    across, alone, by_mpirun = map(JobResult.read, results)
    assert (across.schedule, across.stages, len(across.losses)) == ("v-half", 4, BATCHES)
    for one in (alone, by_mpirun):
        assert across.losses == one.losses and across.validation_loss == one.validation_loss
    assert across.losses[0] > across.losses[-1]


ECHO = """
import socket
listener = socket.create_server(("", 5000))
print("ready", flush=True)
connection, _ = listener.accept()
while data := connection.recv(1):
    connection.sendall(data)
"""
PING = """
import socket, sys, time
connection, trips = socket.create_connection((sys.argv[1], 5000)), []
for _ in range(20):
    start = time.perf_counter()
    connection.sendall(b"x")
    connection.recv(1)
    trips.append(1000 * (time.perf_counter() - start))
print(min(trips))
"""


@pytest.mark.parametrize("milliseconds", [0, 5])
def test_a_wire_takes_the_time_it_is_told(cluster: Cluster, milliseconds: float) -> None:
    """The table of bench/cluster.py rests on it. The fastest of twenty round trips: nothing else is in the way then."""
    with two_hosts(milliseconds) as (a, b):
        with subprocess.Popen(b.command([sys.executable, "-c", ECHO]), stdout=subprocess.PIPE) as echo:
            assert echo.stdout is not None and echo.stdout.readline() == b"ready\n"
            trip = subprocess.run(a.command([sys.executable, "-c", PING, b.address]), capture_output=True, check=True)
        assert 2 * milliseconds <= float(trip.stdout) < 2 * milliseconds + 4


def running_on(host: Host) -> Iterator[str]:
    """The names of the programs that run there."""
    for pid in host.processes():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            yield Path(f"/proc/{pid}/comm").read_text().strip()


def test_nothing_is_left_where_a_job_fails(cluster: Cluster, tmp_path: Path) -> None:
    left = []
    with pytest.raises(ZeroDivisionError):
        with two_hosts(1) as hosts, ssh_between(hosts, tmp_path):
            left = [subprocess.Popen(host.command(["sleep", "600"])) for host in hosts]
            names = {host.namespace for host in hosts}
            while not all({"sshd", "sleep"} <= set(running_on(host)) for host in hosts):
                time.sleep(0.05)
            raise ZeroDivisionError
    assert [process.wait(timeout=10) for process in left] == [-signal.SIGKILL] * 2
    spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not any(name in spaces or Path("/etc/netns", name).exists() for name in names)


def test_a_host_that_lets_nobody_in_is_named(cluster: Cluster) -> None:
    hostfile = cluster.folder / "strangers"
    hostfile.write_text("host-a slots=1\nhost-c slots=1\n")
    for script in ("deepspeed.sh", "openmpi.sh"):
        with pytest.raises(AssertionError) as error:
            cluster.run(["bash", str(SCRIPTS / script), "launch/train_rank.py"], HOSTFILE=str(hostfile))
        assert "host-c: ssh: Could not resolve hostname host-c" in str(error.value)
        assert f"{hostfile} needs a login by ssh without a password, and {ROOT} and {sys.prefix}" in str(error.value)


@pytest.mark.parametrize("names", [
    {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "8"},
    {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"},
    # mpirun in a job of Slurm's, whose own task is the script.
    {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "8",
     "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"},
], ids=["mpirun", "srun", "mpirun in srun"])
def test_a_rank_knows_its_place(names: dict[str, str]) -> None:
    told = "import os, sys; print(*(os.environ[n] for n in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')), sys.argv[1:])"
    done = subprocess.run(["bash", SCRIPTS / "rank.sh", "-c", told, "batches=3"], cwd="/", text=True,
                          capture_output=True, check=True,
                          env={"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", **names})
    assert done.stdout == "5 1 8 ['batches=3']\n"


def test_ranks_of_mpirun_meet(cluster: Cluster) -> None:
    """Open MPI itself starts ranks on both hosts; they tell who they are, which takes no torch."""
    # In one write each: mpirun passes on what it reads, and would mix the parts of lines.
    told = ("import os, socket; os.write(1, ' '.join(['rank', *(os.environ[n] for n in "
            "('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'GLOO_SOCKET_IFNAME')), socket.gethostname(), "
            "'.\\n']).encode())")
    said = cluster.start("openmpi.sh", (2, 2), "-c", told, **AS_ROOT)
    assert sorted(re.findall(r"rank [^.]*? \.", said)) == [
        f"rank {rank} {rank % 2} 4 host-a eth0 {host.name} ."
        for rank, host in enumerate([cluster.hosts[0]] * 2 + [cluster.hosts[1]] * 2)]
