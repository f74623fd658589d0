"""What a script keeps in a checkpoint, its client_state, apart from what the engine keeps in the same file.

DeepSpeed puts both into one dictionary (runtime/engine.py, _save_checkpoint and _load_checkpoint). There a member of
client_state that has the name of one of the engine's replaces it, and what load_checkpoint returns has members of the
engine's in it, with which the next save_checkpoint raises KeyError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_vshape.checkpoint.errors import CheckpointError
from ds_vshape.config.section import shown
from ds_vshape.deepspeed_adapter.checkpoints import STATE_KEYS

# The key of how many micro-batches have run forward; the seeds of layers (`seed_layers`), and so the numbers of
# dropout, follow from it.
_FORWARDS = "ds_vshape_forwards"
# The key of the script's members whose names are the engine's.
_NAMESAKES = "ds_vshape_client_state"
_OF_ENGINE = STATE_KEYS | {_FORWARDS, _NAMESAKES}


def check_client_state(client_state: Any) -> None:
    """Raise CheckpointError for what isn't a dictionary."""
    if not hasattr(client_state, "keys"):
        raise CheckpointError(f"client_state = {shown(client_state)}: must be a dictionary, or None")


class ClientState:
    """The client_states of one engine."""

    def __init__(self) -> None:
        # What was returned of the engine's own state. A script that saves it again hasn't set it.
        self._returned: dict[str, Any] = {}

    def to_save(self, client_state: Mapping[Any, Any], forwards: int) -> dict[Any, Any]:
        """What goes into the file beside DeepSpeed's own, none of which it replaces."""
        given = {key: value for key, value in dict(client_state).items()
                 if key not in self._returned or self._returned[key] is not value}
        namesakes = {key: value for key, value in given.items() if key in _OF_ENGINE}
        saved = {key: value for key, value in given.items() if key not in _OF_ENGINE}
        return {**saved, **({_NAMESAKES: namesakes} if namesakes else {}), _FORWARDS: forwards}

    def from_loaded(self, loaded: Mapping[Any, Any], path: str) -> tuple[dict[Any, Any], int | None]:
        """The client_state to return, of what DeepSpeed's load_checkpoint has returned of the file `path`, and how many
        micro-batches had run: None in checkpoints of DeepSpeed's own engine, and of versions that didn't count them.

        Raises CheckpointError for contents that to_save doesn't give.
        """
        namesakes, forwards = loaded.get(_NAMESAKES, {}), loaded.get(_FORWARDS)
        if not isinstance(namesakes, dict) or not isinstance(forwards, (int, type(None))):
            raise CheckpointError(f"{path} can't be loaded: {_NAMESAKES} = {shown(namesakes)} must be a dictionary and "
                                  f"{_FORWARDS} = {shown(forwards)} a number")
        # The optimizer has taken its state, which is too large to be kept twice.
        left_out = (_FORWARDS, _NAMESAKES, "optimizer")
        client_state = {**{key: value for key, value in loaded.items() if key not in left_out}, **namesakes}
        self._returned = {key: client_state[key] for key in client_state.keys() & STATE_KEYS - namesakes.keys()}
        return client_state, forwards
