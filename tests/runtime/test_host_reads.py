"""Inside a batch no instruction reads a tensor's value on the host: on a GPU each such read would wait for the device,
and no pass could be launched ahead. At the end of the batch DeepSpeed's step reads norm and overflow."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from host_reads import reads_of_batch
from pipelines import BF16_ZERO1_FP32, FP32, FP32_ZERO1, Block, Job, data, specs
from ranks import run_ranks
from torch import Tensor

END = {"AgreeOnBatch", "OptimizerStep"}


class Reading(Block):
    """A block that reads a value."""

    def forward(self, x: Tensor) -> Tensor:
        x.detach().sum().item()
        return super().forward(x)


def reads(rank: int, job: Job) -> dict[str, int]:
    engine = job.engine()
    return reads_of_batch(engine, partial(data, engine))


@pytest.mark.quick_cases("v-half-bf16 ZeRO-1", "1f1b-fp32")
@pytest.mark.parametrize("config", [FP32, FP32_ZERO1, BF16_ZERO1_FP32], ids=["fp32", "fp32 ZeRO-1", "bf16 ZeRO-1"])
@pytest.mark.parametrize("schedule", ["1f1b", "v-half"])
def test_only_the_end_of_a_batch_reads_values(schedule: str, config: dict[str, Any]) -> None:
    for found in run_ranks(2, reads, Job(schedule, 2, 4, {**config, "gradient_clipping": 1.0})):
        assert set(found) <= END, found


def test_a_read_in_a_layer_is_found() -> None:
    for found in run_ranks(2, reads, Job("v-half", 2, 4, FP32_ZERO1, tuple(specs(3, Reading)))):
        assert {"SplitForwardPass"} <= set(found) - END <= {"ForwardPass", "SplitForwardPass"}, found
