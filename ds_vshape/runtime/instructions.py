"""The engine's instruction set: DeepSpeed's own (runtime/pipe/schedule.py), and what a split backward and
asynchronous messages need besides them.

DeepSpeed's instructions name a pipeline buffer by number. Here a buffer's id is its (stage, micro-batch), so an
instruction says what it works on and a rank may hold any number of stages.

    LoadMicroBatch                          inputs, labels = next(data)
    ForwardPass, SplitForwardPass           output = stage(input)
    BackwardPass                            both halves of the backward at once
    InputGradPass, WeightGradPass           one half each
    RecomputePass, SplitRecomputePass       a forward again, whose first time kept less than its backward needs
    Offload, WaitOffload                    start to move to the host what a forward left; wait until it has gone
    Reload, WaitReload                      start to bring it back; wait until it's there
    RecvActivation, RecvGrad                offer a buffer; don't wait
    WaitActivation, WaitGrad                wait until it is filled
    SendActivation, SendGrad                start to send; don't wait
    ReleaseActivation, ReleaseGrad          wait until it has left
    ReturnLoss                              start to tell all ranks the batch's loss; doesn't wait
    StartReduceGrads                        start to add up a stage's gradients over the replicas; doesn't wait
    AgreeOnBatch                            all ranks have done their passes, or all raise
    ReduceTiedGrads, ReduceGrads, OptimizerStep

Where steps are validated afterwards (ds_vshape/engine/post_validation.py):

    AwaitVerdict                            the step before this batch was right, or this batch is interrupted
    TellForwards, AgreeOnForwards           all ranks have done their forwards, or all raise
    StepAhead                               reduce and step, before other pipeline ranks have done their passes

In the batch in which gradients are verified (ds_vshape/engine/verification.py):

    CompareGradients                        those of a stage, before they are reduced
    AgreeOnGradients                        all ranks have found the same gradients with whole backwards, or all raise
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from deepspeed.runtime.pipe.schedule import (BackwardPass, BufferOpInstruction, ForwardPass, LoadMicroBatch,
                                             OptimizerStep, PipeInstruction, RecvActivation, RecvGrad, ReduceGrads,
                                             ReduceTiedGrads, SendActivation, SendGrad)

from ds_vshape.schedule import lowering
from ds_vshape.schedule.lowering import (AwaitReceive, AwaitSend, Content, CopyStep, Load, Message, MessageStep,
                                         PostReceive, Program, Run, Send, ShareLoss, Step)
from ds_vshape.schedule.passes import Kind, Pass

__all__ = [
    "EVERYTHING", "AgreeOnBatch", "AgreeOnForwards", "AgreeOnGradients", "AwaitVerdict",
    "BackwardPass", "BufferId", "BufferOpInstruction", "CompareGradients", "Execute", "ForwardPass", "InputGradPass",
    "Instruction", "Keeps", "LoadMicroBatch", "Offload", "OptimizerStep", "PipeInstruction", "RecomputePass",
    "RecvActivation", "RecvGrad", "ReduceGrads", "ReduceTiedGrads", "ReleaseActivation", "ReleaseGrad", "Reload",
    "ReturnLoss", "SendActivation", "SendGrad", "SplitForwardPass", "SplitRecomputePass", "StartReduceGrads",
    "StepAhead", "TellForwards", "WaitActivation", "WaitGrad", "WaitOffload", "WaitReload", "WeightGradPass",
    "comparing", "evaluation_instructions", "instruction_of", "name_of", "pass_of", "passes_alone", "stepping_ahead",
    "training_instructions"
]

# The two sides of an engine's instruction map; what executes one takes the engine first, then its arguments.
Instruction = type[PipeInstruction]
Execute = Callable[..., None]


class BufferId(NamedTuple):
    """A pipeline buffer: what one stage holds of one micro-batch."""

    stage: int
    micro_batch: int


class Keeps(NamedTuple):
    """What a forward pass leaves on the device for its backward: by default everything.

    Its first `recomputed` layers (0 for all of the stage) leave nothing and run again; what is left `goes_to_host`.
    """

    recomputed: int | None = None
    goes_to_host: bool = False


EVERYTHING = Keeps()


class SplitForwardPass(BufferOpInstruction):  # type: ignore[misc]
    """Compute a forward pass whose backward will come in two halves.

    Roughly:

    .. code-block:: python

        with SplitBackward(buffers['store'][buffer_id]):
            buffers['outputs'][buffer_id] = forward(buffers['inputs'][buffer_id])
    """


class InputGradPass(BufferOpInstruction):  # type: ignore[misc]
    """Compute the gradient of a stage's input, and keep what its weight gradients need.

    Roughly:

    .. code-block:: python

        outputs = buffers['outputs'][buffer_id]
        torch.autograd.backward(outputs, buffers['gradients'][buffer_id])
        gradients = buffers['inputs'][buffer_id].grad
    """


class WeightGradPass(BufferOpInstruction):  # type: ignore[misc]
    """Compute and accumulate the weight gradients that an :class:`InputGradPass` left, or a piece of them.

    Roughly:

    .. code-block:: python

        for x, grad_output, weight in piece_of(buffers['store'][buffer_id], piece, pieces):
            weight.grad += grad_output.T @ x
    """

    def __init__(self, buffer_id: BufferId, piece: int = 0, pieces: int = 1) -> None:
        super().__init__(buffer_id, piece=piece, pieces=pieces)


class RecomputePass(BufferOpInstruction):  # type: ignore[misc]
    """Run the first `layers` of a stage again (0 for all), with what their forward pass has kept."""

    def __init__(self, buffer_id: BufferId, layers: int = 0) -> None:
        super().__init__(buffer_id, layers=layers)


class SplitRecomputePass(RecomputePass):
    """As :class:`RecomputePass`, for a forward whose backward will come in two halves."""


class Offload(BufferOpInstruction):  # type: ignore[misc]
    """Start to copy to the host what a forward pass left for its backward."""


class WaitOffload(BufferOpInstruction):  # type: ignore[misc]
    """Wait until the copy of an :class:`Offload` is on the host, and free the memory on the device."""


class Reload(BufferOpInstruction):  # type: ignore[misc]
    """Take memory for what an :class:`Offload` moved, and start to copy it back."""


class WaitReload(BufferOpInstruction):  # type: ignore[misc]
    """Wait until the copy of a :class:`Reload` is there."""


class WaitActivation(BufferOpInstruction):  # type: ignore[misc]
    """Wait until the activations of a :class:`RecvActivation` are there."""


class WaitGrad(BufferOpInstruction):  # type: ignore[misc]
    """Wait until the gradients of a :class:`RecvGrad` are there."""


class ReleaseActivation(BufferOpInstruction):  # type: ignore[misc]
    """Wait until the activations of a :class:`SendActivation` have left, and give back their memory."""


class ReleaseGrad(BufferOpInstruction):  # type: ignore[misc]
    """Wait until the gradients of a :class:`SendGrad` have left, and give back their memory."""


class ReturnLoss(PipeInstruction):  # type: ignore[misc]
    """Start to bring the batch's loss to all ranks: where it is computed as soon as it's whole, elsewhere earlier."""


class StartReduceGrads(PipeInstruction):  # type: ignore[misc]
    """Start to add up the gradients of a stage over its replicas: its last weight gradient is there."""

    def __init__(self, stage: int) -> None:
        super().__init__(stage=stage)


class AgreeOnBatch(PipeInstruction):  # type: ignore[misc]
    """Wait until all ranks of the job have done their passes; raise on all of them if one has failed."""


class AwaitVerdict(PipeInstruction):  # type: ignore[misc]
    """Wait for what all ranks say of the step before this batch; if it must be done again, give this batch up."""


class TellForwards(PipeInstruction):  # type: ignore[misc]
    """Start to tell all ranks whether this rank's forwards were done; doesn't wait."""


class AgreeOnForwards(PipeInstruction):  # type: ignore[misc]
    """Wait until all ranks of the job have done their forwards; raise on all of them if one has failed."""


class StepAhead(PipeInstruction):  # type: ignore[misc]
    """Reduce gradients and step as if all ranks' gradients were good, and start to find out whether they are."""


