"""A host that is cut off in a batch: no connection is closed, but every rank ends with an error that says why."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clusters import require
from hosts import INTERFACE, two_hosts

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SUPPORT = Path(__file__).parents[1] / "support"
SECONDS = 8
PLACES = [0, 0, 1]  # the host of each rank
SCRIPT = f"""
import os, sys, time
sys.path.insert(0, {str(SUPPORT)!r})
import ranks
import deepspeed
from pipelines import Job, data
deepspeed.init_distributed("gloo")
engine = Job({{"name": "v-half", "timeout_seconds": {SECONDS}}}, {len(PLACES)}, 6).engine()

def slowly(batch):
    # Nearly all of a batch is passes, so that the link is cut in one.
    for micro_batch in data(engine, batch):
        time.sleep(0.3)
        yield micro_batch

for batch in range(10**6):
    engine.train_batch(slowly(batch))
    open(sys.argv[1] + os.environ["RANK"], "w").write(str(engine.global_steps))
"""


def test_every_rank_ends_when_a_host_is_cut_off(tmp_path: Path) -> None:
    require()
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done, logs = ([tmp_path / f"{name}{rank}" for rank in range(len(PLACES))] for name in ("done", "log"))
    with two_hosts() as hosts:
        jobs = []
        for rank, place in enumerate(PLACES):
            environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
                           "GLOO_SOCKET_IFNAME": INTERFACE, "MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29500",
                           "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(PLACES))}
            command = hosts[place].command([sys.executable, str(script), str(tmp_path / "done")])
            with logs[rank].open("w") as log:
                jobs.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log,
                                             stderr=subprocess.STDOUT))
        deadline = time.monotonic() + 120
        while not all(path.exists() for path in done):
            assert time.monotonic() < deadline, "\n".join(log.read_text()[-3000:] for log in logs)
            time.sleep(0.1)
        subprocess.run(hosts[1].command(["ip", "link", "set", INTERFACE, "down"]), check=True)
        cut = time.monotonic()
        try:
            statuses = [job.wait(timeout=60) for job in jobs]
        finally:
            for job in jobs:
                job.kill()
                job.wait()
        took = time.monotonic() - cut
    assert all(statuses)
    # A rank that ended is seen by those on its host, whose own wait may have begun a moment after its.
    assert took < 2 * SECONDS + 10, took
    for rank, path in enumerate(logs):
        told, = re.findall(r"ds_vshape.comm.channels.PeerLost: (.*)$", path.read_text(), flags=re.MULTILINE)[-1:]
        assert re.match(rf"pipeline rank {rank} on host-[ab] waits in \w+( of stage \d, micro-batch \d)?: ", told)
        assert f"global rank {0 if rank == 2 else 2}, on " in told and "no sign of life" in told
        assert re.search(r"the last batch done is number \d+$", told)
