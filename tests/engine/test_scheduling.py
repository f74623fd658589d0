"""Schedules that know the measured times: found during training, swapped on all ranks at the same batch."""

from __future__ import annotations

import errno
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec
from deepspeed.runtime.pipe.module import PipelineError
from instruction_functions import around_instruction
from layers import SleepingLinear
from logged import Lines
from pipelines import FP32_ZERO1, SAMPLES, Job, Outcome, data, merged, profiled, specs, train
from ranks import RanksFailed, run_ranks
from torch import Tensor, nn
from torch.nn import functional

import ds_vshape
from ds_vshape.config.section import ConfigError
from ds_vshape.engine import engine as engine_module
from ds_vshape.engine import planning, scheduling
from ds_vshape.engine.planning import Planner
from ds_vshape.measure import keeping
from ds_vshape.measure.profiling import mean_times
from ds_vshape.runtime.instructions import InputGradPass, SplitForwardPass, WeightGradPass
from ds_vshape.schedule.activations import Activations, peak_activations
from ds_vshape.schedule.builders.fuse import unfused
from ds_vshape.schedule.memory_limit import peak_of_1f1b
from ds_vshape.schedule.named import TIMED, build
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.request import Request
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Span, Timeline, Times, simulate

pytestmark = pytest.mark.usefixtures("cache")
WIDTH = 4
PASSES = (SplitForwardPass, InputGradPass, WeightGradPass)
# Milliseconds of F, B and W of each layer whose times are measured.
SLEEPS = (6, 12, 3)


def train_until_swapped(engine: Any) -> tuple[list[float], int]:
    """The losses up to the first batch after which the schedule is another one, and its number."""
    losses = [float(engine.train_batch(data(engine, 0)))]
    while engine.planned_times is None:
        # The planning process gives way to those that train.
        time.sleep(0.1)
        losses.append(float(engine.train_batch(data(engine, len(losses)))))
    return losses, len(losses) - 1


def swap_and_train(rank: int, job: Job) -> tuple[list[float], int, Any, Outcome]:
    engine = job.engine()
    losses, swapped_at = train_until_swapped(engine)
    return losses, swapped_at, engine.schedule(), train(engine, range(swapped_at + 1, swapped_at + 4))


def train_throughout(rank: int, job: Job, batches: int) -> tuple[list[float], Outcome]:
    engine = job.engine()
    losses = train(engine, range(batches)).losses
    return losses, train(engine, range(batches, batches + 3))


@pytest.mark.parametrize("name", ["adaptive", "v-half"])
@pytest.mark.quick_cases("adaptive")
def test_all_ranks_swap_at_the_same_batch_and_losses_stay(name: str) -> None:
    """Two pipelines of two ranks; bit for bit what DeepSpeed's own engine trains."""
    swapped = run_ranks(4, swap_and_train, Job(profiled(name), 2, 5, FP32_ZERO1))
    losses, at, schedule, _ = swapped[0]
    assert all((other[0], other[1], other[2]) == (losses, at, schedule) for other in swapped)
    assert at >= scheduling.MEASURED_BATCHES + 1 and schedule.name == name
    oracle = run_ranks(4, train_throughout, Job(None, 2, 5, FP32_ZERO1), at + 1)
    assert losses == oracle[0][0]
    ours, theirs = merged([rank[3] for rank in swapped]), merged([rank[1] for rank in oracle])
    assert ours.losses == theirs.losses
    assert all(torch.equal(ours.weights[key], value) for key, value in theirs.weights.items())


def sleeping_engine(section: Any, micro_batches: int, milliseconds: tuple[float, ...]) -> Any:
    return engine_of([LayerSpec(SleepingLinear, WIDTH, tuple(ms / 1000 for ms in milliseconds)) for _ in range(4)],
                     section, micro_batches)


def engine_of(layers: list[LayerSpec], section: Any, micro_batches: int) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": SAMPLES,
        "gradient_accumulation_steps": micro_batches,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "pipeline_schedule": section,
    }
    module = ds_vshape.PipelineModule(layers, num_stages=2, partition_method="uniform",
                                      loss_fn=functional.mse_loss, config=config)
    return ds_vshape.initialize(model=module, model_parameters=module.parameters(), config=config)[0]


