"""The engine: DeepSpeed's PipelineEngine (runtime/pipe/engine.py), driven by any schedule.

The stock engine takes for granted one stage a rank, one loss in flight, a backward in one piece and messages that
block. This one runs a program of instructions and knows nothing of schedules but that: each instruction names the
(stage, micro-batch) it works on, and each has one method here.

    [1] the data      LoadMicroBatch
    [2] forward       ForwardPass, SplitForwardPass
    [3] backward      BackwardPass, InputGradPass, WeightGradPass
    [4] messages      Send*, Recv*, Wait*, Release*
    [5] the end       ReturnLoss, StartReduceGrads; AgreeOnBatch; ReduceTiedGrads, ReduceGrads, OptimizerStep
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.activation_checkpointing import checkpointing as ds_checkpointing
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine, EngineTimers
from deepspeed.runtime.pipe import engine as stock
from deepspeed.runtime.pipe.module import PipelineError
from deepspeed.utils import logger
from torch import Tensor

from ds_vshape.checkpoint.checkpointing import SavingEngine
from ds_vshape.comm.background import Handle, background
from ds_vshape.comm.channels import Channels, PeerLost, Signatures
from ds_vshape.comm.payload import members
from ds_vshape.config.demands import check_micro_batches
from ds_vshape.engine.rollback import Samples
from ds_vshape.engine.scheduling import schedules_for
from ds_vshape.engine.verification import Verification
from ds_vshape.health.failures import Agreement, Failure, TensorParallelPeers, is_raised_by_all
from ds_vshape.health.preflight import Facts, plan_facts
from ds_vshape.health.step import Reached, Step, core_of
from ds_vshape.health.watch import Watch, is_ended_wait
from ds_vshape.measure.log_lines import comparison_line, ends_line, schedule_line
from ds_vshape.measure.monitor import Tracking
from ds_vshape.measure.observer import METERED_BATCH, Observer
from ds_vshape.measure.rank_memory import RankMemory
from ds_vshape.measure.trace import Tracer
from ds_vshape.module.dummy_parameter import add_to, give_gradient, keep_from_universal, with_stand_in
from ds_vshape.module.fast_setattr import FastSetattr
from ds_vshape.module.loss_fn import convert_without
from ds_vshape.runtime import instructions as instr
from ds_vshape.runtime.anomaly import checked
from ds_vshape.runtime.buffers import Buffer, Buffers, edges, enter
from ds_vshape.runtime.gradient_release import ReleasedWeights
from ds_vshape.runtime.gradients import (clip_gradients, delivery_into, leave_to_backward, place_of,
                                         reduce_tied_gradients)
from ds_vshape.runtime.instructions import BufferId
from ds_vshape.runtime.micro_batch import (Intake, added, as_number, check_loss, check_reduction, detached, loss_of,
                                           own_copy, own_labels)
from ds_vshape.runtime.reduction import reduction_for
from ds_vshape.runtime.script_functions import ScriptFunctions
from ds_vshape.runtime.wall_clock import timed
from ds_vshape.schedule import deadlock
from ds_vshape.schedule.forward_only import forward_only
from ds_vshape.schedule.lowering import Content, Message, Program, channels, lower, lower_announced, message_into
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.pending import with_few_pending
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule, check
from ds_vshape.schedule.synchronization import check_synchronization
from ds_vshape.schedule.timeline import Timeline, Times
from ds_vshape.split_backward import ALL_OPERATORS, MATRIX_OPERATORS, SplitBackward, SplitForward

# What waits for messages that may be in progress when a batch fails.
_MESSAGES_IN_PROGRESS = (instr.WaitActivation, instr.WaitGrad, instr.ReleaseActivation, instr.ReleaseGrad)
# B leaves 16 times what F does where transformer blocks are recomputed, and twice as much in a chain of linear layers.
_RECOMPUTED = 4
_OPERATORS = {"matrices": MATRIX_OPERATORS, "all": ALL_OPERATORS}


Lowering = Callable[[Schedule, Times], tuple[Program, ...]]


@dataclass(frozen=True)
class BatchPlan:
    """A schedule, and what this rank does for it."""

    schedule: Schedule
    instructions: list[instr.PipeInstruction]

    @cached_property
    def passes(self) -> list[Pass | None]:
        """The pass of each instruction that runs one."""
        return [instr.pass_of(instruction) for instruction in self.instructions]

    @cached_property
    def splits(self) -> bool:
        """Whether there are split passes in it."""
        return any(isinstance(instruction, instr.SplitForwardPass) for instruction in self.instructions)


class PipelineEngine(FastSetattr, SavingEngine):
    """Trains and evaluates a :class:`ds_vshape.PipelineModule` by the schedule its config names.

    Made by :func:`ds_vshape.initialize`. All public methods are DeepSpeed's; `schedule` and `pipeline_report` are
    added.
    """

    total_loss: Any
    total_additional_losses: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The stock constructor asks is_first_stage() and is_last_stage() for the ends of the chain of ranks, not of
        # the model: it warms up the neighbours with them.
        self._constructed = False
        super().__init__(*args, **kwargs)
        self._constructed = True
        self.placement: Placement = self.module.placement
        if not (self.is_first_stage() or self.is_last_stage()):
            self.data_iterator = self.training_dataloader = None
        self._watch: Watch = self.module.preflight.watch
        self._watch.progress = self._progress
        self._channels = Channels(channels(self.placement), self.grid.pipe_groups, self.device)
        self._signatures: Signatures | None = None
        self._messages: dict[tuple[Kind, BufferId], Message] = {}
        self._agreement = Agreement(self._watch.names[self.global_rank])
        self._sharers = TensorParallelPeers(self.grid.topology().get_axis_comm_lists("model"),
                                self.module.schedule_config.timeout_seconds)
        self._failure: Failure | None = None
        self._step = Step()
        # Why ranks mustn't train on, if their states differ.
        self._difference: str | None = None
        # The instruction that is executed.
        self._instruction: instr.PipeInstruction | None = None
        self._held = Buffers(self.placement, self.stage_id)
        first_of_replicas = self.grid.data_parallel_id == 0 and self.grid.get_slice_parallel_rank() == 0
        self._intake = Intake(2 if self.is_last_stage() else 1, self.is_first_stage() and first_of_replicas)
        self._observer = Observer(self)
        self._background = background()
        self._returning_loss: Handle[Tensor] | None = None
        self._script = ScriptFunctions(self)
        self._released = ReleasedWeights(self.module)
        self._follow_optimizer()
        self._operators = _OPERATORS[self.module.schedule_config.deferred]
        self._schedules = schedules_for(self.module.schedule_config, self.placement, self._measure_hops,
                                        self._observer.activations)
        self._samples = Samples()
        self._verification = Verification(self) if self.module.schedule_config.verify_gradients else None
        self._plans: dict[int, BatchPlan] = {}
        # Those of `_plans` for batches in which messages are announced, as far as there were any.
        self._announced_plans: dict[int, BatchPlan] = {}
        self._swapped = False
        # Whether forwards leave less than backwards do.
        self._recomputes = self.module.activation_checkpoint_interval > 0
        self._forwards_before = 0
        # None between batches: saving and loading activate stages too.
        self._active_stage: int | None = None
        # DeepSpeed's hooks of a forward and a backward start these, but not every backward here ends as they expect.
        self.engine_timers = EngineTimers(enable_micro_timers=False, enable_global_timers=False)
        if self.module.schedule_config.detect_anomaly:
            self._INSTRUCTION_MAP = checked(self._INSTRUCTION_MAP)
        if self.wall_clock_breakdown():
            self._INSTRUCTION_MAP = timed(self._INSTRUCTION_MAP, self.timers)
        # What follows whole batches, where it was asked for; the first is outermost.
        self._callbacks: list[Tracer | Tracking] = []
        if self.module.schedule_config.trace is not None:
            self._callbacks.append(Tracer(self, self._observer, self._channels, self.module.schedule_config.trace))
        if self.monitor.enabled:
            self._callbacks.append(Tracking(self, self._observer, self._held))
        self._log(schedule_line(self.schedule()))
        self.preflight()

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        # Scripts call it too, to make an optimizer from what `initialize` has given them.
        if hasattr(client_optimizer, "param_groups"):
            add_to(client_optimizer, self.module)
        else:
            model_parameters = with_stand_in(self.module, model_parameters)
        self.param_names |= {parameter: name for name, parameter in self.module.named_parameters()}
        super()._configure_optimizer(client_optimizer, model_parameters)
        keep_from_universal(self.module)

    def _follow_optimizer(self) -> None:
        """Let gradients add up, and be reduced, where the present optimizer looks for them."""
        self._followed = self.optimizer
        self.using_bf16_optimizer = type(self.optimizer) is BF16_Optimizer
        self._sums = place_of(self.optimizer)
        self._deliver = delivery_into(self._sums, self.module.schedule_config.gradient_accumulation_fusion)
        leave_to_backward(self.module.parameters(), self._sums)
        convert_without(self.optimizer, self.module.idle_weights())
        self._reduction = reduction_for(self, self._background, self._deliver)

    def preflight(self) -> None:
        """Check that all ranks have one plan and hear each other (ds_vshape/health/preflight.py); collective."""

        def facts() -> Facts:
            self._script.look(self._train_schedule().splits)
            return {**plan_facts(self.schedule(), self.grid.pipe_groups), "functions of the script": self._script.names}

        self.module.preflight.compare(facts)
        self.module.preflight.probe(self._channels.ends())

    # -- schedules and programs

    def schedule(self) -> Schedule:
        """The schedule of a training batch with the present number of micro-batches."""
        return self._plan().schedule

    def _plan(self) -> BatchPlan:
        """The plan of training batches with the present number of micro-batches."""
        if self.micro_batches not in self._plans:
            check_micro_batches(self.micro_batches, self.placement.ranks)
            self._adopt(self._schedules.first(self.micro_batches))
        return self._plans[self.micro_batches]

    def _train_schedule(self) -> BatchPlan:
        """The plan of the next training batch."""
        plan = self._plan()
        if not self._announces:
            return plan
        if self.micro_batches not in self._announced_plans:
            self._announced_plans[self.micro_batches] = self._planned(plan.schedule)
        return self._announced_plans[self.micro_batches]

    @property
    def _announces(self) -> bool:
        """Whether messages are announced in the next training batch. In one that DeepSpeed's flops profiler measures,
        too, the host waits for a GPU in many passes, which only announced batches bear."""
        return self._signatures is None or bool(self.dynamic_shape) or self.is_flops_profiled()

    def use_schedule(self, schedule: Schedule) -> None:
        """Train by `schedule` from the next batch of as many micro-batches on; to be called on every rank.

        Losses don't change. Raises ScheduleError or DeadlockError for one that can't run, PipelineError for one with
        another placement than the model's.
        """
        if schedule.placement != self.placement:
            raise PipelineError(f"{schedule.name} places its stages as {schedule.placement.chunks}, but the model has "
                                f"{self.placement.chunks}")
        check(schedule)
        self._plans[schedule.micro_batches] = self._planned(schedule, lower)
        self._announced_plans.pop(schedule.micro_batches, None)

    def _planned(self, schedule: Schedule, lowering: Lowering = lower_announced) -> BatchPlan:
        return BatchPlan(schedule, self._training_instructions(self._program(schedule, lowering)))

    def _training_instructions(self, program: Program) -> list[instr.PipeInstruction]:
        return instr.training_instructions(program)

    def _adopt(self, schedule: Schedule) -> None:
        """Use a schedule of the config's, with fewer weight gradients that wait where those are most of the memory."""
        in_bytes = isinstance(self.module.schedule_config.memory_limit, int)
        knows_sizes = in_bytes and not self._observer.sizes_stay_unknown
        self.use_schedule(with_few_pending(schedule) if self._recomputes and not knows_sizes else schedule)

    def _agree_on_sizes(self) -> None:
        unknown = self._observer.agree_on_sizes()
        if unknown:
            self._log(f"activations couldn't be measured in training batch {METERED_BATCH + 1}, and their sizes stay "
                      f"unknown: {unknown}")

    def _look_at_sizes(self) -> None:
        """A layer may recompute on its own; that shows when activations are measured."""
        activations = self._observer.activations()
        if activations is None:
            return
        if sum(activations.kept) > _RECOMPUTED * sum(activations.whole) and not self._recomputes:
            self._recomputes = True
            for plan in list(self._plans.values()):
                self._adopt(plan.schedule)

    def train_batch(self, data_iter: Any = None) -> Any:
        """Train on the next batch, as DeepSpeed's `train_batch`; a schedule that knows the times may come out of it."""
        with self._watch.phase(self._doing("train_batch")):
            return self._train_batch(data_iter)

    def _train_batch(self, data_iter: Any) -> Any:
        self._check_ranks_agree()
        self._step, self._watch.failure = Step(), None
        failure: Failure | None = None
        loss: Any = None
        try:
            loss = self._batch_with_callbacks(data_iter)
        except Exception as error:
            if is_ended_wait(error) or is_raised_by_all(error):
                raise
            failure = self._agreement.failure(error, "train_batch")
        self._agree_on_step(failure)
        better = self._schedules.after_batch(*self._observer.last_batch())
        if better is not None:
            self._adopt(better)
        elif self._swapped and self.planned_times is not None:
            self._compare_with_plan()
        self._swapped = better is not None
        if self._observer.batches == METERED_BATCH + 1:
            self._look_at_sizes()
            for rank, memory in enumerate(self.memory_report()):
                self._log(f"pipeline rank {rank} needs {memory}")
        return self._in_its_shape(loss)

    def _in_its_shape(self, loss: Tensor) -> Tensor:
        """The batch's loss as DeepSpeed returns it: where it's computed in its own shape, elsewhere a number."""
        if self.is_last_stage() and self.loss.dim():
            shape = self.loss.shape
            self.agg_train_loss, self.total_loss = loss.reshape(shape), self.total_loss.reshape(shape)
            return self.agg_train_loss
        return loss

    def _batch_with_callbacks(self, data_iter: Any) -> Any:
        with ExitStack() as around, self._flops_profile():
            for follower in self._callbacks:
                around.enter_context(follower.batch())
            around.enter_context(self._batch_timer())
            loss = super().train_batch(data_iter)
            if self._observer.batches == METERED_BATCH + 1:
                self._agree_on_sizes()
        return loss

    def _agree_on_step(self, failure: Failure | None) -> None:
        """Raise on all ranks if the step, or what comes after it, has failed on one (step.py); collective."""
        if self._step.error is not None:
            failure = self._agreement.failure(self._step.error, "OptimizerStep")
        with self._watch.failed(failure):
            reached = self._agreement.reached(failure, self._step.reached)
        if reached is None:
            return
        consequence = None
        if reached is Reached.BEFORE:
            self._forget_batch()
        elif reached is Reached.WHOLE:
            consequence = f"the step is done on all ranks, as number {self.global_steps}"
        else:
            consequence = self._difference = (
                "weights or states of the optimizer may differ between ranks now, so that no batch is trained and "
                "nothing saved before load_checkpoint")
        self._agreement.reach(failure, consequence=consequence)

    def _check_ranks_agree(self) -> None:
        """Raise PipelineError, on all ranks, where an earlier step has failed on some of them alone."""
        if self._difference is not None:
            raise PipelineError(f"a step has failed on some ranks: {self._difference}")

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        self._check_ranks_agree()
        return super().save_checkpoint(*args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        path, client_state = super().load_checkpoint(*args, **kwargs)
        if path is not None:
            self._difference = None
        return path, client_state

    @contextmanager
    def _batch_timer(self) -> Iterator[None]:
        """Around a training batch: DeepSpeed leaves its timer running where the batch raises, and the next one would
        be refused for that."""
        try:
            yield
        except BaseException:
            self.timers(stock.TRAIN_BATCH_TIMER).reset()
            raise

    def flops_profiler_enabled(self) -> bool:
        """Whether each forward is profiled by itself (DeepSpeedEngine's hooks): here a batch is, in `train_batch`."""
        return False if self._constructed else bool(super().flops_profiler_enabled())

    def is_flops_profiled(self) -> bool:
        """Whether the next training batch is the one that DeepSpeed's flops profiler measures, on all ranks."""
        return hasattr(self, "flops_profiler") and self.global_steps == self.flops_profiler_profile_step()

    @contextmanager
    def _flops_profile(self) -> Iterator[None]:
        """Around a training batch: profile what global rank 0 computes forward, recomputation included, in its step."""
        if self.global_rank or not self.is_flops_profiled():
            yield
            return
        profiler, step = self.flops_profiler, self.global_steps
        if self.wall_clock_breakdown():
            # It would divide by timers that the end of the batch has set back.
            profiler.ds_engine = None
        profiler.start_profile()
        try:
            yield
            profiler.stop_profile()
            profiler.print_model_profile(step, self.flops_profiler_module_depth(), self.flops_profiler_top_modules(),
                                         self.flops_profiler_detailed(), self.flops_profiler_output_file())
        finally:
            profiler.end_profile()

    def eval_batch(self, data_iter: Any, return_logits: bool = False, compute_loss: bool = True,
                   reduce_output: str | None = "avg", bcast_loss: bool = True,
                   num_micro_batches: int | None = None) -> Any:
        """Evaluate a batch, as DeepSpeed's `eval_batch`; training isn't disturbed, even if it raises."""
        self._check_ranks_agree()
        check_reduction(reduce_output, compute_loss and (bcast_loss or self.monitor.enabled))
        training_iterator = self.data_iterator
        try:
            with self._watch.phase(self._doing("eval_batch")):
                return super().eval_batch(data_iter, return_logits, compute_loss, reduce_output, bcast_loss,
                                          num_micro_batches)
        finally:
            self.data_iterator = training_iterator
            self.eval_return_logits = False
            self.outputs = None

    def rollback_bytes(self) -> int:
        """What this rank keeps to take a step back."""
        return 0

    def memory_report(self) -> tuple[RankMemory, ...]:
        """The bytes that each pipeline rank needs; to be called on every rank, after two training batches. Activations
        are None where they couldn't be measured, which the log has said."""
        return self._observer.memory(self.schedule())

    def _progress(self) -> str:
        """What the error for a lost rank says of the training; before the first step also where the ends of the model
        are, since a script may wait for the wrong rank there."""
        return f"the last batch done is number {self.global_steps}" + ("" if self.global_steps else
                                                                       ends_line(self.placement))

    def _doing(self, what: str) -> Callable[[], str]:
        """Gives the name of the instruction in which this rank is at the time (its device, where that runs behind the
        host), or `what` where there is none."""
        def name() -> str:
            awaited = self._channels.awaited_by_device()
            instruction = self._instruction if awaited is None else instr.instruction_of(awaited)
            return what if instruction is None else _name_of(instruction)

        return name

    def _log(self, line: str) -> None:
        if self.global_rank == 0:
            logger.info(line)

    def _compare_with_plan(self) -> None:
        """Say once after a swap how the new schedule ran."""
        self._log(comparison_line(self._observer.last_batch()[0].name, *self.timelines()))

    @property
    def planned_times(self) -> Times | None:
        """The measured times that the present schedule was planned for; None where there are none, or none yet."""
        return self._schedules.times

    def timelines(self) -> tuple[Timeline, Timeline]:
        """The last training batch as predicted and as measured, in seconds; to be called on every rank.

        The prediction takes the times that the schedule was planned for, or else the batch's own mean times.
        """
        return self._observer.timelines(self.planned_times)

    def _measure_hops(self) -> list[float]:
        """Seconds of a hop from each stage to the next [boundary] that leaves this rank; 0 for all others."""
        boundaries = [message_into(Pass(Kind.F, stage, 0), self.placement) for stage in range(1, self.placement.stages)]
        measured = iter(self._channels.measure_hops([message for message in boundaries if message is not None]))
        return [0.0 if message is None else next(measured) for message in boundaries]

    def _inference_schedule(self, micro_batches: int) -> BatchPlan:
        if micro_batches < 1:
            raise PipelineError(f"num_micro_batches = {micro_batches}: must be at least 1")
        check_micro_batches(micro_batches, self.placement.ranks, "num_micro_batches")
        schedule = forward_only(self.placement, micro_batches)
        return BatchPlan(schedule, instr.evaluation_instructions(self._program(schedule, lower_announced)))

    def _program(self, schedule: Schedule, lowering: Lowering) -> Program:
        programs = lowering(schedule, Times.uniform(self.placement.stages))
        deadlock.check(programs, self.placement)
        check_synchronization(programs)
        return programs[self.stage_id]

    def _exec_schedule(self, pipe_schedule: BatchPlan) -> None:
        if not isinstance(pipe_schedule, BatchPlan):
            raise PipelineError(f"the script runs a {type(pipe_schedule).__name__} of its own, but what a batch "
                                "consists of is the schedule's: train without \"pipeline_schedule\" in the config, "
                                "or by train_batch and eval_batch as they are")
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
            self._failure = self._agreement.failure(error, "the start of the batch")
            self._sharers.check_all_failed(self._failure)
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
        """Execute `instructions`, with an eye on those that have a pass in `passes`; of a batch that fails, only what
        other ranks wait for."""
        attributes = self.__dict__
        try:
            for instruction, work in zip(instructions, passes):
                attributes["_instruction"] = instruction
                if not isinstance(instruction, instr.BufferOpInstruction):
                    self._execute(instruction)
                elif self._failure is None:
                    self._attempt(instruction, work)
                else:
                    self._abandon(instruction)
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

    def _next_batch(self) -> Any:
        return self._samples.take(super()._next_batch)

    def _execute(self, instruction: instr.PipeInstruction) -> None:
        self._INSTRUCTION_MAP[type(instruction)](self, **instruction.kwargs)

    def _attempt(self, instruction: instr.BufferOpInstruction, work: Pass | None) -> None:
        """Execute an instruction on one micro-batch; an error of it is kept for the end of the batch."""
        try:
            if work is None:
                self._execute(instruction)
            else:
                with self._observer.watching(work, self._held):
                    self._execute(instruction)
        except Exception as error:
            if is_ended_wait(error):
                raise
            self._failure = self._agreement.failure(error, _name_of(instruction))
            self._watch.failure = str(self._failure)
            self._sharers.check_all_failed(self._failure)
            # Perhaps there was too little memory, and messages need some.
            self._held.clear()
            self._abandon(instruction)

    def _abandon(self, instruction: instr.PipeInstruction) -> None:
        """Of an instruction that this rank can't do any more, do what other ranks wait for; PeerLost if it can't."""
        try:
            self._answer(instruction, instruction.kwargs["buffer_id"])
        except PeerLost:
            raise
        except Exception as error:
            raise PeerLost(f"{self._failure}; and then this rank couldn't do what the others wait for: "
                           f"{_name_of(instruction)}: {type(error).__name__}: {error}") from error

    def _answer(self, instruction: instr.PipeInstruction, buffer_id: BufferId) -> None:
        if isinstance(instruction, (instr.SendActivation, instr.SendGrad)):
            self._channels.withdraw(self._message(instr.MESSAGE_KINDS[type(instruction)], buffer_id))
        elif isinstance(instruction, (instr.RecvActivation, instr.RecvGrad)):
            self._execute(instruction)
        elif isinstance(instruction, _MESSAGES_IN_PROGRESS):
            self._channels.discard(self._message(instr.MESSAGE_KINDS[type(instruction)], buffer_id))

    def _forget_batch(self) -> None:
        """Leave nothing of a batch that failed: no messages, no activations, no gradients."""
        self._held.clear()
        self._channels.end_batch()
        if self._returning_loss is not None:
            self._aggregate_total_loss()
        if self._reduction is not None:
            self._reduction.forget()
        for parameter in self.module.parameters():
            parameter.grad = None
        if hasattr(self.optimizer, "zero_grad"):
            self.optimizer.zero_grad()

    def compile(self, *args: Any, compiled_autograd_enabled: bool = False, **kwargs: Any) -> None:
        """DeepSpeed's `compile`, by layer; the weight gradients of a compiled layer come in B.

        Raises PipelineError for `compiled_autograd_enabled` with a schedule that has W: that isn't a whole backward.
        """
        schedule = self.schedule()
        if compiled_autograd_enabled and any(work.kind is Kind.W for order in schedule.orders for work in order):
            raise PipelineError(f"compiled_autograd_enabled = True: must be False with {schedule.name}, which splits "
                                "the backward; its layers can be compiled all the same")
        super().compile(*args, compiled_autograd_enabled=compiled_autograd_enabled, **kwargs)

    # -- where this rank stands

    def is_first_stage(self) -> bool:
        """Whether this rank holds the first stage: it loads the inputs."""
        return self._holds(0) if self._constructed else super().is_first_stage()

    def is_last_stage(self) -> bool:
        """Whether this rank holds the last stage: it loads the labels and computes the loss."""
        return self._holds(self.module.placement.last_stage) if self._constructed else super().is_last_stage()

    def _holds(self, stage: int) -> bool:
        return bool(self.module.placement.rank_of(stage) == self.stage_id)

    def _loss_stage_global_rank(self) -> int:
        return int(self.grid.stage_to_global(self.placement.rank_of(self.placement.last_stage)))

    def _activate(self, stage: int) -> None:
        if stage != self._active_stage:
            self._active_stage = stage
            self.module.activate_stage(stage)

    # -- [1] the data

    def _exec_load_micro_batch(self, buffer_id: BufferId) -> None:
        inputs, labels = self._intake.pair(self._next_batch())
        if self._holds(0):
            inputs = own_copy(inputs, self.device, "inputs")
            if self._reentrant_activation_checkpointing():
                for tensor in members(inputs):
                    if tensor is not None:
                        tensor.requires_grad_(tensor.is_floating_point())
            self._held.open(BufferId(0, buffer_id.micro_batch)).inputs = inputs
        if self._holds(self.placement.last_stage):
            buffer = self._held.open(BufferId(self.placement.last_stage, buffer_id.micro_batch))
            buffer.labels = own_labels(labels, self.device)

    # -- [2] forward

    def _exec_forward_pass(self, buffer_id: BufferId) -> None:
        self._pass_on(buffer_id, self._forward(buffer_id))

    def _exec_split_forward_pass(self, buffer_id: BufferId) -> None:
        with SplitForward(self._held[buffer_id].store, self._operators):
            outputs = self._forward(buffer_id)
        self._pass_on(buffer_id, outputs)

    def _forward(self, buffer_id: BufferId) -> list[Any]:
        """Run the stage, and the loss function on the last one; the outputs alone in a list, if a stage follows."""
        buffer = self._held[buffer_id]
        buffer.check_unwritten(Content.ACTIVATION)
        assert buffer.inputs is not None
        self._activate(buffer_id.stage)
        # The seeds of layers count forward calls, and must not depend on the order of the passes.
        self.module.micro_offset = self._forwards_before + buffer_id.micro_batch
        outputs = DeepSpeedEngine.forward(self, enter(buffer.inputs))
        if not self.module.training:
            ds_checkpointing.reset()
        if buffer_id.stage == self.placement.last_stage:
            buffer.loss = self._compute_micro_batch_loss(outputs, buffer.labels)
            buffer.labels = None
            return []
        return [outputs]

    def _pass_on(self, buffer_id: BufferId, outputs: list[Any]) -> None:
        """Hand a stage's outputs over to the next one. The list must have the only reference to them; it's emptied."""
        if outputs:
            self._held[buffer_id].roots = edges(outputs[0], self.device)
            is_tuple = isinstance(outputs[0], tuple)
            receiver = BufferId(buffer_id.stage + 1, buffer_id.micro_batch)
            self._held.hand_over(Content.ACTIVATION, receiver, [*members(outputs.pop())], is_tuple)
        if not torch.is_grad_enabled():
            self._held.close(buffer_id)

    def _compute_micro_batch_loss(self, outputs: Any, labels: Any) -> Any:
        """The loss of one micro-batch; in training it is added to the batch's."""
        compute = self._compute_loss and self.module.loss_fn is not None
        loss = loss_of(self.module.loss_fn, outputs, labels) if compute else outputs
        if torch.is_grad_enabled():
            check_loss(loss)
        if self.eval_return_logits:
            self.outputs = outputs
        self.loss = detached(loss)
        self.fwd_outputs.append(self.loss)
        if torch.is_grad_enabled():
            self._add_to_batch_loss(self.loss)
        return loss

    def _add_to_batch_loss(self, loss: Any) -> None:
        self.total_loss = added(self.total_loss, loss)
        additional = self.module.get_additional_losses()
        if additional is not None:
            totals = self.total_additional_losses or {}
            self.total_additional_losses = OrderedDict(
                (name, added(totals.get(name), detached(value))) for name, value in additional.items())

    # -- [3] backward

    def _exec_backward_pass(self, buffer_id: BufferId) -> None:
        self._backward(buffer_id)
        self._held.close(buffer_id)

    def _exec_input_grad_pass(self, buffer_id: BufferId) -> None:
        store = self._held[buffer_id].store
        store.meanwhile = partial(self._weight_grad_meanwhile, buffer_id)
        # Active in the backward too: a checkpointed layer runs its forward again in there.
        with SplitBackward(store, self._operators):
            self._backward(buffer_id)

    def _weight_grad_meanwhile(self, running: BufferId) -> None:
        """Take one weight gradient of a W to come while a B waits for other ranks."""
        store = self._held.waiting(apart=running)
        if store is not None:
            self._observer.weights_split(store)
            store.run_next(self._deliver)

    def _exec_weight_grad_pass(self, buffer_id: BufferId, piece: int, pieces: int) -> None:
        self._activate(buffer_id.stage)
        store = self._held[buffer_id].store
        self._observer.weights_split(store)
        store.run_piece(piece, pieces, self._deliver)
        if piece == pieces - 1:
            self._held.close(buffer_id)

    def _backward(self, buffer_id: BufferId) -> None:
        """Run autograd from the stage's outputs to its inputs, and to the weights that the split leaves to it."""
        buffer = self._held[buffer_id]
        buffer.check_unwritten(Content.GRADIENT)
        self._activate(buffer_id.stage)
        if buffer_id.stage == self.placement.last_stage:
            loss, buffer.loss = buffer.loss, None
            DeepSpeedEngine.backward(self, loss)
        else:
            self._backward_without_loss(buffer)
        grads = buffer.take_input_grads()
        if buffer_id.stage:
            receiver = BufferId(buffer_id.stage - 1, buffer_id.micro_batch)
            self._held.hand_over(Content.GRADIENT, receiver, grads, is_tuple=True)

    def _backward_without_loss(self, buffer: Buffer) -> None:
        """What the stock engine does around the backward of a stage that has no loss."""
        pairs = [(root, grad) for root, grad in zip(buffer.roots, buffer.output_grads, strict=True)
                 if root is not None and grad is not None]
        buffer.roots = buffer.output_grads = ()
        if pairs:
            self._running_engine_backward = True
            try:
                torch.autograd.backward([root for root, _ in pairs], [grad for _, grad in pairs])
            finally:
                self._running_engine_backward = False
        self._sums.take_in()

    # DeepSpeed's optimizers look at `.grad` in both, and one of them zeroes it in the first.
    def _backward_prologue(self) -> None:
        self._sums.take_in()
        super()._backward_prologue()

    def _backward_epilogue(self) -> None:
        self._sums.take_in()
        super()._backward_epilogue()

    def _backward_prologue_per_tensor(self, grad: Tensor) -> Tensor:
        # Gradients are divided by the accumulation steps once: on the stage with the loss.
        if self._active_stage == self.placement.last_stage:
            return DeepSpeedEngine._backward_prologue_per_tensor(self, grad)  # type: ignore[no-any-return]
        return grad

    # -- [4] messages

    def _exec_recv_activation(self, buffer_id: BufferId) -> None:
        self._channels.post(self._message(Kind.F, buffer_id))

    def _exec_recv_grad(self, buffer_id: BufferId) -> None:
        self._channels.post(self._message(Kind.B, buffer_id))

    def _exec_wait_activation(self, buffer_id: BufferId) -> None:
        self._held.open(buffer_id).inputs = self._channels.receive(self._message(Kind.F, buffer_id))

    def _exec_wait_grad(self, buffer_id: BufferId) -> None:
        self._held[buffer_id].output_grads = members(self._channels.receive(self._message(Kind.B, buffer_id)))

    def _exec_send_activation(self, buffer_id: BufferId) -> None:
        self._channels.send(self._message(Kind.F, buffer_id), self._held.take(Content.ACTIVATION, buffer_id))

    def _exec_send_grad(self, buffer_id: BufferId) -> None:
        self._channels.send(self._message(Kind.B, buffer_id), self._held.take(Content.GRADIENT, buffer_id))

    def _exec_release_activation(self, buffer_id: BufferId) -> None:
        self._channels.release(self._message(Kind.F, buffer_id))

    def _exec_release_grad(self, buffer_id: BufferId) -> None:
        self._channels.release(self._message(Kind.B, buffer_id))

    def _message(self, kind: Kind, buffer_id: BufferId) -> Message:
        message = self._messages.get((kind, buffer_id))
        if message is None:
            message = message_into(Pass(kind, *buffer_id), self.placement)
            assert message is not None
            self._messages[kind, buffer_id] = message
        return message

    def reset_activation_shape(self) -> None:
        """Announce the shapes of all messages again in the next batch; to be called on every rank."""
        super().reset_activation_shape()
        self._signatures = None

    # -- [5] the end of a batch, reports

    def _exec_return_loss(self) -> None:
        if self._failure is not None and self.is_last_stage():
            # It isn't used, but the others wait for it.
            self.total_loss = torch.full((), torch.nan, device=self.device)
            self.total_additional_losses = self.module.get_additional_losses()
        # They are sent as numbers; where they are computed, train_batch gives them their shape back.
        self.total_loss = as_number(self.total_loss)
        if self.total_additional_losses is not None:
            self.total_additional_losses = OrderedDict(
                (name, as_number(loss)) for name, loss in self.total_additional_losses.items())
        aggregate = super()._aggregate_total_loss if self.is_last_stage() else self._receive_total_loss
        self._returning_loss = self._background.start(aggregate)

    def _receive_total_loss(self) -> Tensor:
        """What DeepSpeed's `_aggregate_total_loss` does on ranks without the loss; that one copies numbers of the host
        to the device, and waits for it."""
        names = list(self.module.get_additional_losses() or ())
        losses = torch.zeros(2 + len(names), dtype=torch.float32, device=self.device)
        dist.broadcast(losses, self._loss_stage_global_rank(), group=self.grid.get_pipe_parallel_group())
        loss: Tensor
        self.dp_group_loss, loss, *additional = (one.clone() for one in losses)
        if names:
            self.agg_additional_losses = OrderedDict(zip(names, additional, strict=True))
        return loss

    def _aggregate_total_loss(self) -> Tensor:
        """The batch's loss, which is on its way since `ReturnLoss`."""
        assert self._returning_loss is not None
        loss = self._returning_loss.result()
        self._returning_loss = None
        return loss

    def _exec_start_reduce_grads(self, stage: int) -> None:
        if self._reduction is not None and not self._script.reduce:
            self._sums.take_in()
            self._reduction.start(stage)

    def _exec_compare_gradients(self, stage: int) -> None:
        assert self._verification is not None
        self._verification.compare(stage)

    def _exec_agree_on_gradients(self) -> None:
        assert self._verification is not None
        self._verification.agree()

    def _exec_agree_on_batch(self) -> None:
        if torch.is_grad_enabled() and self._failure is None:
            try:
                self._released.check()
            except PipelineError as error:
                self._failure = self._agreement.failure(error, "the passes of the batch")
        failure, self._failure = self._failure, None
        try:
            self._agreement.reach(failure)
        except Exception as error:
            if is_ended_wait(error):
                raise
            self._watch.failure = None
            self._forget_batch()
            raise
        if torch.is_grad_enabled():
            self._prepare_reduction()

    def _prepare_reduction(self) -> None:
        """Between the passes of a batch and the reductions of its gradients, by whatever function."""
        # Replicas average the loss in the group in which gradients are reduced, so the loss comes first on all of them.
        if self._returning_loss is not None:
            self._returning_loss.result()
        self._sums.take_in()
        give_gradient(self.module, self._deliver)

    def _exec_reduce_tied_grads(self) -> None:
        of_script = self._script.get(instr.ReduceTiedGrads)
        if of_script is not None:
            of_script(self)
        else:
            reduce_tied_gradients(self.module, self._sums)

    def _exec_reduce_grads(self) -> None:
        of_script = self._script.get(instr.ReduceGrads)
        if of_script is not None:
            of_script(self)
        elif self._reduction is None or not self._reduction.finish():
            stock.PipelineEngine._INSTRUCTION_MAP[instr.ReduceGrads](self)

    def _exec_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As DeepSpeed's, or the script's; an error of it is kept until all ranks have come to the end of the batch."""
        execute = self._script.get(instr.OptimizerStep) or stock.PipelineEngine._INSTRUCTION_MAP[instr.OptimizerStep]
        step, before = self._step, self.global_steps
        try:
            with step.watching(core_of(self.optimizer)):
                execute(self, *args, **kwargs)
        except Exception as error:
            if is_ended_wait(error):
                raise
            step.error = step.error or error
            self._watch.failure = str(self._agreement.failure(error, "OptimizerStep"))
            self._force_grad_boundary = False
        if self.global_steps > before and not step.core_failed:
            step.reached = Reached.WHOLE

    def clip_fp32_gradients(self) -> None:
        self._global_grad_norm = clip_gradients(self.module.parameters(), self.gradient_clipping(), self.mpu)

    def pipeline_report(self) -> dict[str, Any]:
        """How the last training batch went; to be called on every rank.

        Returns what :func:`ds_vshape.measure.profiling.report` does.
        """
        return self._observer.report()

    # Plain functions, as in the stock engine: overriding a method alone would change nothing.
    _INSTRUCTION_MAP: dict[instr.Instruction, instr.Execute] = {
        instr.LoadMicroBatch: _exec_load_micro_batch,
        instr.ForwardPass: _exec_forward_pass,
        instr.SplitForwardPass: _exec_split_forward_pass,
        instr.BackwardPass: _exec_backward_pass,
        instr.InputGradPass: _exec_input_grad_pass,
        instr.WeightGradPass: _exec_weight_grad_pass,
        instr.RecvActivation: _exec_recv_activation,
        instr.RecvGrad: _exec_recv_grad,
        instr.WaitActivation: _exec_wait_activation,
        instr.WaitGrad: _exec_wait_grad,
        instr.SendActivation: _exec_send_activation,
        instr.SendGrad: _exec_send_grad,
        instr.ReleaseActivation: _exec_release_activation,
        instr.ReleaseGrad: _exec_release_grad,
        instr.ReturnLoss: _exec_return_loss,
        instr.StartReduceGrads: _exec_start_reduce_grads,
        instr.CompareGradients: _exec_compare_gradients,
        instr.AgreeOnGradients: _exec_agree_on_gradients,
        instr.AgreeOnBatch: _exec_agree_on_batch,
        instr.ReduceTiedGrads: _exec_reduce_tied_grads,
        instr.ReduceGrads: _exec_reduce_grads,
        instr.OptimizerStep: _exec_optimizer_step,
    }


def _name_of(instruction: instr.PipeInstruction) -> str:
    """An instruction in the words of an error."""
    name = type(instruction).__name__
    if not isinstance(instruction, instr.BufferOpInstruction):
        return name
    stage, micro_batch = instruction.kwargs["buffer_id"]
    of_stage = "" if isinstance(instruction, instr.LoadMicroBatch) else f" of stage {stage}"
    return f"{name}{of_stage}, micro-batch {micro_batch}"
