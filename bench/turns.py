"""Contenders whose batches take turns in one run, on the same data."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from workloads import Workload


class Turns:
    """Trains engines by name, each on the workload's batches from the first one on (collective); keeps all losses."""

    def __init__(self, engines: Mapping[str, Any], workload: Workload) -> None:
        self.engines, self._workload = engines, workload
        self.losses: dict[str, list[float]] = {name: [] for name in engines}

    def train(self, name: str) -> float:
        """The seconds of the next batch, from all ranks' start to the last one's end."""
        data = iter(self._workload.batch(len(self.losses[name])))
        dist.barrier()
        start = time.perf_counter()
        self.losses[name].append(float(self.engines[name].train_batch(data)))
        dist.barrier()
        return time.perf_counter() - start