class CompareGradients(PipeInstruction):  # type: ignore[misc]
    """Compare the gradients of a stage, which are whole and not reduced yet, with those of whole backwards."""

    def __init__(self, stage: int) -> None:
        super().__init__(stage=stage)


class AgreeOnGradients(PipeInstruction):  # type: ignore[misc]
    """Compare what isn't compared yet; raise on all ranks if one of them has found a difference."""


# By whether the micro-batch's backward on the stage comes as B and W.
_PASSES: dict[tuple[Kind, bool], type[BufferOpInstruction]] = {
    (Kind.F, False): ForwardPass,
    (Kind.F, True): SplitForwardPass,
    (Kind.BW, False): BackwardPass,
    (Kind.B, True): InputGradPass,
    (Kind.W, True): WeightGradPass,
    (Kind.C, False): RecomputePass,
    (Kind.C, True): SplitRecomputePass,
}
_COPIES: dict[type[CopyStep], type[BufferOpInstruction]] = {
    lowering.Offload: Offload,
    lowering.AwaitOffload: WaitOffload,
    lowering.Reload: Reload,
    lowering.AwaitReload: WaitReload,
}
_MESSAGES: dict[tuple[type[Step], Content], type[BufferOpInstruction]] = {
    (PostReceive, Content.ACTIVATION): RecvActivation,
    (PostReceive, Content.GRADIENT): RecvGrad,
    (AwaitReceive, Content.ACTIVATION): WaitActivation,
    (AwaitReceive, Content.GRADIENT): WaitGrad,
    (Send, Content.ACTIVATION): SendActivation,
    (Send, Content.GRADIENT): SendGrad,
    (AwaitSend, Content.ACTIVATION): ReleaseActivation,
    (AwaitSend, Content.GRADIENT): ReleaseGrad,
}

