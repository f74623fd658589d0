"""The private parts of the package that tests use, each with the reason why nothing public shows it.

`tests/test_private_parts.py` refuses all other uses.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ds_vshape.comm import channels, ownership
from ds_vshape.comm.channels import Channels
from ds_vshape.engine.planning import PlanningProcess
from ds_vshape.engine.scheduling import MeasuredSchedules
from ds_vshape.health.preflight import Preflight
from ds_vshape.measure import observer
from ds_vshape.runtime.buffers import Buffers
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.timeline import Times
from ds_vshape.split_backward import GradientAccumulator, WholeGradients

# -- gradients. From outside there are only their sums.


def wrap_accumulator(engine: Any, around: Callable[[Any, Any, Callable[[Any, Any], None]], None]) -> None:
    """Let `around` have each parameter and gradient that W gives, and the function that adds it up."""
    add = engine._accumulator.add
    engine._accumulator = WholeGradients(lambda parameter, gradient: around(parameter, gradient, add))


def note_accumulated(engine: Any, parameters: set[Any]) -> None:
    """Put into `parameters` those whose gradients W gives, without changing how they are accumulated."""
    engine._accumulator = _Recorded(engine._accumulator, parameters)


@dataclass(frozen=True)
class _Recorded:
    """`accumulator`, with a note of the parameters that it was given gradients of, or a place to add them."""

    accumulator: GradientAccumulator
    parameters: set[Any]

    def add(self, parameter: nn.Parameter, gradient: Tensor, /) -> None:
        self.parameters.add(parameter)
        self.accumulator.add(parameter, gradient)

    def buffer(self, parameter: nn.Parameter, /) -> Tensor | None:
        self.parameters.add(parameter)
        return self.accumulator.buffer(parameter)


def wrap_split_weights(engine: Any, note: Callable[[Any], None]) -> None:
    """Give `note` each store whose weight gradients W computes."""
    known = engine._observer.weights_split

    def both(store: Any) -> None:
        note(store)
        known(store)

    engine._observer.weights_split = both


# -- reductions. The weights are the same whenever they run.


def count_early_reductions(engine: Any) -> list[int]:
    """Filled batch by batch: how many stages this rank had started to reduce before the end of the batch."""
    reduction, counts = engine._reduction, []
    finish = reduction.finish

    def counting() -> bool:
        counts.append(len(reduction._started))
        return bool(finish())

    reduction.finish = counting
    return counts


def wrap_background(engine: Any, wrap: Callable[[Callable[[], Any]], Callable[[], Any]]) -> None:
    """Let the engine run `wrap(work)` concurrently with the passes in place of `work`."""
    start = engine._background.start
    engine._background.start = lambda work, uses=(): start(wrap(work), uses)


def replace_background(engine: Any, background: Any) -> None:
    """Let the engine use `background` for what runs concurrently with the passes."""
    engine._background = background


# -- steps that aren't validated yet. A step that is taken back leaves no trace: that is what it's for.


def count_rollbacks(engine: Any) -> list[int]:
    """A list of one number: how many steps were taken back so far."""
    count, take_back = [0], engine._take_back

    def counting(*args: Any) -> None:
        count[0] += 1
        take_back(*args)

    engine._take_back = counting
    return count


def kept_for_rollback(engine: Any) -> list[Tensor]:
    """The copies by which the last step could be taken back, except for the module's buffers."""
    kept = engine._ahead.snapshot
    return [*kept._weights, *(value for state in kept._state.values() for value in state.values())]


# -- messages. Both ends of a channel see the same, however its messages are kept and sent.


def messages_are_announced(engine: Any) -> bool:
    """Whether headers precede the messages of the batch that is running."""
    return bool(engine._channels._announced)


def in_progress(ends: Channels, message: Any) -> list[Tensor] | None:
    """The tensors that a message keeps until it is waited for; None if it isn't in progress."""
    transfer = ends._sending.get(message) or ends._receiving.get(message)
    return None if transfer is None else transfer.tensors


def send_header(ends: Channels, numbers: Tensor, to: int) -> None:
    """Send `numbers` where the rank `to` of the pipeline expects the header of a message."""
    ends._headers.send([numbers], to, 0).wait()


def note_sends(note: Callable[[Any, Any], None]) -> None:
    """Give `note` each message of this process, and its tensors, from now on."""
    start_sends = Channels._start_sends

    def noted(self: Channels, message: Any, tensors: Any, *rest: Any) -> None:
        note(message, tensors)
        start_sends(self, message, tensors, *rest)

    Channels._start_sends = noted  # type: ignore[method-assign]


def new_transfer() -> Any:
    """A message of which nothing is in progress yet."""
    return channels._Transfer()


def replace_transfers(start: Callable[..., None]) -> Callable[..., None]:
    """Start all transfers of this process by `start`; returns what started them before."""
    before = channels._start
    channels._start = start
    return before


# -- results of a stage. Whether they are copied shows only in what is written to them later, and in time.


def replace_ownership(owned: Callable[[Callable[[Any, set[int]], Tensor], Any, set[int]], Tensor]) -> None:
    """Let `owned` decide about each result, with the function that does otherwise."""
    before = ownership._Result.owned
    ownership._Result.owned = lambda self, others: owned(before, self, others)  # type: ignore[method-assign]


def place_on_one_rank(buffers: Buffers, placement: Placement) -> None:
    """Let `buffers` hand over to their own rank, which with one rank no schedule of the table does."""
    buffers._placement = placement


# -- the activation meter. Its answer is all there is to see.


@contextmanager
def nothing_measured() -> Iterator[None]:
    """Engines inside measure no activations."""
    measure, observer._to_measure = observer._to_measure, lambda order: set()
    try:
        yield
    finally:
        observer._to_measure = measure


def break_meter(engine: Any, start: Callable[[Any], None]) -> None:
    """Start measuring by `start`, which raises."""
    engine._observer._meter._watcher.start = lambda: start(engine)


# -- planning. What is asked of the planner's process shows only in its plans, seconds later.


def plan_requests(schedules: MeasuredSchedules) -> list[Any]:
    """Filled with what the planner would be asked; nothing is planned."""
    requests: list[Any] = []
    schedules._first_plans.planner.start = requests.append  # type: ignore[method-assign]
    return requests


def ask_for_plan(schedules: MeasuredSchedules, times: Times) -> None:
    """As after the batch whose passes took `times`."""
    schedules._plan(times)


def planner_of(process: PlanningProcess) -> subprocess.Popen[bytes]:
    """The process itself, to see that it ends."""
    return process._process


# -- the start of a job, and what runs around batches


def replace_probe(strike: Callable[[], Any]) -> None:
    """Call `strike` where ranks would try to reach each other: nothing public runs at that time."""
    Preflight._unanswered = lambda *_: strike()  # type: ignore[assignment, method-assign, return-value]


def callbacks_of(engine: Any) -> list[Any]:
    """What the engine calls around each batch. Nothing public shows that there is none."""
    return list(engine._callbacks)
