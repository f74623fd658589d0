"""What fails in a batch on one rank fails on all at its end, and until then the rank does what the others wait for.

    an instruction fails      its error is kept, and the tensor parallel peers are asked whether they failed as well
    the rest of the batch     messages are sent without content, taken in, and waited for, and data are drawn, so that
                              the next batch starts at the same place on all ranks; nothing else runs
    the end of the batch      all ranks agree: none counts the batch (AgreeOnBatch), or they know how far its step came
"""

from __future__ import annotations

from collections.abc import Callable

from deepspeed.runtime.pipe.module import PipelineError
from deepspeed.utils import logger

from ds_vshape.comm.channels import Channels, PeerLost
from ds_vshape.health.failures import Agreement, Failure, TensorParallelPeers
from ds_vshape.health.step import BatchStep, Reached
from ds_vshape.health.waits import is_ended_wait
from ds_vshape.health.watch import Watch
from ds_vshape.runtime import instructions as instr

# What waits for messages that may be in progress when a batch fails.
_MESSAGES_IN_PROGRESS = (instr.WaitActivation, instr.WaitGrad, instr.ReleaseActivation, instr.ReleaseGrad)


class BatchGuard:
    """Keeps a batch that fails on one rank from hanging the others.

    Args:
        agreement: of all ranks of the job.
        peers: the ranks that share layers with this one.
        watch: of the job, by which other ranks learn what has failed here.
        channels: this rank's.
        execute: executes an instruction.
        skip: draws the data of a micro-batch that isn't trained.
        forget: drops everything of a batch: messages, activations, gradients.
    """

    def __init__(self, agreement: Agreement, peers: TensorParallelPeers, watch: Watch, channels: Channels,
                 execute: Callable[[instr.PipeInstruction], None], skip: Callable[[], None],
                 forget: Callable[[], None]) -> None:
        self._agreement, self._peers, self._watch, self._channels = agreement, peers, watch, channels
        self._execute, self._skip, self._forget = execute, skip, forget
        # What has failed on this rank in the present batch, until all ranks know it.
        self.failure: Failure | None = None
        self.step = BatchStep()
        # An error of this rank that hasn't stopped the batch.
        self._deferred: Failure | None = None
        # Why ranks mustn't train on, if their states differ.
        self._difference: str | None = None

    # -- the passes

    def start_batch(self) -> None:
        """Raise PipelineError, on all ranks, where an earlier step has failed on some of them alone."""
        self.check_ranks_agree()
        self.step, self._watch.failure = BatchStep(), None

    def fail(self, error: Exception, where: str) -> None:
        """Keep an error of this rank in `where`. PeerLost if tensor parallel peers haven't failed: they wait for it."""
        self.failure = self._agreement.failure(error, where)
        # The others must hear of the cause, not of what follows from it.
        self._watch.failure = None if self.failure.is_anothers else str(self.failure)
        self._peers.check_all_failed(self.failure)

    def abandon(self, instruction: instr.BufferOpInstruction) -> None:
        """Of an instruction after the one that failed, do what others wait for, and what the next batch relies on;
        PeerLost if this rank can't."""
        if isinstance(instruction, instr.LoadMicroBatch):
            self._skip()
        else:
            self.answer(instruction)

    def answer(self, instruction: instr.BufferOpInstruction) -> None:
        """Of an instruction that this rank can't do any more, do what other ranks wait for; PeerLost if it can't."""
        try:
            self._answer(instruction)
        except PeerLost:
            raise
        except Exception as error:
            raise PeerLost(f"{self.failure}; and then this rank couldn't do what the others wait for: "
                           f"{instr.name_of(instruction)}: {type(error).__name__}: {error}") from error

    def _answer(self, instruction: instr.BufferOpInstruction) -> None:
        if isinstance(instruction, (instr.SendActivation, instr.SendGrad)):
            self._channels.withdraw(instruction.message)
        elif isinstance(instruction, (instr.RecvActivation, instr.RecvGrad)):
            self._execute(instruction)
        elif isinstance(instruction, _MESSAGES_IN_PROGRESS):
            self._channels.discard(instruction.message)

    def agree_on_passes(self) -> None:
        """Return if no rank has failed in the batch's passes; collective. Else raise on all, after the batch is
        forgotten."""
        failure, self.failure = self.failure, None
        try:
            self._agreement.reach(failure)
        except Exception as error:
            if is_ended_wait(error):
                raise
            self._watch.failure = None
            # The log has it. The next batch must not fail for it.
            self.take_deferred()
            self._forget()
            raise

    # -- the step

    def fail_step(self, error: Exception) -> None:
        """Keep an error of this rank's step."""
        self.step.error = self.step.error or error
        self._watch.failure = str(self._agreement.failure(error, "OptimizerStep"))

    def defer(self, error: Exception, where: str) -> None:
        """Remember an error of this rank in `where` that doesn't stop the batch; all ranks raise it at the end."""
        failure = self._agreement.failure(error, where)
        logger.error(str(failure))
        self._deferred = self._deferred or failure

    def take_deferred(self) -> Failure | None:
        """The first error that was deferred, which is forgotten."""
        deferred, self._deferred = self._deferred, None
        return deferred

    def agree_on_step(self, failure: Failure | None, number: int) -> None:
        """Raise on all ranks if step `number`, or what comes after it, has failed on one (step.py); collective."""
        deferred = self.take_deferred()
        failure = failure or deferred
        if self.step.error is not None:
            failure = self._agreement.failure(self.step.error, "OptimizerStep")
        with self._watch.failed(None if failure is None or failure.is_anothers else failure):
            reached = self._agreement.reached(failure, self.step.reached)
        if reached is None:
            return
        consequence = None
        if reached is Reached.BEFORE:
            self._forget()
        elif reached is Reached.WHOLE:
            consequence = f"the step is done on all ranks, as number {number}"
        else:
            consequence = self._difference = (
                "weights or states of the optimizer may differ between ranks now, so that no batch is trained and "
                "nothing saved before load_checkpoint")
        self._agreement.reach(failure, consequence=consequence)

    def check_ranks_agree(self) -> None:
        """Raise PipelineError, on all ranks, where an earlier step has failed on some of them alone."""
        if self._difference is not None:
            raise PipelineError(f"a step has failed on some ranks: {self._difference}")

    def loaded(self) -> None:
        """All ranks have the same state again."""
        self._difference = None
