"""Process groups of ranks that aren't there, for modules on the meta device: collectives return at once.

Checked with DeepSpeed 0.19.8 (comm/comm.py, ops/__init__.py, module_inject/layers.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.comm import comm
from deepspeed.module_inject import set_autotp_mode


@contextmanager
def silent_group(ranks: int) -> Iterator[Any]:
    """A group of `ranks`, of which this process is the first.

    Raises:
        RuntimeError: in a process that is a rank of a job.
    """
    if dist.is_initialized():
        raise RuntimeError("layers are measured outside of jobs: this process is a rank of one")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        # It would compile a sum in shared memory, for minutes; it looks operators up in this table.
        deepspeed.ops.__compatible_ops__ = {}
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        set_autotp_mode(training=True)
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
        comm.cdb = None
