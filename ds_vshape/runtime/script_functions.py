"""Functions with which a script has replaced DeepSpeed's own.

PipelineEngine._INSTRUCTION_MAP (DeepSpeed's runtime/pipe/engine.py) maps each instruction to the function that executes
it. Scripts put functions of their own into the map of DeepSpeed's class, or of a subclass, before or after the engine
is constructed. The engine of this package treats them as follows:

    ReduceTiedGrads, ReduceGrads, OptimizerStep     run in place of its own functions
    all others                                      refused: they work on buffers of one stage on each rank, and on
                                                    passes that a split backward doesn't have

A function in the map of this package's engine class, or of one engine, gets the arguments of this package's
instructions, which its author must know; one for whole passes only is refused if the schedule runs split ones. Methods
that decide what a batch consists of are refused too, and so is, on a GPU, what makes checkpointed layers wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.module import PipelineError

from ds_vshape.deepspeed_adapter.checkpointing import checkpoints_synchronize
from ds_vshape.deepspeed_adapter.engine import (METHODS_OF_SCHEDULES, StockEngine, instructions_of, is_stock_code,
                                                own_instructions)
from ds_vshape.runtime import instructions as instr
from ds_vshape.runtime.instructions import Execute, Instruction

_AT_THE_END: tuple[Instruction, ...] = (instr.ReduceTiedGrads, instr.ReduceGrads, instr.OptimizerStep)
_SPLIT: Mapping[Instruction, Instruction] = {instr.ForwardPass: instr.SplitForwardPass,
                                             instr.BackwardPass: instr.InputGradPass}
_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"
_WAY_OUT = "train without \"pipeline_schedule\" in the config, or without that function"


class ScriptFunctions:
    """The functions with which a script has replaced those of `engine`.

    They may change between batches, so `look` runs before each. Raises PipelineError for methods that are refused.
    """

    def __init__(self, engine: StockEngine) -> None:
        self._engine = engine
        self._seen: list[tuple[type, dict[Instruction, Execute]]] = []
        self._functions: dict[Instruction, Execute] = {}
        # This engine may have wrapped these, for example with timers.
        self._at_start = _of_passes(instructions_of(type(engine)))
        self._check_methods()

    @property
    def names(self) -> list[str]:
        """The names of the instructions that functions of the script execute."""
        return sorted(instruction.__name__ for instruction in self._functions)

    def get(self, instruction: Instruction) -> Execute | None:
        """The script's function for an instruction at the end of a batch, if it has one."""
        return self._functions.get(instruction)

    @property
    def reduce(self) -> bool:
        """Whether gradients are reduced by a function of the script, at the end of the batch."""
        return instr.ReduceGrads in self._functions or _is_of_script(
            instructions_of(self._engine)[instr.ReduceGrads])

    def look(self, splits: bool) -> None:
        """Find the script's functions; to be called before each batch.

        Args:
            splits: whether batches have split passes.

        Raises PipelineError for what can't be honoured.
        """
        maps = [(owner, functions) for owner in type(self._engine).__mro__
                if (functions := own_instructions(owner)) is not None]
        if maps != self._seen:
            self._functions = self._found(maps)
            self._seen = [(owner, dict(functions)) for owner, functions in maps]
        self._check_methods()
        if checkpoints_synchronize() and not get_accelerator().is_synchronized_device():
            raise PipelineError("deepspeed.checkpointing.configure(synchronize=True): must be False on a GPU, where it "
                                "would wait within a pass for messages that other ranks have yet to send")
        own = instructions_of(self._engine)
        for whole, part in _SPLIT.items():
            if splits and _is_of_script(own[whole]) and not _is_of_script(own[part]):
                raise PipelineError(f"the script has its own function for {whole.__name__}, but this schedule "
                                    f"splits the backward and runs {part.__name__}: {_WAY_OUT}")

    def _found(self, maps: list[tuple[type, dict[Instruction, Execute]]]) -> dict[Instruction, Execute]:
        found: dict[Instruction, Execute] = {}
        # Functions in our own maps are run from there.
        for owner, functions in reversed([(owner, functions) for owner, functions in maps if not _is_ours(owner)]):
            of_script = {kind: function for kind, function in functions.items() if _is_of_script(function)}
            refused = sorted(kind.__name__ for kind in _of_passes(of_script))
            if refused:
                raise PipelineError(f"{owner.__name__}._INSTRUCTION_MAP has functions of the script's own for "
                                    f"{', '.join(refused)}, which no schedule of ds_vshape runs: {_WAY_OUT}")
            found |= of_script
        if own_instructions(self._engine) is not None and (
                _of_passes(instructions_of(type(self._engine))) != self._at_start):
            raise PipelineError(f"{type(self._engine).__name__}._INSTRUCTION_MAP has changed, but this engine already "
                                "has its own map: put the functions into that one")
        return found

    def _check_methods(self) -> None:
        for owner in (self._engine, *type(self._engine).__mro__):
            for name in METHODS_OF_SCHEDULES:
                if name in vars(owner) and _is_of_script(vars(owner)[name]):
                    raise PipelineError(f"the script has a {name} of its own, but the schedule decides what a "
                                        f"batch consists of: {_WAY_OUT}")


def _of_passes(functions: Mapping[Instruction, Execute]) -> dict[Instruction, Execute]:
    """Without those at the end of a batch."""
    return {kind: function for kind, function in functions.items() if kind not in _AT_THE_END}


def _is_ours(owner: type) -> bool:
    return owner.__module__.partition(".")[0] == __name__.partition(".")[0]


def _is_of_script(function: object) -> bool:
    """Whether it, or what it's wrapped around, is neither DeepSpeed's nor ours: its code is in another file."""
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None or not (is_stock_code(code.co_filename) or code.co_filename.startswith(_PACKAGE)):
            return True
        function = getattr(function, "__wrapped__", None)
    return False
