"""A limit for all that a rank needs: predicted by shapes, kept to by plans, refused on every rank if it is too low."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from typing import Any

import pytest
import torch
from deepspeed.runtime.pipe.module import PipelineError
from logged import Lines
from pipelines import FP32, FP32_ZERO1, SAMPLES, VOCABULARY, Block, Job, data, profiled, specs
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


class AutocastBlock(Block):
    """A block in low precision, whatever the config says."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


def reports(rank: int, config: dict[str, Any], block: type[Block]) -> list[tuple[RankMemory, ...]]:
    """After the first batch activations are those of shapes; after the second one they are measured."""
    without_process()
    engine = Job({"name": "v-half", "memory_limit": "1GiB"}, 2, 6, config, tuple(specs(BLOCKS, block))).engine()
    found = []
    for batch in range(2):
        engine.train_batch(data(engine, batch))
        found.append(engine.memory_report())
    return found


@pytest.mark.parametrize("config, block", [
    (FP32_ZERO1, Block), ({"pipeline": {"activation_checkpoint_interval": 1}}, Block),
    ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, Block), (FP32, AutocastBlock)],
    ids=["zero1", "checkpoints", "autocast", "autocast in layers"])
def test_sizes_by_shapes_are_those_that_are_measured(config: dict[str, Any], block: type[Block]) -> None:
    """Activations to 3%, passes to a tenth, or a few numbers that have no place in such small blocks."""
    (by_shapes, measured), other = run_ranks(2, reports, config, block)
    assert [by_shapes, measured] == other
    for ours, theirs in zip(by_shapes, measured, strict=True):
        assert ours.activations_peak == pytest.approx(theirs.activations_peak, rel=0.03, abs=256)
        assert ours.passes == pytest.approx(theirs.passes, rel=0.1, abs=512)
        assert ours.permanent == theirs.permanent


class ReadingBlock(Block):
    """A block that reads numbers of its input, which shapes don't have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (1.0 if len(torch.nonzero(x.detach())) > 0 else 2.0))


def train_without_shapes(rank: int, section: dict[str, Any]) -> tuple[list[float], list[RankMemory], list[str]]:
    with Lines() as lines:
        engine = Job(section, 2, 6, FP32, tuple(specs(BLOCKS, ReadingBlock))).engine()
        losses = [float(engine.train_batch(data(engine, batch))) for batch in range(3)]
    return losses, list(engine.memory_report()), lines.with_word("isn't known before")


def test_where_shapes_tell_nothing_sizes_are_known_when_they_are_measured() -> None:
    """Training starts as without a limit."""
    (plain, memory, _), _ = run_ranks(2, train_without_shapes, {"name": "v-half"})
    found = run_ranks(2, train_without_shapes, {"name": "v-half", "memory_limit": "100GiB"})
    for losses, known, _ in found:
        assert losses == plain
        assert [of_rank.activations_peak for of_rank in known] == [of_rank.activations_peak for of_rank in memory]
    assert [len(lines) for *_, lines in found] == [1, 0], found[0][2]


def refused_once_measured(rank: int, limit: int) -> list[tuple[str, int]]:
    """What each of three batches ends in, and how many steps are done by then."""
    without_process()
    section = {"name": "v-half", "memory_limit": f"{limit}B"}
    engine = Job(section, 2, 6, FP32, tuple(specs(BLOCKS, ReadingBlock))).engine()
    found = []
    for batch in range(3):
        told = ""
        try:
            engine.train_batch(data(engine, batch))
        except PipelineError as error:
            told = str(error)
        found.append((told, engine.global_steps))
    return found


def test_a_limit_that_is_broken_once_sizes_are_measured_stays_broken() -> None:
    """A script that goes on trains nothing any more."""
    def most(rank: int) -> int:
        without_process()
        return max(of_rank.total for of_rank in train_without_shapes(rank, {"name": "v-half"})[1])

    limit = run_ranks(2, most)[0] - 100
    for before, measured, after in run_ranks(2, refused_once_measured, limit):
        assert before == ("", 1) and measured[1] == after[1] == 2 and measured[0] == after[0]
        assert measured[0].startswith("pipeline_schedule.memory_limit = ") and "v-half needs" in measured[0]


def needs(rank: int, limit: str, config: dict[str, Any]) -> tuple[list[RankMemory], list[str], list[Schedule]]:
    """What ranks need before the first batch, by the log, and after an adaptive schedule has come, and another one
    for more micro-batches."""
    without_process()
    with Lines() as lines:
        engine = job(profiled("adaptive", memory_limit=limit), config).engine()
        batches, memory, planned = count(), list[RankMemory](), list[Schedule]()
        for more in (0, 2):
            engine.set_train_batch_size(engine.train_batch_size() + more * SAMPLES)
            while engine.planned_times is None:
                engine.train_batch(data(engine, next(batches)))
                time.sleep(0.1)
            memory += engine.memory_report()
            planned.append(engine.schedule())
    return memory, lines.with_word("by its shapes"), planned


def test_a_plan_keeps_to_the_limit() -> None:
    """With Adam's states and ZeRO-1; of what is asked for, nearly all is used."""
    limit = 60_000
    (memory, lines, planned), other = run_ranks(2, needs, f"{limit}B", FP32_ZERO1)
    assert (memory, planned) == (other[0], other[2]) and {schedule.name for schedule in planned} == {"adaptive"}
    assert planned[1].micro_batches == planned[0].micro_batches + 2
    assert len(lines) == 2 and all("will need" in line for line in lines)
    assert all(of_rank.total <= limit for of_rank in memory)


