"""DeepSpeed's `wall_clock_breakdown`: its named timers, around the instructions that they are about.

DeepSpeed starts some of its timers in hooks of a forward and a backward and takes for granted that each backward ends
before the next begins; its own PipelineEngine starts those a second time and fails. Here each timer runs around whole
instructions. What is logged, and when, is DeepSpeed's: `bwd` is recomputation, B and W, `bwd_inner` B alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from ds_vshape.deepspeed_adapter.timers import (BACKWARD_GLOBAL_TIMER, BACKWARD_INNER_GLOBAL_TIMER,
                                                BACKWARD_INNER_MICRO_TIMER, BACKWARD_MICRO_TIMER,
                                                BACKWARD_REDUCE_GLOBAL_TIMER, BACKWARD_REDUCE_MICRO_TIMER,
                                                BATCH_INPUT_TIMER, FORWARD_GLOBAL_TIMER, FORWARD_MICRO_TIMER,
                                                PIPE_RECV_GRAD_TIMER, PIPE_RECV_INPUT_TIMER, PIPE_SEND_GRAD_TIMER,
                                                PIPE_SEND_OUTPUT_TIMER)
from ds_vshape.runtime import instructions as instr
from ds_vshape.runtime.instructions import Execute, Instruction

_FORWARD = (FORWARD_MICRO_TIMER, FORWARD_GLOBAL_TIMER)
_BACKWARD = (BACKWARD_MICRO_TIMER, BACKWARD_GLOBAL_TIMER)
_INNER = (BACKWARD_INNER_MICRO_TIMER, BACKWARD_INNER_GLOBAL_TIMER)
_REDUCE = (BACKWARD_REDUCE_MICRO_TIMER, BACKWARD_REDUCE_GLOBAL_TIMER)

# The optimizer step is timed in DeepSpeed's own instruction.
_TIMERS: Mapping[Instruction, tuple[str, ...]] = {
    instr.LoadMicroBatch: (BATCH_INPUT_TIMER,),
    instr.ForwardPass: _FORWARD,
    instr.SplitForwardPass: _FORWARD,
    instr.BackwardPass: _BACKWARD + _INNER,
    instr.InputGradPass: _BACKWARD + _INNER,
    instr.WeightGradPass: _BACKWARD,
    instr.RecomputePass: _BACKWARD,
    instr.SplitRecomputePass: _BACKWARD,
    instr.SendActivation: (PIPE_SEND_OUTPUT_TIMER,),
    instr.ReleaseActivation: (PIPE_SEND_OUTPUT_TIMER,),
    instr.SendGrad: (PIPE_SEND_GRAD_TIMER,),
    instr.ReleaseGrad: (PIPE_SEND_GRAD_TIMER,),
    instr.RecvActivation: (PIPE_RECV_INPUT_TIMER,),
    instr.WaitActivation: (PIPE_RECV_INPUT_TIMER,),
    instr.RecvGrad: (PIPE_RECV_GRAD_TIMER,),
    instr.WaitGrad: (PIPE_RECV_GRAD_TIMER,),
    instr.StartReduceGrads: _REDUCE,
    instr.ReduceTiedGrads: _REDUCE,
    instr.ReduceGrads: _REDUCE,
}


def timed(instructions: Mapping[Instruction, Execute], timers: Any) -> dict[Instruction, Execute]:
    """An instruction map (of functions that take the engine first) whose functions run DeepSpeed's `timers`."""
    return {kind: _timed(execute, [timers(name) for name in _TIMERS.get(kind, ())])
            for kind, execute in instructions.items()}


def _timed(execute: Execute, timers: list[Any]) -> Execute:
    @wraps(execute)
    def run(engine: object, **arguments: Any) -> None:
        for timer in timers:
            timer.start()
        try:
            execute(engine, **arguments)
        finally:
            for timer in timers:
                timer.stop()

    return run
