"""Numbers and results of a module that change with each pass, set as any object's are.

nn.Module.__setattr__ first looks whether a parameter, a module or a buffer is meant. For what is none of these that
takes several microseconds, a hundred times a batch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_PLAIN = (bool, int, type(None), Tensor)


class FastSetattr:
    """To be inherited before nn.Module."""

    def __setattr__(self, name: str, value: Any) -> None:
        # What nn.Module has registered isn't in there, and an nn.Buffer is a Tensor that it is to register.
        if type(value) in _PLAIN and name in self.__dict__ and not hasattr(value, "_is_buffer"):
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)
