"""What is seen of training batches while they run: times of passes, activations, and which weights were split.

Every pass of every batch is timed. In one early batch activations are measured too, and it is left out of all times:
the meter slows its operators down. If activations can't be measured, their sizes stay unknown, and the batch
runs like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from deepspeed.runtime.pipe.module import PipelineError
from deepspeed.utils import logger
from torch.nn import Parameter

from ds_vshape.comm.exchange import Exchange
from ds_vshape.comm.payload import members
from ds_vshape.deepspeed_adapter.optimizers import make_buckets
from ds_vshape.measure.accounting import measured_process, parts_of_ranks
from ds_vshape.measure.keeping import KeepingMeter
from ds_vshape.measure.log_lines import split_line
from ds_vshape.measure.memory import ActivationMeter
from ds_vshape.measure.profiling import PassRecorder, gather_timeline, mean_times, report
from ds_vshape.measure.rank_memory import RankMemory, Sizes, with_passes
from ds_vshape.runtime.buffers import Buffers
from ds_vshape.runtime.copy_engine import Copy
from ds_vshape.runtime.instructions import BufferId
from ds_vshape.runtime.rank import Rank
from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Timeline, Times, simulate
from ds_vshape.split_backward import WeightGradientStore

# The training batch in which activations are measured, counted from 0. Not the first, in which modules make caches
# that stay.
METERED_BATCH = 1

_NOTHING = nullcontext()


class Observer:
    """Watches the batches of this `rank`; reports are collective over its pipeline. With `keeping`, also what
    recomputation and offload would save and cost."""

    def __init__(self, rank: Rank, keeping: KeepingMeter | None = None) -> None:
        self._rank = rank
        # Times the passes of the present batch, or the last one.
        self.recorder = PassRecorder()
        # The passes that are yet to be measured in this batch; none in all batches but one. What shapes have told of
        # recomputation and offload stays for stages of which all micro-batches have that already.
        self._metered: set[Pass] = set()
        self._given_back: set[BufferId] = set()
        self._last: tuple[Schedule, PassRecorder] | None = None
        self._meter = ActivationMeter(rank.module, rank.device.type)
        self._meter_runs = False
        self._keeping = keeping
        # None where they are unknown; `batches` says whether they are those of shapes, or measured.
        self._sizes: Sizes | None = None
        # What the process has besides tensors; measured with the sizes.
        self._process = 0
        # What all ranks of the pipeline need besides the passes, as it was counted last.
        self._parts: tuple[RankMemory, ...] | None = None
        # Parameters whose gradients came from W; None once they are reported.
        self._in_split: set[Parameter] | None = set()
        # Of this rank's trained parameters: how many numbers got their gradients from W, of how many.
        self.split = (0, 0)
        self.batches = 0
        # The number of the batch in which sizes are measured.
        self._metered_batch = METERED_BATCH

    def measure_keeping(self, keeping: KeepingMeter, wait: int) -> None:
        """Measure also what recomputation and offload leave, in the usual batch or, if that is over, in the next one
        after `wait` others."""
        self._keeping, self._sizes = keeping, None
        self._metered_batch = max(METERED_BATCH, self.batches + wait)

    # -- while a batch runs

    def copied(self, buffer_id: BufferId, copy: Copy) -> None:
        """What a forward left is on its way to the host, and will come back."""
        self.recorder.copied(buffer_id, copy)

    def begin_batch(self, schedule: Schedule, training: bool) -> None:
        """A batch of training or evaluation starts."""
        self.recorder = PassRecorder()
        measured = training and self.batches == self._metered_batch
        order = schedule.orders[self._rank.stage_id] if measured else ()
        self._given_back = _given_back(order)
        self._metered = _to_measure(order)
        if measured:
            self._meter.drop()
            self._meter_runs = False

    def measuring(self, action: Pass, buffers: Buffers) -> AbstractContextManager[None]:
        """Around a pass, what measures more of it than its time."""
        if action in self._metered:
            return self._metering(action, buffers)
        if self._keeping is not None and action.kind is Kind.F and self.is_measured:
            return self._keeping.times(action.stage)
        return _NOTHING

    @contextmanager
    def _metering(self, action: Pass, buffers: Buffers) -> Iterator[None]:
        """Around a pass that is measured."""
        if not self._meter_runs:
            self._meter.start()
            self._meter_runs = True
        buffer_id = BufferId(action.stage, action.micro_batch)
        buffer = buffers[buffer_id]
        if action.kind is Kind.W:
            with self._meter.weights(action, buffer.store):
                yield
        elif action.kind is Kind.F:
            assert buffer.inputs is not None
            keeping = nullcontext() if self._keeping is None or buffer_id in self._given_back else (
                self._keeping.sizes(action.stage, members(buffer.inputs)))
            with self._meter.forward(action, buffer.inputs, buffer.labels), keeping:
                yield
        else:
            store = buffer.store
            # They belong to the end of the batch, and not to the pass that happens to be the first one.
            make_buckets(self._rank.optimizer)
            with self._meter.backward(action):
                yield
            if action.kind is Kind.B:
                self._meter.after_backward(action, store)
        self._metered.remove(action)
        if not self._metered:
            self._meter.stop()

    def abandon_batch(self) -> None:
        """To be called when the batch ends, whether it has succeeded or not: nothing of it is measured after that."""
        if self._metered:
            self._metered.clear()
            self._meter.drop()

    def weights_split(self, store: WeightGradientStore) -> None:
        """W is going to give the gradients of `store`."""
        if self._in_split is not None:
            self._in_split.update(store.parameters())

    def entry_done(self) -> None:
        """One entry of the W that runs is done."""
        self.recorder.entry_done()

    def end_batch(self, schedule: Schedule) -> None:
        """A training batch has succeeded."""
        self._last = schedule, self.recorder
        self.batches += 1
        if self._in_split is not None:
            self._report_split(schedule, self._in_split)
            self._in_split = None

    def _report_split(self, schedule: Schedule, split: set[Parameter]) -> None:
        """Log once which parameters get their gradients in B, and which share of the model that is."""
        rank = self._rank
        trained = sum(parameter.numel() for parameter in rank.module.parameters() if parameter.requires_grad)
        self.split = sum(parameter.numel() for parameter in split), trained
        splits = any(action.kind is Kind.W for action in schedule.orders[rank.stage_id])
        if splits and not rank.grid.data_parallel_id:
            logger.info(split_line(rank.stage_id, rank.module, split))

    # -- after it

    def last_batch(self) -> tuple[Schedule, PassRecorder]:
        """The last training batch; PipelineError if there is none yet."""
        if self._last is None:
            raise PipelineError("no batch has been trained yet")
        return self._last

    def timelines(self, planned: Times | None) -> tuple[Timeline, Timeline]:
        """The last training batch as predicted and as measured, in seconds.

        The prediction takes the `planned` times, or else the batch's own mean times.
        """
        schedule, record = self.last_batch()
        measured = gather_timeline(record, schedule.orders, self._group, self._rank.device)
        times = planned or mean_times(measured, schedule.placement.stages)
        return simulate(schedule, times), measured

    def agree_on_sizes(self, exchange: Exchange) -> str | None:
        """Tell all ranks of the job the measured sizes, collective over its `exchange`; why they are unknown, if so."""
        rank = self._rank
        self._sizes = self._meter.gather(rank.placement, rank.device)
        self._process = measured_process(rank, after_step=True)
        if self._sizes is not None:
            if self._keeping is not None:
                self._sizes = self._keeping.gather(self._sizes[0]), self._sizes[1]
            return None
        own = self._meter.unknown
        texts = exchange.texts(
            "" if own is None else f"pipeline rank {rank.stage_id}: {own}")
        return "; ".join(dict.fromkeys(text for text in texts if text)) or "no pass was measured"

    def activations(self) -> Activations | None:
        """The measured sizes of all stages, in bytes for one micro-batch, None where they are unknown; PipelineError if
        it's too early."""
        self._check_measured()
        return None if self._sizes is None else self._sizes[0]

    @property
    def is_measured(self) -> bool:
        """Whether the batch is over in which sizes are measured."""
        return self.batches > self._metered_batch

    @property
    def has_just_measured(self) -> bool:
        """Whether that was the last batch."""
        return self.batches == self._metered_batch + 1

    @property
    def sizes_stay_unknown(self) -> bool:
        """Whether it's no longer too early for sizes, and they are unknown."""
        return self.is_measured and self._sizes is None

    def _check_measured(self) -> None:
        if not self.is_measured:
            raise PipelineError(f"activations are measured in training batch {self._metered_batch + 1}")

    def take_shapes(self, sizes: Sizes | None) -> None:
        """The sizes as far as shapes tell them, until they are measured."""
        self._sizes, self._process = sizes, measured_process(self._rank, after_step=False)

    @property
    def sizes(self) -> Sizes | None:
        """The sizes of all stages, measured or by their shapes; None where they are unknown."""
        return self._sizes

    def memory(self, schedule: Schedule) -> tuple[RankMemory, ...]:
        """The bytes that each pipeline rank needs under `schedule` (collective over the pipeline); of the passes only
        where sizes are known."""
        self._parts = parts_of_ranks(self._rank, self._process)
        return self._with_passes(schedule)

    def counted(self, schedule: Schedule) -> tuple[RankMemory, ...]:
        """The same, as it was counted last; PipelineError if it's too early."""
        if self._sizes is None:
            self._check_measured()
        return self._with_passes(schedule)

    def _with_passes(self, schedule: Schedule) -> tuple[RankMemory, ...]:
        assert self._parts is not None
        return self._parts if self._sizes is None else with_passes(self._parts, schedule, self._sizes)

    def report(self) -> dict[str, Any]:
        """The last training batch in numbers (:func:`ds_vshape.measure.profiling.report`)."""
        schedule, record = self.last_batch()
        return report(record, schedule, self._group, self._rank.device)

    @property
    def _group(self) -> Any:
        return self._rank.grid.get_pipe_parallel_group()


def _given_back(order: Sequence[Pass]) -> set[BufferId]:
    """What is recomputed or offloaded."""
    return {BufferId(action.stage, action.micro_batch) for action in order if action.kind.is_optional}


def _to_measure(order: Sequence[Pass]) -> set[Pass]:
    """All passes of a micro-batch of each stage whose backward is a B, and of one whose is a BW, if it has both. The
    second one, if there is one: after the first, allocators and caches are warm. Better one that isn't recomputed or
    offloaded."""
    given_back = _given_back(order)
    found: dict[tuple[Kind, int], list[BufferId]] = {}
    for action in order:
        if action.kind.gives_input_gradient:
            found.setdefault((action.kind, action.stage), []).append(BufferId(action.stage, action.micro_batch))
    buffers = {([one for one in equal if one not in given_back] or equal)[:2][-1] for equal in found.values()}
    return {action for action in order
            if BufferId(action.stage, action.micro_batch) in buffers and not action.kind.is_copy}