_KINDS = {instruction: kind for (kind, _), instruction in _PASSES.items()} | {WaitOffload: Kind.O, Reload: Kind.R}
# The arguments of instructions that are a pass's.
_OF_PASS = ("piece", "pieces", "layers")


def pass_of(instruction: PipeInstruction) -> Pass | None:
    """The pass that an instruction runs, if it runs one; of a copy, where the rank waits for its end (O) or starts it
    (R)."""
    kind = _KINDS.get(type(instruction))
    if kind is None:
        return None
    arguments = instruction.kwargs
    return Pass(kind, *arguments["buffer_id"], **{name: arguments[name] for name in _OF_PASS if name in arguments})


def name_of(instruction: PipeInstruction) -> str:
    """An instruction as errors name it."""
    name = type(instruction).__name__
    if not isinstance(instruction, BufferOpInstruction):
        return name
    stage, micro_batch = instruction.kwargs["buffer_id"]
    of_stage = "" if isinstance(instruction, LoadMicroBatch) else f" of stage {stage}"
    return f"{name}{of_stage}, micro-batch {micro_batch}"


END = (AgreeOnBatch, ReduceTiedGrads, ReduceGrads, OptimizerStep)


def training_instructions(program: Program) -> list[PipeInstruction]:
    """A rank's program as instructions, with the end of a batch: gradients are reduced, then the optimizer steps.

    What of that needs only some of the passes starts behind the last of these.
    """
    starts: dict[int, PipeInstruction] = {}
    for stage, place in _last_places(program, Kind.W, Kind.BW).items():
        starts[place] = StartReduceGrads(stage)
    instructions: list[PipeInstruction] = []
    for place, instruction in enumerate(_instructions(program)):
        instructions.append(instruction)
        if place in starts:
            instructions.append(starts[place])
    return [*instructions, *(instruction() for instruction in END)]


def _last_places(program: Program, *kinds: Kind) -> dict[int, int]:
    """For each stage, the place of its last pass of these kinds, or of the last message after it for other ranks."""
    places: dict[int, int] = {}
    running: int | None = None
    for place, step in enumerate(program):
        if isinstance(step, Run) and step.action.kind in kinds:
            places[step.action.stage] = place
            running = step.action.stage
        elif isinstance(step, Send) and running is not None:
            places[running] = place
        else:
            running = None
    return places


