"""The state of autocast. A backward under it computes products in low precision, and W must do so exactly if B did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch

_DEVICES = ("cpu", "cuda")


def is_autocast_enabled() -> bool:
    """Whether autocast is on for any device."""
    return torch._C._is_any_autocast_enabled()


def enabled_autocast() -> Mapping[str, torch.dtype]:
    """The devices for which autocast is on, and its dtype there."""
    if not is_autocast_enabled():
        return {}
    return {device: torch.get_autocast_dtype(device) for device in _DEVICES if torch.is_autocast_enabled(device)}


@contextmanager
def autocast_of(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Autocast for a device that needn't be there, which torch.autocast refuses."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


@contextmanager
def autocast_as(devices: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Enable autocast for just these devices, with these dtypes and without its cache."""
    with ExitStack() as stack:
        for device in enabled_autocast().keys() - devices.keys():
            stack.enter_context(torch.autocast(device, enabled=False))
        for device, dtype in devices.items():
            stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
        yield
