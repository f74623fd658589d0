"""What a script keeps in a checkpoint, its client_state, apart from what the engine keeps in the same file.

DeepSpeed puts both into one dictionary (runtime/engine.py, _save_checkpoint). A member of client_state that has the
name of one of the engine's replaces it, and load_checkpoint returns most of the engine's with the script's, so a script
that saves what it has loaded would bring back an old state of the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_vshape.checkpoint.errors import CheckpointError
from ds_vshape.deepspeed_adapter.checkpoints import STATE_KEYS

# How many micro-batches have run forward; the seeds of layers (`seed_layers`), and so the numbers of dropout, follow
# from it.
_FORWARDS = "ds_vshape_forwards"
# The script's members whose names are the engine's.
_NAMESAKES = "ds_vshape_client_state"
_OF_ENGINE = STATE_KEYS | {_FORWARDS, _NAMESAKES}


def check_client_state(client_state: Any) -> None:
    """Raise CheckpointError for what isn't a dictionary."""
    if not isinstance(client_state, Mapping):
        raise CheckpointError(f"client_state = {client_state!r}: must be a dictionary, or None")


def to_save(client_state: Mapping[Any, Any], forwards: int) -> dict[Any, Any]:
    """What goes into the file beside DeepSpeed's own, none of which it replaces."""
    saved = {key: value for key, value in client_state.items() if key not in _OF_ENGINE}
    namesakes = {key: value for key, value in client_state.items() if key in _OF_ENGINE}
    return {**saved, **({_NAMESAKES: namesakes} if namesakes else {}), _FORWARDS: forwards}


def from_loaded(loaded: Mapping[Any, Any]) -> tuple[dict[Any, Any], int | None]:
    """The script's client_state in what DeepSpeed's load_checkpoint returns, and how many micro-batches had run; None
    for a checkpoint of DeepSpeed's own engine."""
    of_script = {key: value for key, value in loaded.items() if key not in _OF_ENGINE}
    return {**of_script, **loaded.get(_NAMESAKES, {})}, loaded.get(_FORWARDS)