def sleep_batch(engine: Any) -> None:
    engine.train_batch(iter([(torch.ones(SAMPLES, WIDTH), torch.zeros(SAMPLES, WIDTH))] * engine.micro_batches))


def measure_and_swap(rank: int, section: Any) -> dict[str, Any]:
    took: dict[type, list[float]] = defaultdict(list)

    def timed(kind: type, execute: Callable[[], None]) -> None:
        start = time.perf_counter()
        execute()
        took[kind].append(time.perf_counter() - start)

    with Lines() as lines:
        engine = sleeping_engine(section, 6, SLEEPS)
        for kind in PASSES:
            around_instruction(engine, kind, partial(timed, kind))
        first = engine.schedule()
        while engine.planned_times is None:
            sleep_batch(engine)
        sleep_batch(engine)
    predicted, measured = engine.timelines()
    return {"times": engine.planned_times, "first": first, "schedule": engine.schedule(), "predicted": predicted,
            "measured": measured, "lines": lines.with_word("makespan"),
            "longest": [max(took[kind]) for kind in PASSES]}


def test_times_are_measured_and_used() -> None:
    results = run_ranks(2, measure_and_swap, profiled("adaptive", memory_limit=0.75))
    first = results[0]
    assert all(other["times"] == first["times"] and other["schedule"] == first["schedule"] for other in results)
    times: Times = first["times"]
    # At least as long as the layers sleep. On a busy machine passes take longer, but none longer than a clock around it
    # says.
    for rank, own in enumerate(results):
        kinds = (times.forward, times.input_grad, times.weight_grad)
        for of_kind, slept, longest in zip(kinds, SLEEPS, own["longest"], strict=True):
            for stage in v(2).chunks[rank]:
                assert slept / 1000 <= of_kind[stage] <= longest, (times, own["longest"])
    # Both boundaries between the ranks; none at the turn.
    assert times.hops[1] == 0 and all(0 < times.hops[boundary] < 1 for boundary in (0, 2))
    assert not any(action.kind is Kind.BW for _, action in first["first"].passes()), "B and W must be timed apart"
    schedule = first["schedule"]
    limit = 0.75 * peak_of_1f1b(2, 6)
    assert max(peak_activations(schedule, Activations.counted(v(2)))) <= limit + 1e-9
    # No named schedule keeps so little on two ranks: the first one was planned too, for equal times.
    assert all(max(peak_activations(build(name, 2, 6))) > limit for name in TIMED)
    assert max(peak_activations(first["first"])) <= limit
    # However little a planner finds that gives way to busy ranks.
    assert simulate(schedule, times).makespan <= simulate(first["first"], times).makespan * (1 + 1e-9)
    assert first["predicted"] == simulate(schedule, times)
    assert first["measured"].makespan >= simulate(schedule, Times.uniform(4, *(ms / 1000 for ms in SLEEPS))).makespan
    planned, compared = first["lines"]
    assert "planned in" in planned and "predicted" in compared and "measured" in compared


def test_pieces_of_a_weight_gradient_count_together() -> None:
    """They are cut by layers, so a stage of one layer has all of it in one piece."""
    pieces = [Span(action, start, end) for action, (start, end) in
              zip(Pass.parse("W1.0").cut(2), ((4.0, 7.0), (7.0, 7.0)), strict=True)]
    spans = (Span(Pass.parse("F1.0"), 0.0, 1.0), Span(Pass.parse("B1.0"), 2.0, 4.0), *pieces,
             Span(Pass.parse("W1.1"), 8.0, 11.0))
    samples = scheduling.StageSamples()
    samples.add(spans, {})
    assert samples.averages(2) == [[0, 0, 0], [1, 2, 3]]
    assert mean_times(Timeline((spans,)), 2) == Times((0, 1), (0, 2), (0, 3))


