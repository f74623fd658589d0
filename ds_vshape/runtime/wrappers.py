"""What is put around an engine's instructions: timers, checks, traces, counters; in one list for each engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from ds_vshape.deepspeed_adapter.engine import StockEngine, instructions_of, set_instructions
from ds_vshape.runtime.instructions import Execute, Instruction

# From an instruction map to one whose functions do more.
Wrapper = Callable[[Mapping[Instruction, Execute]], dict[Instruction, Execute]]


class InstructionWrappers:
    """The wrappers of `engine`; the first is innermost. Without any, the engine has its class's own map."""

    def __init__(self, engine: StockEngine) -> None:
        self._engine = engine

    def add(self, wrapper: Wrapper) -> None:
        """Put `wrapper` around all instructions from now on."""
        set_instructions(self._engine, wrapper(instructions_of(self._engine)))

    @contextmanager
    def during(self, wrapper: Wrapper) -> Iterator[None]:
        """Put `wrapper` around all instructions inside."""
        with self._in_place_of(wrapper(instructions_of(self._engine))):
            yield

    @contextmanager
    def none(self) -> Iterator[None]:
        """Run instructions as they are inside."""
        with self._in_place_of(instructions_of(type(self._engine))):
            yield

    @contextmanager
    def _in_place_of(self, instructions: dict[Instruction, Execute]) -> Iterator[None]:
        before = instructions_of(self._engine)
        set_instructions(self._engine, instructions)
        try:
            yield
        finally:
            set_instructions(self._engine, before)
