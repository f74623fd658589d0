"""The engine: DeepSpeed's PipelineEngine (runtime/pipe/engine.py), driven by any schedule.

The stock engine assumes one stage per rank, one loss in flight, a backward in one piece and blocking messages. This one
runs a program of instructions and knows nothing else of schedules: each instruction names the (stage, micro-batch) it
works on, and each has one method.

    train_batch       callbacks around the batch, the agreement on its step, perhaps another schedule after it
    eval_batch        evaluation.py
    execute_plan      a batch from its first instruction to its last
    _run              each instruction; after a failure only those that other ranks wait for (guard.py)

        LoadMicroBatch                                             here
        ForwardPass, SplitForwardPass                              passes.py
        BackwardPass, InputGradPass, WeightGradPass                passes.py
        RecomputePass, Offload, Reload, their Waits                keeping.py
        Send*, Recv*, Wait*, Release*                              messages.py
        ReturnLoss, StartReduceGrads, AgreeOnBatch,
        ReduceTiedGrads, ReduceGrads, OptimizerStep                batch_end.py
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.pipe.module import PipelineError
from torch import Tensor

from ds_vshape.checkpoint.checkpointing import SavingEngine
from ds_vshape.checkpoint.client_state import ClientState
from ds_vshape.comm.background import Handle, background
from ds_vshape.comm.channels import Channels, Signatures
from ds_vshape.config.section import KEY, ScheduleConfig
from ds_vshape.config.to_schedule import is_in_bytes
from ds_vshape.engine.batch_end import BatchEnd
from ds_vshape.engine.construction import Construction
from ds_vshape.engine.evaluation import Evaluation
from ds_vshape.engine.flops_profile import flops_profile, is_flops_profiled
from ds_vshape.engine.guard import BatchGuard
from ds_vshape.engine.loading import Loading
from ds_vshape.engine.memory_limits import MemoryLimits
from ds_vshape.engine.messages import Messaging
from ds_vshape.engine.ordering import Ordering, ordering_for
from ds_vshape.engine.passes import StagePasses
from ds_vshape.engine.plans import BatchPlan, Plans
from ds_vshape.engine.rehearsal import Rehearsal
from ds_vshape.engine.reports import Reports
from ds_vshape.engine.rollback import Samples
from ds_vshape.engine.scheduling import schedules_for
from ds_vshape.engine.verification import Verification
from ds_vshape.health.failures import Agreement, Failure, TensorParallelPeers, is_known_to_all
from ds_vshape.health.preflight import Facts, plan_facts
from ds_vshape.health.step import Reached
from ds_vshape.health.waits import is_ended_wait
from ds_vshape.health.watch import Watch, in_phase
from ds_vshape.measure.hops import hop_seconds
from ds_vshape.measure.log_lines import schedule_line
from ds_vshape.measure.monitor import DeferringMonitor, MonitorReports
from ds_vshape.measure.observer import Observer
from ds_vshape.measure.profiling import clock
from ds_vshape.measure.trace import Tracer
from ds_vshape.module.fast_setattr import FastSetattr
from ds_vshape.runtime import instructions as instr
from ds_vshape.runtime.anomaly import checked
from ds_vshape.runtime.buffers import Buffers
from ds_vshape.runtime.copy_engine import copy_engine
from ds_vshape.runtime.drawn_batch import DrawnBatch
from ds_vshape.runtime.gradient_release import ReleasedWeights
from ds_vshape.runtime.micro_batch import Intake
from ds_vshape.runtime.script_functions import ScriptFunctions
from ds_vshape.runtime.token_mean import TokenMean
from ds_vshape.runtime.wall_clock import timed
from ds_vshape.runtime.wrappers import InstructionWrappers
from ds_vshape.schedule.lowering import Program, channels
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.split_backward import ALL_OPERATORS, MATRIX_OPERATORS
from ds_vshape.split_backward.head import EarlyGradients

_OPERATORS = {"matrices": MATRIX_OPERATORS, "all": ALL_OPERATORS}


class PipelineEngine(FastSetattr, Reports, Construction, MemoryLimits, Evaluation, Loading, StagePasses, Messaging,
                     BatchEnd, Rehearsal, SavingEngine):
    """Trains and evaluates a :class:`ds_vshape.PipelineModule` by the schedule its config names.

    Made by :func:`ds_vshape.initialize`. Its public methods are DeepSpeed's and those that ds_vshape/docs/api.md lists.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The stock constructor asks is_first_stage() and is_last_stage() for the ends of the chain of ranks, not of
        # the model: it warms up the neighbours with them.
        self._constructed = False
        super().__init__(*args, **kwargs)
        self._constructed = True
        config: ScheduleConfig = self.module.schedule_config
        self.placement: Placement = self.module.placement
        if not (self.is_first_stage() or self.is_last_stage()):
            self.data_iterator = self.training_dataloader = None
        self._watch: Watch = self.module.preflight.watch
        self._watch.progress = self._progress
        self._channels = Channels(channels(self.placement), self.grid.pipe_groups, self.device)
        self._signatures: Signatures | None = None
        self._agreement = Agreement(self._watch.names[self.global_rank])
        peers = TensorParallelPeers(self.grid.topology().get_axis_comm_lists("model"), config.timeout_seconds)
        self._guard = BatchGuard(self._agreement, peers, self._watch, self._channels, self._execute,
                                 self._skip_micro_batch, self._forget_batch)
        # The instruction that is being executed.
        self._instruction: instr.PipeInstruction | None = None
        self._stage_buffers = Buffers(self.placement, self.stage_id)
        first_of_replicas = self.grid.data_parallel_id == 0 and self.grid.get_slice_parallel_rank() == 0
        self._intake = Intake(2 if self.is_last_stage() else 1, self.is_first_stage() and first_of_replicas)
        self._keeping = None
        if config.recompute or config.offload:
            self._check_keeping(f"{KEY}.recompute or {KEY}.offload = true")
            self._keeping = self._new_keeping_meter()
        self._observer = Observer(self, self._keeping)
        self.copy_engine = copy_engine(clock().now)
        self._changing_buffers = {}
        self._background = background()
        self._early = EarlyGradients(self.device)
        self._token_mean: TokenMean | None = None
        if self.module.averages_tokens and self.is_last_stage():
            self._token_mean = TokenMean(self.module.loss_fn, self.grid.get_data_parallel_group(), self.dp_world_size,
                                         self.device, self._background)
        self._drawn = DrawnBatch(self._draw, self.is_first_stage())
        self._ordering: Ordering | None = None
        if config.micro_batch_order == "length":
            pipelines = self.grid.topology().get_axis_comm_lists("pipe")
            self._ordering = ordering_for(self.placement, pipelines, self.global_rank)
        self._returning_loss: Handle[Tensor] | None = None
        self._script = ScriptFunctions(self)
        self._released = ReleasedWeights(self.module)
        self._follow_optimizer()
        self._operators = _OPERATORS[config.deferred]
        self._set_limit(config)
        source = schedules_for(config, self.placement, lambda: hop_seconds(self._channels, self.placement), self.room,
                               self._keeping_times, self.module.preflight, self.module.known_stages)
        in_bytes = is_in_bytes(config)
        self._plans = Plans(self.placement, self.stage_id, config.name, source, self._training_instructions,
                            recomputes=self.module.activation_checkpoint_interval > 0,
                            knows_sizes=lambda: in_bytes and not self._observer.sizes_stay_unknown,
                            agreement=self._agreement, preflight=self.module.preflight)
        self._samples = Samples(self._from_data)
        self._peeked = None
        self._verification = Verification(
            self, self._agreement, self._guard, self._observer, self._released) if config.verify_gradients else None
        self._forwards_before = 0
        self._client_state = ClientState()
        # None between batches: saving and loading activate stages too.
        self._active_stage: int | None = None
        # Not every backward here ends as DeepSpeed's hooks expect.
        self.start_no_timers()
        self.drop_idle_hooks()
        self._wrappers = InstructionWrappers(self)
        if config.detect_anomaly:
            self._wrappers.add(partial(checked, buffers=self._stage_buffers, last_stage=self.placement.last_stage))
        if self.wall_clock_breakdown():
            self._wrappers.add(partial(timed, timers=self.timers))
        # What follows whole batches, where it was asked for; the first is outermost.
        self._callbacks: list[Tracer | MonitorReports] = []
        if config.trace is not None:
            self._callbacks.append(Tracer(self, self._observer, self._channels, self._wrappers, config.trace))
        if self.monitor.enabled:
            self.monitor = DeferringMonitor(self.monitor, self._guard.defer)
            self._callbacks.append(MonitorReports(self, self._observer, self._stage_buffers, self._wrappers))
        self._log(schedule_line(self.schedule()))
        self.preflight()

    def preflight(self) -> None:
        """Check that all ranks have the same plan and reach each other (ds_vshape/health/preflight.py); collective."""

        def facts() -> Facts:
            self._script.look(self._train_schedule().splits)
            return {**plan_facts(self.schedule(), self.grid.pipe_groups), "functions of the script": self._script.names}

        self.module.preflight.compare(facts)
        self.module.preflight.probe(self._channels.ends())

    # -- schedules and programs

    def _train_schedule(self) -> BatchPlan:
        """The plan of the next training batch."""
        return (self._plans.announced if self._announces else self._plans.training)(self.micro_batches)

    @property
    def _announces(self) -> bool:
        """Whether messages are announced in the next training batch. In one that DeepSpeed's flops profiler measures,
        too, the host waits for a GPU in many passes, which only announced batches bear."""
        return self._signatures is None or bool(self.dynamic_shape) or is_flops_profiled(self)

    @in_phase
    def use_schedule(self, schedule: Schedule) -> None:
        """Train by `schedule` from the next batch of as many micro-batches on; to be called on every rank.

        Losses don't change. Raises on every rank: ScheduleError or DeadlockError for one that can't run, PipelineError
        for one with another placement than the model's, and for one that recomputes layers which are checkpointed, and
        PreflightError if ranks have different ones. After the first one that recomputes or offloads, sizes of
        activations are measured in the next batch again.
        """
        self._agreement.run(lambda: self._check_schedule(schedule), "check of the schedule")
        # Each rank proves its own program alone, and what they prove together is of one schedule.
        self.module.preflight.compare(lambda: plan_facts(schedule, self.grid.pipe_groups))
        self._plans.use(schedule)
        self._broken = None
        if schedule.gives_back_memory and self._keeping is None:
            self._keeping = self._new_keeping_meter()
            due = self._verification is not None and self._verification.is_due
            self._observer.measure_keeping(self._keeping, wait=int(due))
        self._signatures = None

    def _check_schedule(self, schedule: Schedule) -> None:
        """Raise for one that can't be this model's."""
        if not isinstance(schedule, Schedule):
            raise PipelineError(f"use_schedule({schedule!r}): must be a Schedule, as build() of "
                                "ds_vshape/schedule/named.py makes one from a name")
        if any(action.kind is Kind.C for _, action in schedule.passes()):
            self._check_keeping(f"the schedule {schedule.name}, which recomputes")
        self._plans.check(schedule)

    def _training_instructions(self, program: Program) -> list[instr.PipeInstruction]:
        return instr.training_instructions(program)

    def train_batch(self, data_iter: Any = None) -> Any:
        """Train on the next batch, as DeepSpeed's `train_batch`; a schedule that knows the times may come out of it."""
        with self._watch.phase(self._doing("train_batch")):
            return self._train_batch(data_iter)

    def _train_batch(self, data_iter: Any) -> Any:
        self._guard.start_batch()
        self.refuse_again()
        if not self._looked:
            if data_iter is not None:
                self.set_dataiterator(data_iter)
            self.look_at_shapes()
        failure: Failure | None = None
        loss: Any = None
        try:
            loss = self._batch_with_callbacks(data_iter)
        except Exception as error:
            if is_known_to_all(error):
                raise
            failure = self._agreement.failure(error, "train_batch")
        self._agree_on_step(failure)
        if self._plans.after_batch(*self._observer.last_batch()):
            self._log_comparison()
        if self._plans.swapped:
            # Its passes may load kernels on several ranks at once, which only announced batches bear.
            self._signatures = None
        if self._observer.has_just_measured:
            self._plans.look_at_sizes(self._observer.activations())
            self._log_memory()
            self.check_measured()
        return self._in_its_shape(loss)

    def _batch_with_callbacks(self, data_iter: Any) -> Any:
        with ExitStack() as around, flops_profile(self, self._guard.defer):
            for callback in self._callbacks:
                around.enter_context(callback.batch())
            around.enter_context(self.resetting_timer())
            try:
                loss = super().train_batch(data_iter)
            except Exception as error:
                # Callbacks are collective, and other ranks come to them.
                if is_known_to_all(error) or self._guard.step.reached is not Reached.WHOLE:
                    raise
                self._guard.defer(error, "train_batch")
                loss = self.agg_train_loss
            if self._observer.has_just_measured:
                self._log_sizes()
        return loss

    def _agree_on_step(self, failure: Failure | None) -> None:
        """Raise on all ranks if the step, or what comes after it, has failed on one; collective."""
        self._guard.agree_on_step(failure, self.global_steps)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        self._guard.check_ranks_agree()
        return super().save_checkpoint(*args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        path, client_state = super().load_checkpoint(*args, **kwargs)
        if path is not None:
            self._guard.loaded()
        return path, client_state

    def flops_profiler_enabled(self) -> bool:
        """Whether each forward is profiled by itself (DeepSpeedEngine's hooks): here a batch is, in `train_batch`."""
        return False if self._constructed else bool(super().flops_profiler_enabled())

    def execute_plan(self, pipe_schedule: BatchPlan) -> None:
        if not isinstance(pipe_schedule, BatchPlan):
            raise PipelineError(f"the script runs a {type(pipe_schedule).__name__} of its own, but the schedule "
                                "decides what a batch consists of: train without \"pipeline_schedule\" in the "
                                "config, or by train_batch and eval_batch")
        training = torch.is_grad_enabled()
        if self.optimizer is not self._followed:
            self._follow_optimizer()
        if training and self._verification is not None and self._verification.is_due:
            pipe_schedule = self._verified(pipe_schedule)
        self.fwd_outputs: list[Any] = []
        self._channels.begin_batch(self._signatures if training and not self._announces else None)
        self._active_stage = None
        self._observer.begin_batch(pipe_schedule.schedule, training)
        if training:
            self._released.start(pipe_schedule.schedule.micro_batches)
        try:
            self._script.look(pipe_schedule.splits)
        except PipelineError as error:
            # All ranks raise it at the end of the batch.
            self._guard.fail(error, "the start of the batch")
        self.draw_ahead(pipe_schedule.schedule)
        try:
            self._run(pipe_schedule.instructions, pipe_schedule.passes)
        finally:
            self._observer.abandon_batch()
        signatures = self._channels.end_batch()
        self._forwards_before += pipe_schedule.schedule.micro_batches
        if training:
            self._signatures = signatures
            self._observer.end_batch(pipe_schedule.schedule)

    def _run(self, instructions: Sequence[instr.PipeInstruction], passes: Sequence[Pass | None]) -> None:
        """Execute `instructions`, and observe those with a pass in `passes`; after a failure, those that other ranks
        wait for."""
        attributes = self.__dict__
        try:
            for instruction, action in zip(instructions, passes):
                attributes["_instruction"] = instruction
                if not isinstance(instruction, instr.BufferOpInstruction):
                    self._execute(instruction)
                elif self._guard.failure is None:
                    self._attempt(instruction, action)
                else:
                    self._guard.abandon(instruction)
        except Exception as error:
            # The error for a lost rank names the instruction.
            if not is_ended_wait(error):
                attributes["_instruction"] = None
            raise
        attributes["_instruction"] = None

    def _verified(self, plan: BatchPlan) -> BatchPlan:
        """`plan` with instructions that compare its gradients with those of whole backwards, which have been run."""
        assert self._verification is not None
        compares = self._verification.run_whole(plan.schedule)
        return BatchPlan(plan.schedule, instr.comparing(plan.instructions)) if compares else plan

    def _execute(self, instruction: instr.PipeInstruction) -> None:
        self._INSTRUCTION_MAP[type(instruction)](self, **instruction.kwargs)

    def _attempt(self, instruction: instr.BufferOpInstruction, action: Pass | None) -> None:
        """Execute an instruction on one micro-batch; its error is kept for the end of the batch."""
        try:
            if action is None:
                self._execute(instruction)
            else:
                recorder = self._observer.recorder
                start = recorder.start(action)
                with self._observer.measuring(action, self._stage_buffers):
                    self._execute(instruction)
                recorder.end(action, start)
        except Exception as error:
            if is_ended_wait(error):
                raise
            self._guard.fail(error, instr.name_of(instruction))
            # Perhaps there was too little memory, and messages need some.
            self._stage_buffers.clear()
            self._guard.answer(instruction)

    # -- the rank's place in the pipeline

    def is_first_stage(self) -> bool:
        """Whether this rank holds the first stage: it loads the inputs."""
        return self._holds(0) if self._constructed else super().is_first_stage()

    def is_last_stage(self) -> bool:
        """Whether this rank holds the last stage: it loads the labels and computes the loss."""
        return self._holds(self.module.placement.last_stage) if self._constructed else super().is_last_stage()

    def _loss_stage_global_rank(self) -> int:
        return int(self.grid.stage_to_global(self.placement.rank_of(self.placement.last_stage)))

    # Plain functions, as in the stock engine: overriding a method alone would change nothing.
    _INSTRUCTION_MAP: dict[instr.Instruction, instr.Execute] = {
        **Loading._INSTRUCTION_MAP,
        **StagePasses._INSTRUCTION_MAP,
        **Messaging._INSTRUCTION_MAP,
        **BatchEnd._INSTRUCTION_MAP,
    }