class HeadBesideLayers(nn.Module):
    """Three small layers and one whose W takes three times as long as theirs together."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(SleepingLinear(WIDTH, (0, 0, seconds)) for seconds in (0.002,) * 3 + (0.018,)))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layers(x)
        return output


def pieces_as_they_are(rank: int) -> dict[str, Any]:
    layers = [LayerSpec(SleepingLinear, WIDTH, (0, 0, 0.01)) if stage == 1 else LayerSpec(HeadBesideLayers)
              for stage in range(4)]
    engine = engine_of(layers, profiled("adaptive"), 4)
    while engine.planned_times is None:
        sleep_batch(engine)
    times, planned = engine.planned_times, engine.schedule()
    cut = tuple(tuple(piece for action in order for piece in (action.cut(2) if action.kind is Kind.W else (action,)))
                for order in build("v-half", 2, 4).orders)
    engine.use_schedule(replace(build("v-half", 2, 4), orders=cut))
    sleep_batch(engine)
    predicted, measured = engine.timelines()
    return {"times": times, "planned": planned, "predicted": predicted, "measured": measured}


@pytest.mark.slow
def test_pieces_take_what_was_planned() -> None:
    """The head's W is a piece of its own, and that of a single layer isn't cut."""
    found = run_ranks(2, pieces_as_they_are)[0]
    assert [len(costs) for costs in found["times"].entry_costs] == [4, 1, 4, 4]
    assert not [action for _, action in found["planned"].passes() if action.stage == 1 and action.pieces > 1]
    for timeline in (found["predicted"], found["measured"]):
        pieces = defaultdict(list)
        for span in (span for rank in timeline.ranks for span in rank if span.action.kind is Kind.W):
            pieces[span.action.stage, span.action.piece].append(span.end - span.start)
        for stage in (0, 2, 3):
            # The last layer's B is the first, and so is its W.
            assert min(pieces[stage, 0]) >= 0.018 and min(pieces[stage, 1]) >= 0.006
            assert statistics.median(pieces[stage, 0]) > statistics.median(pieces[stage, 1])
        assert min(pieces[1, 0]) >= 0.01 and max(pieces[1, 1]) < 0.01


def test_times_move_by_shares_of_a_stage() -> None:
    before = Times((2, 2, 4, 4), (3, 3, 6, 6), (5, 5, 10, 10), (1, 0, 1))
    assert scheduling.moved_by(before, before) == 0
    assert scheduling.moved_by(replace(before, forward=(2, 3, 4, 4)), before) == pytest.approx(0.1)
    assert scheduling.moved_by(replace(before, weight_grad=(5, 5, 10, 5)), before) == pytest.approx(0.25)
    # A hop that doubles has moved by a tenth of the faster stage beside it.
    assert scheduling.moved_by(replace(before, hops=(2, 0, 1)), before) == pytest.approx(0.1)
    assert scheduling.moved_by(replace(before, hops=(1, 0, 9)), before) == pytest.approx(0.4)
    assert scheduling.moved_by(Times.uniform(4), Times.uniform(4, 0, 0, 0)) == 1


def recorded_requests() -> list[tuple[Schedule, ...]]:
    """What the planner gets from now on: the schedules that have run."""
    asked: list[tuple[Schedule, ...]] = []
    start = Planner.start

    def recorded(planner: Planner, request: Request) -> None:
        asked.append(request.running)
        start(planner, request)

    Planner.start = recorded  # type: ignore[method-assign]
    return asked


def drift(rank: int) -> tuple[Times, Times, list[tuple[Schedule, ...]], Schedule]:
    asked = recorded_requests()
    scheduling.BATCHES_BETWEEN_CHECKS = 5
    engine = sleeping_engine(profiled("v-half", drift=0.5), 2, (2, 2, 2))
    while engine.planned_times is None:
        sleep_batch(engine)
    before, planned = engine.planned_times, engine.schedule()
    for module in engine.module.modules():
        if isinstance(module, SleepingLinear):
            module.seconds = (0.002, 0.03, 0.002)
    while engine.planned_times in (None, before):
        sleep_batch(engine)
    return before, engine.planned_times, asked, planned


@pytest.mark.slow
def test_drift_plans_again() -> None:
    of_ranks = run_ranks(2, drift, timeout=180)
    before, after, asked, planned = of_ranks[0]
    assert of_ranks[1][:3] == (before, after, asked)
    # The second plan may not be slower than the first one for the new times, nor than what is measured by.
    assert asked == [(unfused(build("v-half", 2, 2)),), (unfused(build("v-half", 2, 2)), planned)]
    assert all(seconds < 0.03 for seconds in before.input_grad)
    assert all(seconds >= 0.03 for seconds in after.input_grad)


def there_and_back(rank: int) -> tuple[list[tuple[Schedule, ...]], Schedule]:
    asked = recorded_requests()
    engine = sleeping_engine(profiled("v-half"), 2, (1, 1, 1))
    while engine.planned_times is None:
        sleep_batch(engine)
    planned = engine.schedule()
    engine.set_train_batch_size(SAMPLES * 3)
    while len(asked) < 2 or engine.planned_times is None:
        sleep_batch(engine)
    engine.set_train_batch_size(SAMPLES * 2)
    assert engine.schedule() == planned
    sleep_batch(engine)
    return asked, planned


@pytest.mark.slow
def test_another_number_of_micro_batches_forgets_no_plan() -> None:
    asked, planned = run_ranks(2, there_and_back, timeout=180)[0]
    safe, other = (unfused(build("v-half", 2, micro_batches)) for micro_batches in (2, 3))
    assert asked == [(safe,), (other,), (safe, planned)]


def change_micro_batches(rank: int) -> list[float]:
    engine = Job(profiled("v-half"), 2, 3).engine()
    losses, at = train_until_swapped(engine)
    engine.set_train_batch_size(SAMPLES * 5)
    before = engine.schedule()
    assert before.micro_batches == 5
    losses += train(engine, range(at + 1, at + 9)).losses
    return [at, *losses]


def change_micro_batches_plainly(rank: int, at: int) -> list[float]:
    engine = Job(None, 2, 3).engine()
    losses = train(engine, range(at + 1)).losses
    engine.set_train_batch_size(SAMPLES * 5)
    return [at, *losses, *train(engine, range(at + 1, at + 9)).losses]


@pytest.mark.slow
def test_another_number_of_micro_batches() -> None:
    ours = run_ranks(2, change_micro_batches)
    assert ours[0] == ours[1] == run_ranks(2, change_micro_batches_plainly, int(ours[0][0]))[0]


def train_adaptive(rank: int, section: Any) -> tuple[Outcome, float]:
    engine = Job(section, 3, 6, layers=tuple(specs(6))).engine()
    return train(engine, range(3)), max(peak_activations(engine.schedule()))


def test_adaptive_with_equal_times_waits_for_its_plan() -> None:
    ours = run_ranks(3, train_adaptive, {"name": "adaptive", "memory_limit": 0.7, "planning_seconds": 1.0})
    oracle = run_ranks(3, train_adaptive_oracle)
    assert merged([outcome for outcome, _ in ours]).losses == merged(oracle).losses
    assert ours[0][1] <= 0.7 * peak_of_1f1b(3, 6)


def train_adaptive_oracle(rank: int) -> Outcome:
    return train(Job(None, 3, 6, layers=tuple(specs(6))).engine(), range(3))


@pytest.mark.parametrize("times", ["equal", "profile"])
def test_a_limit_that_cannot_be_met_says_the_least(times: str) -> None:
    section = {"name": "adaptive", "memory_limit": 0.2, "times": times, "planning_seconds": 1.0}
    with pytest.raises(RanksFailed) as error:
        run_ranks(2, start_one_late, Job(section, 2, 6))
    assert str(error.value).count("the least possible peak on 2 ranks with 6 micro-batches is 0.5 of 1F1B's") == 2


def start_one_late(rank: int, job: Job) -> None:
    """Rank 1 comes to its schedule when another one that had raised an error would have ended."""
    start = engine_module.schedules_for

    def late(*args: Any) -> Any:
        time.sleep(rank)
        return start(*args)

    engine_module.schedules_for = late
    job.engine()


def test_a_named_schedule_beyond_the_limit_says_so_on_every_rank() -> None:
    with pytest.raises(RanksFailed) as error:
        run_ranks(2, start_one_late, Job({"name": "v-zb", "memory_limit": 0.6}, 2, 6))
    assert str(error.value).count("v-zb needs 1 of 1F1B's peak") == 2


def train_with_a_crash(rank: int) -> list[float]:
    # No such interpreter option: the planning process ends at once.
    planning.WORKER = ["--no-such-option"]
    return train(Job(profiled("v-half"), 2, 3).engine(), range(12)).losses


def test_training_goes_on_when_the_planning_process_crashes() -> None:
    ours = run_ranks(2, train_with_a_crash)
    assert ours[0] == ours[1] == run_ranks(2, train_throughout, Job(None, 2, 3), 12)[0][0]


def test_profiling_a_schedule_without_plans_is_refused() -> None:
    def refused(rank: int) -> str:
        with pytest.raises(ConfigError) as error:
            Job({"name": "1f1b", "times": "profile"}, 2, 3).engine()
        return str(error.value)

    first, second = run_ranks(2, refused)
    assert first == second == ("pipeline_schedule.times = 'profile': 1f1b has the same order for all times; legal for "
                               "adaptive, v-min, v-half, v-zb, zb-v")


def adaptive_in_bytes(rank: int, limit: Any) -> tuple[Any, list[int], tuple[float, ...]]:
    engine = Job(profiled("adaptive", memory_limit=limit), 2, 6, layers=tuple(specs(6))).engine()
    train_until_swapped(engine)
    activations = engine.activation_sizes()
    return engine.schedule(), [memory.activations_peak for memory in engine.memory_report()], activations.after_forward


def test_a_limit_in_bytes_holds_for_the_measured_sizes() -> None:
    # 4 stages of 2 layers keep some kilobytes each; this is room for about three of them on a rank.
    results = run_ranks(2, adaptive_in_bytes, {"activations": "20KB"})
    (schedule, peaks_in_bytes, whole), other = results
    assert (schedule, peaks_in_bytes, whole) == other
    assert all(0 < peak <= 20_000 for peak in peaks_in_bytes)
    least = [whole[0] + whole[3], whole[1] + whole[2]]
    assert all(peak >= size for peak, size in zip(peaks_in_bytes, least))


def test_a_limit_in_bytes_that_cannot_be_met() -> None:
    with pytest.raises(RanksFailed, match="the least possible peaks of the ranks are"):
        run_ranks(2, adaptive_in_bytes, {"activations": "100B"})


def train_on_after_a_refusal(rank: int) -> list[tuple[int, str]]:
    """After how many batches each error of a limit came that no plan can keep to."""
    engine = Job(profiled("adaptive", memory_limit={"activations": "100B"}), 2, 6, layers=tuple(specs(6))).engine()
    told: list[tuple[int, str]] = []
    for batch in count():
        try:
            engine.train_batch(data(engine, batch))
        except PipelineError as error:
            told.append((batch, str(error)))
            if len(told) == 3:
                return told
    raise AssertionError


def test_a_script_that_goes_on_after_a_refusal_is_told_again() -> None:
    first, second = run_ranks(2, train_on_after_a_refusal)
    assert first == second
    (batch, text), *again = first
    assert "the least possible peaks" in text and again == [(batch + 1, text), (batch + 2, text)]


def train_without_speeds(rank: int) -> tuple[list[float], list[str]]:
    """Copies can't be measured on rank 1."""
    if rank:
        def full(*_: Any) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

        keeping.seconds_per_byte = full
    scheduling.BATCHES_BETWEEN_CHECKS = 5  # then it's tried again
    with Lines() as lines:
        losses = train(Job(profiled("adaptive", offload=True), 2, 3).engine(), range(20)).losses
    return losses, lines.with_word("stays as it is")


def test_training_goes_on_where_copies_cannot_be_measured() -> None:
    (ours, lines), (other, _) = run_ranks(2, train_without_speeds)
    assert ours == other == run_ranks(2, train_throughout, Job(None, 2, 3), 20)[0][0]
    assert len(lines) >= 2 and "copies to the host can't be measured: " in lines[0] and "No space left" in lines[0]
