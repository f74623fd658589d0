"""DeepSpeed's accelerator for the simulated device: that of a CPU, but its work runs later."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from simulated_gpu import device
from simulated_gpu.communicator import BACKEND
from simulated_gpu.device import DEVICE, DEVICE_OF_RANK


class SimulatedGpu(CPU_Accelerator):  # type: ignore[misc]
    """As a GPU to DeepSpeed."""

    def __init__(self) -> None:
        super().__init__()
        self._communication_backend_name = BACKEND

    def is_synchronized_device(self) -> bool:
        return False

    def device_name(self, device_index: int | None = None) -> str:
        return str(DEVICE)

    def device(self, device_index: int | None = None) -> torch.device:
        return DEVICE

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return str(DEVICE)

    def device_count(self) -> int:
        return 1

    def synchronize(self, device_index: int | None = None) -> None:
        DEVICE_OF_RANK.note_synchronization("the device")
        DEVICE_OF_RANK.synchronize()

    @property
    def Stream(self) -> Any:  # noqa: N802
        return DEVICE_OF_RANK.new_stream

    @property
    def Event(self) -> Any:  # noqa: N802
        return device.Event

    def stream(self, stream: Any) -> AbstractContextManager[None]:
        return DEVICE_OF_RANK.on(stream)

    def current_stream(self, device_index: int | None = None) -> device.Stream:
        return DEVICE_OF_RANK.current

    def default_stream(self, device_index: int | None = None) -> device.Stream:
        return DEVICE_OF_RANK.default
