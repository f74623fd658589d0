"""Records what a rank does in one batch, around every instruction.

Its functions are in the engine's instruction map only during a traced batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from deepspeed.accelerator import get_accelerator

from ds_vshape.comm.channels import Channels
from ds_vshape.measure.profiling import clock
from ds_vshape.measure.trace.arrivals import Arrivals
from ds_vshape.measure.trace.batch import (LOAD, OFFLOAD, PASS, RELEASE, SEND, WAIT, WAIT_RELOAD, Event,
                                            RankTrace)
from ds_vshape.runtime import instructions as instr
from ds_vshape.runtime.instructions import Execute, Instruction
from ds_vshape.schedule.lowering import Message
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.timeline import Span

# What an instruction's event is; that of a message is about the pass that it goes into.
_MESSAGES: Mapping[Instruction, str] = {
    instr.WaitActivation: WAIT,
    instr.WaitGrad: WAIT,
    instr.SendActivation: SEND,
    instr.SendGrad: SEND,
    instr.ReleaseActivation: RELEASE,
    instr.ReleaseGrad: RELEASE,
}
_COPIES: Mapping[Instruction, tuple[str, Kind]] = {
    instr.Offload: (OFFLOAD, Kind.O),
    instr.WaitReload: (WAIT_RELOAD, Kind.R),
}
_POSTS = (instr.RecvActivation, instr.RecvGrad)
_ENDS: Mapping[Instruction, str] = {
    instr.ReturnLoss: "start to return the loss",
    instr.StartReduceGrads: "start to reduce gradients",
    instr.AgreeOnBatch: "agree on the batch",
    instr.ReduceTiedGrads: "reduce tied gradients",
    instr.ReduceGrads: "reduce gradients",
    instr.OptimizerStep: "optimizer step",
    instr.AwaitVerdict: "await the verdict on the step",
    instr.TellForwards: "start to tell of the forwards",
    instr.AgreeOnForwards: "agree on the forwards",
    instr.StepAhead: "step ahead",
}


class Recorder:
    """One batch on this rank.

    On a device that runs behind the host, times are the device's, on the host's clock; messages arrive there when
    their receiver's stream has them.
    """

    def __init__(self, channels: Channels) -> None:
        self._channels = channels
        synchronized = get_accelerator().is_synchronized_device()
        self._clock = clock()
        self._arrivals = Arrivals() if synchronized else None
        self._marks: list[tuple[Instruction, dict[str, Any], Any, Any]] = []

    def recorded(self, instructions: Mapping[Instruction, Execute]) -> dict[Instruction, Execute]:
        """An instruction map (of functions that take the engine first) whose functions are recorded."""
        found = {kind: self._recorded(kind, execute) for kind, execute in instructions.items() if kind not in _POSTS}
        return found | {kind: self._watched(kind, instructions[kind]) for kind in _POSTS}

    def _recorded(self, kind: Instruction, execute: Execute) -> Execute:
        @wraps(execute)
        def run(engine: object, **arguments: Any) -> None:
            start = self._clock.now()
            execute(engine, **arguments)
            self._marks.append((kind, arguments, start, self._clock.now()))

        return run

    def _watched(self, kind: Instruction, execute: Execute) -> Execute:
        @wraps(execute)
        def run(engine: object, buffer_id: instr.BufferId, message: Message) -> None:
            execute(engine, buffer_id=buffer_id, message=message)
            if self._arrivals is not None:
                self._arrivals.watch(message, self._channels.works_into(message))

        return run

    def close(self) -> None:
        """The batch has ended, whether it has succeeded or not."""
        if self._arrivals is not None:
            self._arrivals.close()

    def trace(self, copies: tuple[Span, ...]) -> RankTrace:
        """What happened, on this host's clock (time.perf_counter), after a batch that succeeded; with its `copies`."""
        times = iter(self._clock.on_host([mark for *_, start, end in self._marks for mark in (start, end)]))
        events = tuple(Event(*_of(kind, arguments), next(times), next(times)) for kind, arguments, _, _ in self._marks)
        seen = {} if self._arrivals is None else self._arrivals.seen()
        return RankTrace(events, {message.taker: time for message, time in seen.items()}, copies)


def _of(kind: Instruction, arguments: dict[str, Any]) -> tuple[str, Pass | None]:
    """What an instruction's event is, and the pass that it's about."""
    if kind in _ENDS:
        return _ENDS[kind], None
    if kind in _MESSAGES:
        message: Message = arguments["message"]
        return _MESSAGES[kind], message.taker
    if kind in _COPIES:
        what, of = _COPIES[kind]
        return what, Pass(of, *arguments["buffer_id"])
    if kind is instr.LoadMicroBatch:
        return LOAD, Pass(Kind.F, *arguments["buffer_id"])
    return PASS, instr.pass_of(kind(**arguments))
