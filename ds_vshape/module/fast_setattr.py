"""Numbers and results of a module that change with each pass, set as any object's are.

nn.Module.__setattr__ first looks whether a parameter, a module or a buffer is meant. For what is none of these that
takes several microseconds, a hundred times a batch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_PLAIN = (bool, int, type(None))


class FastSetattr:
    """To be inherited before nn.Module."""

    def __setattr__(self, name: str, value: Any) -> None:
        kind, attributes = type(value), self.__dict__
        # What nn.Module has registered isn't in there, and an nn.Buffer is a Tensor that it is to register.
        if name in attributes and (kind in _PLAIN or kind is Tensor and not hasattr(value, "_is_buffer")):
            attributes[name] = value
        else:
            super().__setattr__(name, value)
