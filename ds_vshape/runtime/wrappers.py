"""What is put around an engine's instructions: timers, checks, traces, counters; in one list for each engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ds_vshape.runtime.instructions import Execute, Instruction

# From an instruction map to one whose functions do more.
Wrapper = Callable[[Mapping[Instruction, Execute]], dict[Instruction, Execute]]


class InstructionWrappers:
    """The wrappers of `engine`; the first is innermost. Without any, the engine has its class's own map."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def add(self, wrapper: Wrapper) -> None:
        """Put `wrapper` around all instructions from now on."""
        self._engine._INSTRUCTION_MAP = wrapper(self._engine._INSTRUCTION_MAP)

    @contextmanager
    def during(self, wrapper: Wrapper) -> Iterator[None]:
        """Put `wrapper` around all instructions inside."""
        with self._in_place_of(wrapper(self._engine._INSTRUCTION_MAP)):
            yield

    @contextmanager
    def none(self) -> Iterator[None]:
        """Run instructions as they are inside."""
        with self._in_place_of(type(self._engine)._INSTRUCTION_MAP):
            yield

    @contextmanager
    def _in_place_of(self, instructions: dict[Instruction, Execute]) -> Iterator[None]:
        before = self._engine._INSTRUCTION_MAP
        self._engine._INSTRUCTION_MAP = instructions
        try:
            yield
        finally:
            self._engine._INSTRUCTION_MAP = before
