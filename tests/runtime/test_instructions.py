"""Programs as instructions of the engine: each step becomes one, on the buffer of its stage and micro-batch."""

from __future__ import annotations

import pytest
from deepspeed.runtime.pipe import schedule as stock
from given_back import gives_back

from ds_vshape.engine.engine import PipelineEngine
from ds_vshape.runtime import instructions as instr
from ds_vshape.runtime.instructions import BufferId, Keeps, evaluation_instructions, training_instructions
from ds_vshape.schedule.builders.forward_only import forward_only
from ds_vshape.schedule.lowering import (AwaitOffload, AwaitReceive, AwaitReload, AwaitSend, Channel, Content, Load,
                                         Message, Offload, PostReceive, Program, Reload, Run, Send, Step, lower)
from ds_vshape.schedule.named import SCHEDULES, build, placement_of
from ds_vshape.schedule.passes import BW, B, C, F, Kind, O, R, W
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.timeline import Times

ACTIVATION = Message(Channel(0, 1, Content.ACTIVATION), 4, 7)
GRADIENT = Message(Channel(1, 0, Content.GRADIENT), 3, 6)


@pytest.mark.parametrize("step, kind, buffer", [
    (Load(7), stock.LoadMicroBatch, (0, 7)),
    (Run(F(4, 7)), stock.ForwardPass, (4, 7)),
    (Run(BW(4, 7)), stock.BackwardPass, (4, 7)),
    (Run(B(4, 7)), instr.InputGradPass, (4, 7)),
    (Run(W(4, 7)), instr.WeightGradPass, (4, 7)),
    (PostReceive(ACTIVATION), stock.RecvActivation, (4, 7)),
    (PostReceive(GRADIENT), stock.RecvGrad, (3, 6)),
    (AwaitReceive(ACTIVATION), instr.WaitActivation, (4, 7)),
    (AwaitReceive(GRADIENT), instr.WaitGrad, (3, 6)),
    (Send(ACTIVATION), stock.SendActivation, (4, 7)),
    (Send(GRADIENT), stock.SendGrad, (3, 6)),
    (AwaitSend(ACTIVATION), instr.ReleaseActivation, (4, 7)),
    (AwaitSend(GRADIENT), instr.ReleaseGrad, (3, 6)),
    (Run(C(4, 7)), instr.RecomputePass, (4, 7)),
    (Offload(O(4, 7)), instr.Offload, (4, 7)),
    (AwaitOffload(O(4, 7)), instr.WaitOffload, (4, 7)),
    (Reload(R(4, 7)), instr.Reload, (4, 7)),
    (AwaitReload(R(4, 7)), instr.WaitReload, (4, 7)),
])
def test_each_step_is_one_instruction(step: Step, kind: type[stock.PipeInstruction], buffer: tuple[int, int]) -> None:
    instruction, end = evaluation_instructions((step,))
    assert type(end) is instr.AgreeOnBatch
    assert type(instruction) is kind
    assert instruction.buffer_id == buffer and isinstance(instruction.buffer_id, BufferId)
    assert (instruction.buffer_id.stage, instruction.buffer_id.micro_batch) == buffer


def programs() -> list[Program]:
    found = []
    for name in SCHEDULES:
        schedule = build(name, 3, 4)
        times = Times.uniform(schedule.placement.stages)
        found += [*lower(schedule, times), *lower(forward_only(placement_of(name, 3), 4), times)]
    return found


STARTED = (instr.ReturnLoss, instr.StartReduceGrads)


def test_training_reduces_and_steps_once_behind_all_passes() -> None:
    for program in programs():
        steps, batch = evaluation_instructions(program), training_instructions(program)
        # Without the loss, which all ranks get in training only.
        assert len(steps) == len(program) and type(steps[-1]) is instr.AgreeOnBatch
        unchanged = [i for i in batch[:-3] if type(i) not in STARTED]
        assert [(type(i), i.kwargs) for i in unchanged] == [(type(i), i.kwargs) for i in steps]
        assert [type(i) for i in batch[-3:]] == [stock.ReduceTiedGrads, stock.ReduceGrads, stock.OptimizerStep]


