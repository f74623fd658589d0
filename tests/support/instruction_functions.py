"""A test's own function around one kind of an engine's instructions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ds_vshape.deepspeed_adapter.engine import instructions_of, set_instructions


def around_instruction(engine: Any, kind: Any, around: Callable[[Callable[[], None]], None]) -> None:
    """Let `engine`, ours or DeepSpeed's, call `around` with the function that executes an instruction of `kind`."""
    functions = instructions_of(engine)
    execute = functions[kind]
    set_instructions(engine, {**functions, kind: lambda of, **arguments: around(partial(execute, of, **arguments))})