def refused(rank: int, section: Any, config: dict[str, Any], batch: Callable[[Any, int], Any] = data) -> None:
    without_process()
    engine = job(section, config).engine()
    with suppress(PipelineError):
        engine.train_batch(batch(engine, 0))
    # Not by a script that goes on either.
    engine.train_batch(batch(engine, 0))


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


@pytest.mark.parametrize("recompute, offload", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("room", [1.0, 1.15, 1.5, 2.5])
def test_plans_are_within_limits_with_running_passes(room: float, recompute: bool, offload: bool) -> None:
    smallest = one_at_a_time(v(2), SIZES, 5, recompute=recompute, offload=offload)
    least = peaks_with_passes(smallest, SIZES, WORKING)
    limits = tuple(room * peak for peak in least)

    def planned(left: tuple[float, ...]) -> Schedule:
        problem = Problem(v(2), 5, TIMES, SIZES, left, recompute=recompute, offload=offload)
        return plan(problem, 0.2, cache=None).schedule

    found = plan_within(limits, peak_activations(smallest, SIZES), build("v-min", 2, 5), smallest, SIZES, WORKING,
                        planned)
    check(found)
    assert all(peak <= limit * (1 + 1e-9) for peak, limit in
               zip(peaks_with_passes(found, SIZES, WORKING), limits, strict=True))


def test_limits_below_the_least_are_refused() -> None:
    smallest = one_at_a_time(v(2), SIZES)
    least = peaks_with_passes(smallest, SIZES, WORKING)
    with pytest.raises(LimitError, match="the least possible peaks of the ranks are"):
        plan_within((least[0] * 0.99, least[1]), peak_activations(smallest, SIZES), build("v-min", 2, 5), smallest,
                    SIZES, WORKING, lambda left: build("v-min", 2, 5))


@pytest.mark.parametrize("recompute, offload", [(True, False), (False, True), (True, True)])
def test_the_least_is_what_the_planner_takes_for_it(recompute: bool, offload: bool) -> None:
    """Also where a stage is better not recomputed, and another one not offloaded."""
    placement = v(3)
    sizes = Activations((30.0, 20.0, 25.0, 35.0, 9.0, 12.0), (10.0,) * 6, recomputed=(
        (20.0, 4.0), (20.0, 21.0), (25.0, 3.0), (35.0, 30.0), (9.0, 5.0), (12.0, 6.0)),
        offloadable=(10.0, 20.0, 24.0, 1.0, 9.0, 12.0))
    smallest = one_at_a_time(placement, sizes, 2, recompute=recompute, offload=offload)
    check(smallest)
    free = Problem(placement, 2, Times.uniform(6), sizes, (1e9,) * 3, recompute=recompute, offload=offload)
    assert peak_activations(smallest, sizes) == free.least


# -- limits that no order keeps to, with recomputation and offload

GIVES_BACK = {"recompute": True, "offload": True}


def long(engine: Any, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches of so many tokens that activations are most of the memory."""
    generator = torch.Generator().manual_seed(batch)
    for _ in range(engine.micro_batches):
        tokens = torch.randint(VOCABULARY, (2, 257), generator=generator)
        yield tokens[:, :-1], tokens[:, 1:]


def reports_of_giving_back(rank: int) -> list[tuple[RankMemory, ...]]:
    without_process()
    engine = job(profiled("adaptive", memory_limit="1GiB", **GIVES_BACK), FP32_ZERO1).engine()
    found = []
    for batch in range(2):
        engine.train_batch(data(engine, batch))
        found.append(engine.memory_report())
    return found


def test_sizes_by_shapes_of_what_is_recomputed_and_offloaded() -> None:
    """Under a schedule with both."""
    (by_shapes, measured), other = run_ranks(2, reports_of_giving_back)
    assert [by_shapes, measured] == other
    for ours, theirs in zip(by_shapes, measured, strict=True):
        assert ours.activations_peak == pytest.approx(theirs.activations_peak, rel=0.03, abs=256)
        assert ours.passes == pytest.approx(theirs.passes, rel=0.1, abs=512)


def least_by_its_error(section: dict[str, Any]) -> int:
    """The bytes that the error for a limit of nothing says would do."""
    with pytest.raises(RanksFailed) as error:
        run_ranks(2, refused, profiled("adaptive", memory_limit="1KB", **section), FP32_ZERO1, long)
    told = str(error.value)
    assert told.count("PipelineError: pipeline_schedule.memory_limit = 1000 B: ") == 2
    assert told.count("by shapes, before training") == 2
    number, unit = re.findall(r"the least possible is ([\d.]+) (KiB|B) on rank", told)[0]
    totals = re.findall(r"([\d.]+) KiB on rank \d", told)
    assert unit == "KiB" and number in totals
    return round(1024 * max(map(float, totals)) * 1.002)


def losses_within(rank: int, limit: int, section: dict[str, Any]) -> tuple[list[float], Schedule, list[RankMemory]]:
    without_process()
    engine = job(profiled("adaptive", memory_limit=f"{limit}B", **section), FP32_ZERO1).engine()
    losses = [float(engine.train_batch(long(engine, batch))) for batch in range(3)]
    return losses, engine.schedule(), [*engine.memory_report()]


def losses_without(rank: int) -> list[float]:
    engine = job("v-half", FP32_ZERO1).engine()
    return [float(engine.train_batch(long(engine, batch))) for batch in range(3)]


def test_what_no_order_keeps_to_recomputation_and_offload_do() -> None:
    """Refused before the first batch if they don't either; the limit that the error names is one that they keep to,
    with everything recomputed or offloaded, the micro-batch that is measured too."""
    by_order, by_both = least_by_its_error({}), least_by_its_error(GIVES_BACK)
    assert by_both < 0.95 * by_order
    (losses, schedule, memory), other = run_ranks(2, losses_within, by_both, GIVES_BACK)
    assert (losses, schedule, memory) == other and losses == run_ranks(2, losses_without)[0]
    assert schedule.gives_back_memory and all(of_rank.total <= by_both for of_rank in memory)


def another_size(rank: int, limit: Any, micro_batches: int) -> tuple[Any, list[float]]:
    """What comes of more micro-batches once sizes are known, and the losses of a batch after that."""
    without_process()
    engine = Job(profiled("adaptive", memory_limit=limit), 2, 1, FP32_ZERO1, tuple(specs(BLOCKS))).engine()
    losses = [float(engine.train_batch(data(engine, batch))) for batch in range(2)]
    try:
        engine.set_train_batch_size(micro_batches * SAMPLES)
        found: Any = engine.schedule(), engine.memory_report()
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    return found, [*losses, float(engine.train_batch(data(engine, 2)))]


def test_another_number_of_micro_batches_keeps_to_the_limit() -> None:
    """The table's least has more activations at once than one micro-batch takes: with room for little more than that,
    an order that needs less takes its place, and with less the size is refused and the old one trains on."""
    (schedule, memory), _ = run_ranks(2, another_size, "1GiB", 6)[0][0], None
    one = run_ranks(2, another_size, "1GiB", 1)[0][0][1]
    least, table = (max(of_rank.total for of_rank in of_all) for of_all in (one, memory))
    assert least < table
    limit = (least + 2 * table) // 3
    (found, _), (other, _) = run_ranks(2, another_size, f"{limit}B", 6)
    assert found == other and not isinstance(found, str)
    assert found[0].micro_batches == 6 and found[0] != schedule
    assert all(of_rank.total <= limit for of_rank in found[1])


def test_a_size_for_which_there_is_no_room_is_refused_by_name() -> None:
    (told, _), (other, _) = run_ranks(2, another_size, {"activations": "100"}, 6)
    assert told == other
    assert told.startswith("PipelineError: pipeline_schedule.memory_limit.activations = 100 bytes: a limit of 100")


def resized(rank: int, section: dict[str, Any], first: int, second: int) -> tuple[str, list[float]]:
    engine = Job(section, 2, first, FP32, tuple(specs(BLOCKS))).engine()
    losses = [float(engine.train_batch(data(engine, 0)))]
    told = "no error"
    try:
        engine.set_train_batch_size(second * SAMPLES)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    assert engine.micro_batches == first
    return told, [*losses, float(engine.train_batch(data(engine, 1)))]


@pytest.mark.parametrize("section, first, second", [
    ({"name": "gpipe", "memory_limit": 1.5}, 2, 6), (profiled("adaptive", memory_limit=0.9), 4, 1)],
    ids=["named", "planned"])
def test_a_size_that_the_limit_forbids_is_refused_when_it_is_set(section: dict[str, Any], first: int,
                                                                 second: int) -> None:
    """On every rank, and training goes on with the old one. With one micro-batch each schedule has 1F1B's peak."""
    (told, losses), other = run_ranks(2, resized, section, first, second)
    assert (told, losses) == other
    assert told.startswith(f"MemoryLimitError: pipeline_schedule.memory_limit = {section['memory_limit']}: ")
    assert f"on 2 ranks with {second} micro-batches" in told