def test_what_needs_some_of_the_passes_starts_behind_the_last_of_them() -> None:
    for program in programs():
        batch = training_instructions(program)
        passes = [instr.pass_of(instruction) for instruction in batch]
        returned, = (place for place, instruction in enumerate(batch) if type(instruction) is instr.ReturnLoss)
        assert not any(action and action.kind is Kind.F for action in passes[returned:])
        reduced = {i.stage: place for place, i in enumerate(batch) if type(i) is instr.StartReduceGrads}
        assert set(reduced) == {action.stage for action in passes if action and action.kind in (Kind.W, Kind.BW)}
        for stage, place in reduced.items():
            last = max(at for at, action in enumerate(passes) if action and action.stage == stage
                       and action.kind in (Kind.W, Kind.BW))
            # The gradient that another rank waits for goes first.
            assert {type(i) for i in batch[last + 1:place]} <= {stock.SendGrad}
            assert type(batch[place + 1]) is not stock.SendGrad


def test_the_engine_knows_every_instruction_and_takes_its_arguments() -> None:
    given_back = [gives_back(build(name, 3, 8)) for name in ("v-half", "1f1b")]
    every = [*programs(), *(program for schedule in given_back
                            for program in lower(schedule, Times.uniform(schedule.placement.stages)))]
    kinds = {type(instruction) for program in every for instruction in instr.comparing(training_instructions(program))}
    assert kinds == set(PipelineEngine._INSTRUCTION_MAP)


def test_a_forward_keeps_what_its_backward_will_not_get_otherwise() -> None:
    program = [Run(F(0, 0)), Offload(O(0, 0)), Run(F(0, 1)), Run(F(0, 2)), AwaitOffload(O(0, 0)), Run(C(0, 1, 2)),
               Run(BW(0, 1)), Reload(R(0, 0)), AwaitReload(R(0, 0)), Run(C(0, 0)), Run(B(0, 0)), Run(W(0, 0)),
               Run(BW(0, 2))]
    found = evaluation_instructions(program)
    forwards = [found[place] for place in (0, 2, 3)]
    assert [forward.kwargs.get("keeps", instr.EVERYTHING) for forward in forwards] == [
        Keeps(0, True), Keeps(2, False), Keeps(None, False)]
    assert type(found[5]) is instr.RecomputePass and type(found[9]) is instr.SplitRecomputePass
    actions = [step.action for step in program if isinstance(step, (Run, AwaitOffload, Reload))]
    assert [action for action in map(instr.pass_of, found) if action is not None] == actions


def test_each_message_is_received_and_sent_in_the_buffer_that_uses_it() -> None:
    schedule = build("v-half", 2, 3)
    ranks = [training_instructions(program) for program in lower(schedule, Times.uniform(schedule.placement.stages))]
    for send, offer, wait, release, users in (
            (stock.SendActivation, stock.RecvActivation, instr.WaitActivation, instr.ReleaseActivation,
             (stock.ForwardPass, instr.SplitForwardPass)),
            (stock.SendGrad, stock.RecvGrad, instr.WaitGrad, instr.ReleaseGrad,
             (stock.BackwardPass, instr.InputGradPass))):
        for here, there in ((0, 1), (1, 0)):
            sent = buffers(ranks[here], send)
            assert sent and sent == buffers(ranks[there], offer)
            assert sorted(sent) == sorted(buffers(ranks[there], wait)) == sorted(buffers(ranks[here], release))
            assert set(sent) <= set(buffers(ranks[there], *users))
            assert {stage for stage, _ in sent} <= set(v(2).chunks[there])


def buffers(instructions: list[stock.PipeInstruction], *kinds: type[stock.PipeInstruction]) -> list[BufferId]:
    return [instruction.buffer_id for instruction in instructions if type(instruction) in kinds]


def test_instructions_read_as_deepspeeds() -> None:
    assert repr(instr.WeightGradPass(buffer_id=BufferId(3, 1))) == (
        "WeightGradPass(buffer_id=BufferId(stage=3, micro_batch=1), piece=0, pieces=1)")
    assert isinstance(instr.InputGradPass(BufferId(0, 0)), stock.BufferOpInstruction)


def test_a_forward_is_split_where_its_own_backward_is() -> None:
    program = [Run(action) for action in (F(0, 0), F(1, 0), F(0, 1), BW(1, 0), B(0, 0), W(0, 0), BW(0, 1))]
    forwards = [type(instruction) for instruction in evaluation_instructions(program)[:3]]
    assert forwards == [instr.SplitForwardPass, stock.ForwardPass, stock.ForwardPass]


def test_a_backward_that_is_whole_and_split_is_no_instruction() -> None:
    with pytest.raises(KeyError):
        evaluation_instructions((Run(B(0, 0)), Run(BW(0, 0))))
