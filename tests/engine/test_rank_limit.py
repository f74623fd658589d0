"""A limit for all that a rank needs: predicted by shapes, kept to by plans, refused on every rank if it is too low."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.runtime.pipe.module import PipelineError
from logged import Lines
from pipelines import FP32, FP32_ZERO1, Block, Job, data, profiled, specs
from ranks import RanksFailed, run_ranks
from torch import Tensor

from ds_vshape.measure import accounting
from ds_vshape.measure.rank_memory import RankMemory
from ds_vshape.schedule.activations import Activations, Working, peak_activations
from ds_vshape.schedule.adaptive import Problem, plan
from ds_vshape.schedule.adaptive.problem import LimitError
from ds_vshape.schedule.named import build
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.schedule import Schedule, check
from ds_vshape.schedule.timeline import Times
from ds_vshape.schedule.within import one_at_a_time, peaks_with_passes, plan_within

pytestmark = pytest.mark.usefixtures("cache")
BLOCKS = 10


def without_process() -> None:
    """The memory of the process alone would hide that of these small models."""
    accounting.process_bytes = lambda device, tensors: 0  # type: ignore[assignment]


def job(section: Any, config: dict[str, Any] = FP32) -> Job:
    return Job(section, 2, 6, config, tuple(specs(BLOCKS)))


def reports(rank: int, config: dict[str, Any]) -> list[tuple[RankMemory, ...]]:
    """After the first batch activations are those of shapes; after the second one they are measured."""
    without_process()
    engine = job({"name": "v-half", "memory_limit": "1GiB"}, config).engine()
    found = []
    for batch in range(2):
        engine.train_batch(data(engine, batch))
        found.append(engine.memory_report())
    return found


@pytest.mark.parametrize("config", [FP32_ZERO1, {"pipeline": {"activation_checkpoint_interval": 1}}],
                         ids=["zero1", "checkpoints"])
def test_sizes_by_shapes_are_those_that_are_measured(config: dict[str, Any]) -> None:
    """Activations to 3%, passes to a tenth, or a few numbers that have no place in such small blocks."""
    (by_shapes, measured), other = run_ranks(2, reports, config)
    assert [by_shapes, measured] == other
    for ours, theirs in zip(by_shapes, measured, strict=True):
        assert ours.activations_peak == pytest.approx(theirs.activations_peak, rel=0.03, abs=256)
        assert ours.passes == pytest.approx(theirs.passes, rel=0.1, abs=512)
        assert ours.permanent == theirs.permanent


class AutocastBlock(Block):
    """A block in low precision, whatever the config says."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


def under_autocast(rank: int, config: dict[str, Any], block: type[Block]) -> tuple[list[str], int | None]:
    """What the log says of sizes before the first batch, and activations as they are measured in the second one."""
    without_process()
    with Lines() as lines:
        engine = Job({"name": "v-half", "memory_limit": "1GiB"}, 2, 6, config, tuple(specs(BLOCKS, block))).engine()
        engine.train_batch(data(engine, 0))
    with pytest.raises(PipelineError, match="measured in training batch 2"):
        engine.memory_report()
    engine.train_batch(data(engine, 1))
    return lines.with_word("isn't known before"), engine.memory_report()[rank].activations_peak


@pytest.mark.parametrize(("config", "block"), [
    ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, Block), (FP32, AutocastBlock)],
    ids=["config", "layer"])
def test_sizes_under_autocast_are_unknown_until_they_are_measured(config: dict[str, Any], block: type[Block]) -> None:
    """On the meta device they would be those of full precision."""
    (lines, measured), (_, measured_too) = run_ranks(2, under_autocast, config, block)
    assert [line.partition(": stage 0: ")[2] for line in lines] == [
        "NotImplementedError: autocast has no effect on the meta device"]
    assert measured and measured_too


def needs(rank: int, limit: str, config: dict[str, Any]) -> tuple[list[RankMemory], list[str], Schedule]:
    """What ranks need before the first batch, by the log, and after an adaptive schedule has come."""
    without_process()
    with Lines() as lines:
        engine = job(profiled("adaptive", memory_limit=limit), config).engine()
        first = engine.schedule()
        for batch in range(400):
            engine.train_batch(data(engine, batch))
            if engine.schedule() is not first:
                break
    return [*engine.memory_report()], lines.with_word("by its shapes"), engine.schedule()


def test_a_plan_keeps_to_the_limit() -> None:
    """With Adam's states and ZeRO-1; of what is asked for, nearly all is used."""
    limit = 60_000
    (memory, lines, schedule), other = run_ranks(2, needs, f"{limit}B", FP32_ZERO1)
    assert (memory, schedule) == (other[0], other[2]) and schedule.name == "adaptive"
    assert len(lines) == 2 and all("will need" in line for line in lines)
    assert all(of_rank.total <= limit for of_rank in memory)


def refused(rank: int, section: Any, config: dict[str, Any]) -> None:
    without_process()
    engine = job(section, config).engine()
    engine.train_batch(data(engine, 0))


@pytest.mark.parametrize("section", [{"name": "v-zb", "memory_limit": "20KB"},
                                     profiled("adaptive", memory_limit="20KB")], ids=["named", "planned"])
def test_what_cannot_be_met_is_refused_before_the_first_batch(section: Any) -> None:
    with pytest.raises(RanksFailed) as error:
        run_ranks(2, refused, section, FP32_ZERO1)
    told = str(error.value)
    assert told.count("PipelineError: pipeline_schedule.memory_limit = 19.53 KiB: ") == 2
    assert told.count("needs most, ") == 2 and told.count("for optimizer") == 2
    assert told.count("by shapes, before training") == 2
    assert "least possible" in told


# -- plans within limits that hold for running passes

SIZES = Activations((30.0, 20.0, 25.0, 35.0), (10.0, 12.0, 9.0, 14.0))
WORKING = Working((5.0, 6.0, 5.0, 9.0), (9.0, 8.0, 9.0, 20.0), (8.0, 7.0, 8.0, 15.0), (1.0, 2.0, 1.0, 3.0), (2.0,) * 4)
TIMES = Times((3.0, 2.0, 2.0, 4.0), (3.0, 3.0, 2.0, 4.0), (2.0, 2.0, 2.0, 3.0))


@pytest.mark.parametrize("room", [1.0, 1.15, 1.5, 2.5])
def test_plans_are_within_limits_with_running_passes(room: float) -> None:
    least = peaks_with_passes(one_at_a_time(v(2)), SIZES, WORKING)
    limits = tuple(room * peak for peak in least)

    def planned(left: tuple[float, ...]) -> Schedule:
        return plan(Problem(v(2), 5, TIMES, SIZES, left), 0.2, cache=None).schedule

    alive = peak_activations(one_at_a_time(v(2)), SIZES)
    found = plan_within(limits, alive, build("v-min", 2, 5), SIZES, WORKING, planned)
    check(found)
    assert all(peak <= limit * (1 + 1e-9) for peak, limit in
               zip(peaks_with_passes(found, SIZES, WORKING), limits, strict=True))


def test_limits_below_the_least_are_refused() -> None:
    least = peaks_with_passes(one_at_a_time(v(2)), SIZES, WORKING)
    with pytest.raises(LimitError, match="the least possible peaks of the ranks are"):
        plan_within((least[0] * 0.99, least[1]), peak_activations(one_at_a_time(v(2)), SIZES), build("v-min", 2, 5),
                    SIZES, WORKING, lambda left: build("v-min", 2, 5))
