"""Inside a batch no instruction reads a tensor's value on the host: on a GPU each such read would wait for the device,
and no pass could be launched ahead. At the end of the batch DeepSpeed's step reads norm and overflow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from instruction_functions import around_instruction
from internals import replace_background
from pipelines import BF16_ZERO1_FP32, FP32, FP32_ZERO1, Block, Job, data, specs
from ranks import run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ds_vshape.deepspeed_adapter.engine import instructions_of

# What hands a value, or a shape that depends on values, to the host.
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_consecutive", "_unique2"}
END = {"AgreeOnBatch", "OptimizerStep"}


class Reads(TorchDispatchMode):
    """Counts reads of values by the instruction in which they happen."""

    def __init__(self) -> None:
        super().__init__()
        self.instruction = ""
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READS:
            self.found[self.instruction] += 1
        return func(*args, **(kwargs or {}))


class AtOnce:
    """Runs background work at once, so that its reads are seen."""

    def start(self, work: Callable[[], Any], uses: Iterable[Tensor] = ()) -> AtOnce:
        with torch.no_grad():
            self.value = work()
        return self

    def result(self, timeout: float | None = None) -> Any:
        return self.value


class Reading(Block):
    """A block that reads a value."""

    def forward(self, x: Tensor) -> Tensor:
        x.detach().sum().item()
        return super().forward(x)


def reads(rank: int, job: Job) -> dict[str, int]:
    """Reads in a batch after shapes are known and activations are measured, by instruction."""
    engine = job.engine()
    for batch in range(3):
        engine.train_batch(data(engine, batch))
    replace_background(engine, AtOnce())
    seen = Reads()

    def watched(name: str, execute: Callable[[], None]) -> None:
        seen.instruction = name
        execute()
        seen.instruction = ""

    for kind in instructions_of(engine):
        around_instruction(engine, kind, partial(watched, kind.__name__))
    with seen:
        engine.train_batch(data(engine, 3))
    return dict(seen.found)


@pytest.mark.quick_cases("v-half-bf16 ZeRO-1", "1f1b-fp32")
@pytest.mark.parametrize("config", [FP32, FP32_ZERO1, BF16_ZERO1_FP32], ids=["fp32", "fp32 ZeRO-1", "bf16 ZeRO-1"])
@pytest.mark.parametrize("schedule", ["1f1b", "v-half"])
def test_only_the_end_of_a_batch_reads_values(schedule: str, config: dict[str, Any]) -> None:
    for found in run_ranks(2, reads, Job(schedule, 2, 4, {**config, "gradient_clipping": 1.0})):
        assert set(found) <= END, found


def test_a_read_in_a_layer_is_found() -> None:
    for found in run_ranks(2, reads, Job("v-half", 2, 4, FP32_ZERO1, tuple(specs(3, Reading)))):
        assert {"SplitForwardPass"} <= set(found) - END <= {"ForwardPass", "SplitForwardPass"}, found