def stepping_ahead(instructions: Sequence[PipeInstruction]) -> list[PipeInstruction]:
    """Training instructions whose step waits for no other pipeline rank.

    The verdict on the previous step is awaited at the last moment at which the batch can be abandoned for free: before
    the first backward. By then all ranks of the pipeline have started the batch, so none waits.
    """
    passes, end = [*instructions[:-len(END)]], instructions[-len(END):]
    assert tuple(map(type, end)) == END
    kinds = [_KINDS.get(type(instruction)) for instruction in passes]
    first_backward = next(place for place, kind in enumerate(kinds) if kind in (Kind.B, Kind.BW))
    # After the last forward, and what other ranks wait for after it.
    loss = next(place for place, instruction in enumerate(passes) if isinstance(instruction, ReturnLoss))
    added: list[tuple[int, PipeInstruction]] = [(first_backward, AwaitVerdict()), (loss, TellForwards())]
    for place, instruction in sorted(added, key=lambda entry: entry[0], reverse=True):
        passes.insert(place, instruction)
    return [*passes, AgreeOnForwards(), StepAhead()]


def comparing(instructions: Sequence[PipeInstruction]) -> list[PipeInstruction]:
    """Training instructions that compare gradients too: of each stage before they may be reduced, and at the end."""
    found: list[PipeInstruction] = []
    for instruction in instructions:
        if isinstance(instruction, StartReduceGrads):
            found.append(CompareGradients(**instruction.kwargs))
        elif isinstance(instruction, (AgreeOnBatch, AgreeOnForwards)):
            found.append(AgreeOnGradients())
        found.append(instruction)
    return found


def passes_alone(program: Program) -> list[PipeInstruction]:
    """A rank's program as instructions, without the end of a batch: nothing is reduced or reported to other ranks."""
    return [instruction for instruction in _instructions(program) if not isinstance(instruction, ReturnLoss)]


def evaluation_instructions(program: Program) -> list[PipeInstruction]:
    """A rank's program as instructions, with the end of an evaluation: all ranks agree that it succeeded."""
    return [*passes_alone(program), AgreeOnBatch()]


def _instructions(program: Program) -> list[PipeInstruction]:
    """The instructions that execute the steps of a program, step by step."""
    passes = [step.action for step in program if isinstance(step, Run)]
    split = {_buffer_of(action) for action in passes if action.kind in (Kind.B, Kind.W)}
    recomputed = {_buffer_of(action): action.layers for action in passes if action.kind is Kind.C}
    moved = {_buffer_of(step.action) for step in program if isinstance(step, lowering.Offload)}

    def run(action: Pass) -> PipeInstruction:
        buffer_id = _buffer_of(action)
        arguments: dict[str, Any] = {}
        if action.kind is Kind.W:
            arguments = {"piece": action.piece, "pieces": action.pieces}
        elif action.kind is Kind.C:
            arguments = {"layers": action.layers}
        elif action.kind is Kind.F and (buffer_id in recomputed or buffer_id in moved):
            arguments = {"keeps": Keeps(recomputed.get(buffer_id), buffer_id in moved)}
        return _PASSES[action.kind, buffer_id in split](buffer_id=buffer_id, **arguments)

    return [run(step.action) if isinstance(step, Run) else instruction_of(step) for step in program]


def _buffer_of(action: Pass) -> BufferId:
    return BufferId(action.stage, action.micro_batch)


def instruction_of(step: MessageStep | CopyStep | Load | ShareLoss) -> PipeInstruction:
    """The instruction that executes a step other than a pass."""
    if isinstance(step, CopyStep):
        return _COPIES[type(step)](buffer_id=_buffer_of(step.action))
    if isinstance(step, ShareLoss):
        return ReturnLoss()
    if isinstance(step, Load):
        return LoadMicroBatch(buffer_id=BufferId(0, step.micro_batch))
    message: Message = step.message
    instruction = _MESSAGES[type(step), message.channel.content]
    return instruction(buffer_id=BufferId(message.stage, message.micro_batch), message=message)
