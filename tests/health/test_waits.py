"""Which errors are about a connection, whoever raises them."""

from __future__ import annotations

import pytest
from deepspeed.runtime.pipe.module import PipelineError

from ds_vshape.checkpoint.errors import CheckpointError
from ds_vshape.comm.channels import PeerLost
from ds_vshape.health.waits import is_ended_wait

SOURCE = "/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp"


@pytest.mark.parametrize("error", [
    PeerLost("pipeline rank 1 is lost"),
    RuntimeError(f"[{SOURCE}/pair.cc:547] Connection closed by peer [127.0.0.1]:3728"),
    RuntimeError(f"[{SOURCE}/unbound_buffer.cc:78] Timed out waiting 1000ms for recv operation to complete"),
    RuntimeError(f"[enforce fail at {SOURCE}/pair.cc:30] rv != -1"),
    RuntimeError("Gloo connectFullMesh failed with timeout"),
    RuntimeError("Application timeout caused pair closure"),
    RuntimeError("ProcessGroupWrapper: Monitored Barrier encountered error running collective: ALLREDUCE. Error: \n"
                 f"[{SOURCE}/pair.cc:547] Connection closed by peer"),
    RuntimeError("NCCL communicator was aborted on rank 1."),
])
def test_errors_of_a_connection(error: Exception) -> None:
    assert is_ended_wait(error)


@pytest.mark.parametrize("error", [
    CheckpointError("there is no checkpoint 'best' in runs/nccl-tests"),
    PipelineError("the inputs of a micro-batch are from /data/gloo/1.pt"),
    RuntimeError("can't read /data/igloo/1.wav"),
    RuntimeError("can't read /data/gloo/1.wav"),
    RuntimeError('Caught RuntimeError in DataLoader worker process 0.\n  File "/home/me/gloo-test/data.py", line 3'),
    ValueError("NCCL"),
])
def test_errors_that_only_have_the_words(error: Exception) -> None:
    assert not is_ended_wait(error)
