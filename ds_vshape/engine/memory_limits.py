"""How an engine keeps to a memory limit in bytes: what the passes may take, known by shapes before the first batch and
measured in the second one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from numbers import Integral
from typing import Any

from deepspeed.runtime.pipe.module import PipelineError

from ds_vshape.config.section import KEY, ActivationLimit, ScheduleConfig
from ds_vshape.config.to_schedule import Room
from ds_vshape.deepspeed_adapter.engine import StockEngine
from ds_vshape.engine.plans import Plans
from ds_vshape.engine.rank_limit import RankLimit
from ds_vshape.engine.shape_rehearsal import ShapeRehearsal
from ds_vshape.health.preflight import Facts
from ds_vshape.health.watch import in_phase
from ds_vshape.measure.keeping import KeepingMeter
from ds_vshape.measure.observer import Observer
from ds_vshape.measure.rank_memory import RankMemory, Sizes, readable
from ds_vshape.runtime.micro_batch import loss_of
from ds_vshape.runtime.token_mean import ITEMS
from ds_vshape.schedule.activations import peak_activations
from ds_vshape.schedule.named import ADAPTIVE
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.split_backward import GradientAccumulator, Operators
from ds_vshape.split_backward.head import EarlyGradients

_BY_SHAPES, _MEASURED = "by shapes, before training", "as measured in training"
_WITHOUT_PASSES = "without activations and what passes need, whose sizes aren't known yet"


class MemoryLimits(StockEngine):
    """The limits of a PipelineEngine, which has what is declared here."""

    global_rank: int
    placement: Placement
    _keeping: KeepingMeter | None
    _limit: RankLimit | None
    _observer: Observer
    _operators: Operators
    _plans: Plans
    _sums: Any
    _log: Callable[[str], None]
    peek: Callable[[], tuple[Any, Any]]
    schedule: Callable[[], Schedule]

    def _set_limit(self, config: ScheduleConfig) -> None:
        """Collective, as all that follows."""
        limit = config.memory_limit
        self._limit = None
        # Why no batch is trained, once a limit has turned out to be broken.
        self._broken: PipelineError | None = None
        if isinstance(limit, int):
            self._limit = RankLimit(limit, self.placement, self.module.preflight.exchange, config)
        if isinstance(limit, int) and config.name == ADAPTIVE:
            self._log(f"{KEY}.memory_limit = {readable(limit)} holds for all that a rank needs; for activations alone "
                      f"give {{\"activations\": ...}}, as bytes meant before ds_vshape 0.2")
        self._looked = self._limit is None

    @in_phase
    def set_train_batch_size(self, train_batch_size: int) -> None:
        """As DeepSpeed's; to be called on every rank. Raises on all of them, and changes nothing, where batches of that
        size can't keep to the memory limit, or where ranks have different ones."""

        def facts() -> Facts:
            if not isinstance(train_batch_size, Integral) or train_batch_size < 1:
                raise ValueError(f"train_batch_size = {train_batch_size!r}: must be a positive integer")
            return {"train_batch_size": int(train_batch_size)}

        self.module.preflight.compare(facts)
        rows, replicas = self.train_micro_batch_size_per_gpu(), self.dp_world_size
        if train_batch_size % (rows * replicas):
            raise ValueError(f"train_batch_size = {train_batch_size}: must be a multiple of {rows * replicas}, a "
                             f"micro-batch of {rows} on each of {replicas} replicas")
        train_batch_size = int(train_batch_size)
        before = self.train_batch_size()
        super().set_train_batch_size(train_batch_size)
        try:
            self.schedule()
            if train_batch_size != before:
                self._check_batch_size()
                self._broken = None
        except Exception:
            super().set_train_batch_size(before)
            raise

    def room(self) -> Room | None:
        """What passes may take and what they need, once sizes have been measured; None where they are unknown."""
        sizes = self._observer.sizes
        if sizes is None:
            return None
        if self._limit is None:
            return Room(*sizes)
        # What isn't for passes is the same under every schedule. The one to come may be what is being planned here.
        schedule, _ = self._observer.last_batch()
        return self._limit.room(self._observer.memory(schedule), sizes, _MEASURED)

    def look_at_shapes(self) -> None:
        """Before the first batch: refuse a limit that can't be met as far as shapes tell, or start with a schedule that
        keeps to it."""
        limit = self._limit
        assert limit is not None
        inputs = labels = None
        if self.is_first_stage() or self.is_last_stage():
            # The batch itself meets what is wrong with its data.
            with suppress(Exception):
                inputs, labels = self.peek()
        rehearsal = ShapeRehearsal(self.module, self.autocast, self._loss_of_shapes, self._sums.holds, self._operators,
                                   self.module.schedule_config.gradient_accumulation_fusion, self._keeping)
        pipeline = next(ranks for ranks in self.grid.pipe_groups if self.global_rank in ranks)
        sizes, unknown = rehearsal.sizes(inputs, labels, limit.exchange, pipeline)
        self._observer.take_shapes(sizes)
        memory = self._observer.memory(self._present())
        if sizes is None:
            self._log(f"{KEY}.memory_limit: what activations take isn't known before they are measured in training: "
                      f"{unknown}")
        else:
            for rank, of_rank in enumerate(memory):
                self._log(f"pipeline rank {rank} will need {of_rank}, by its shapes")
            memory = self._start_within(limit, memory, sizes, _BY_SHAPES)
        limit.check(self._present().name, memory, sizes, _WITHOUT_PASSES if sizes is None else _BY_SHAPES)
        self._looked = True

    def _check_batch_size(self) -> None:
        """With another number of micro-batches: refuse a limit that can't be met as far as sizes are known by now, or
        start with a schedule that keeps to it. What is planned comes later, within what is left."""
        sizes = self._observer.sizes
        if sizes is None:
            return
        if self._limit is not None:
            known = _MEASURED if self._observer.is_measured else _BY_SHAPES
            memory = self._start_within(self._limit, self._observer.memory(self._present()), sizes, known)
            self._limit.check(self._present().name, memory, sizes, known)
        elif isinstance(limit := self.module.schedule_config.memory_limit, ActivationLimit):
            if max(peak_activations(self._present(), sizes[0])) > limit.activations:
                self._plans.start_within(Room(*sizes))

    def _start_within(self, limit: RankLimit, memory: tuple[RankMemory, ...], sizes: Sizes,
                      known: str) -> tuple[RankMemory, ...]:
        """What ranks need, `memory` under the present schedule, under one that keeps to `limit` if there is one."""
        if not limit.fits(memory) and self._plans.start_within(limit.room(memory, sizes, known)):
            return self._observer.memory(self._present())
        return memory

    def check_measured(self) -> None:
        """Refuse a limit that the present schedule breaks, once sizes have been measured; one that is planned comes
        later, within what is left."""
        if self._limit is not None and not self._plans.will_plan:
            memory = self._observer.memory(self._present())
            try:
                self._limit.check(self._present().name, memory, self._observer.sizes, _MEASURED)
            except PipelineError as error:
                self._broken = error
                raise

    def refuse_again(self) -> None:
        """Raise PipelineError, on all ranks, where a limit has turned out to be broken: a script may go on."""
        if self._broken is not None:
            raise self._broken.with_traceback(None)

    def _present(self) -> Schedule:
        return self._plans.schedule(self.micro_batches)

    def _loss_of_shapes(self, outputs: Any, labels: Any, accumulator: GradientAccumulator) -> Any:
        """The loss of the last stage's outputs without data."""
        module: Any = self.module
        items = {ITEMS: 1} if module.averages_tokens else {}
        early = EarlyGradients(outputs.device if hasattr(outputs, "device") else self.device)
        with early.active(outputs, accumulator, self.gradient_of_loss) as given:
            return loss_of(lambda out, of: module.loss_fn(out, of, **items), given, labels)
