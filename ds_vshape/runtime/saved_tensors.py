"""What a forward leaves for its backward, which an offload moves to the host and back.

Autograd shows all that it saves, that of split operators included, to hooks. What else the stage keeps until its
backward is its inputs. Their memory is moved storage by storage: a tensor that is saved twice, views of one memory and
memory with gaps are then nothing special, and every tensor stays the same object. What anything else holds stays where
it is: weights, buffers and caches of modules, a neighbour stage's inputs, messages on their way, what the script keeps.
References are counted for that.

Autograd finds out itself whether a saved tensor was modified, but not through hooks; so the hooks look at versions.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Parameter

from ds_vshape.runtime.copy_engine import Copy, CopyEngine

_PLAIN = (Tensor, Parameter)


class SavedTensor:
    """What a graph has of a tensor that it saved."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # Detached: an output would keep its own graph alive.
        self.tensor: Tensor | None = tensor.detach()
        self.version = _version(tensor)

    def unpacked(self) -> Tensor:
        """The tensor; RuntimeError, as autograd's own, if it has been modified since."""
        assert self.tensor is not None
        if _version(self.tensor) != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"saved {str(self.tensor.dtype).removeprefix('torch.')} tensor of shape {list(self.tensor.shape)} is "
                f"at version {_version(self.tensor)}; expected version {self.version}")
        return self.tensor


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class SavedTensors:
    """What one forward saves, on devices of one type.

        saved = SavedTensors("cuda")
        with saved.hooks():
            outputs = ...                       F
        saved.offload(inputs, engine)           the copy to the host starts
        saved.free()                            it has ended; the memory is free
        saved.reload()                          memory is taken, the copy back starts
        saved.wait()                            it has ended
        torch.autograd.backward(...)            B
    """

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        # The graph has the tensors.
        self._saved: list[weakref.ref[SavedTensor]] = []
        self._copy: Copy | None = None
        self._is_away = False

    def hooks(self) -> saved_tensors_hooks:
        """Around the forward."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> SavedTensor:
        saved = SavedTensor(tensor)
        self._saved.append(weakref.ref(saved))
        return saved

    def _unpack(self, saved: SavedTensor) -> Tensor:
        if self._is_away:
            raise RuntimeError("a saved tensor was asked for while its memory is on the host")
        return saved.unpacked()

    @property
    def count(self) -> int:
        """How many tensors were saved so far."""
        return len(self._saved)

    def last_places(self) -> dict[int, int]:
        """By memory (`_cdata` of its storage) the place of the last tensor that was saved in it."""
        return {saved.tensor.untyped_storage()._cdata: place for place, reference in enumerate(self._saved)
                if (saved := reference()) is not None and saved.tensor is not None
                and saved.tensor.layout is torch.strided}

    def movable(self, inputs: Iterable[Tensor | None]) -> list[UntypedStorage]:
        """The memory of the `inputs` and of what was saved that nothing else holds."""
        found: dict[int, tuple[UntypedStorage, int]] = {}
        for tensor in self._tensors(inputs):
            if type(tensor) in _PLAIN and tensor.layout is torch.strided and tensor.device.type == self._device_type:
                storage = tensor.untyped_storage()
                _, tensors = found.get(storage._cdata, (storage, 0))
                found[storage._cdata] = storage, tensors + 1
        return [storage for storage, tensors in found.values()
                if storage.nbytes() and storage.resizable() and references(storage) <= tensors + 1]

    def _tensors(self, inputs: Iterable[Tensor | None]) -> Iterator[Tensor]:
        yield from (tensor for tensor in inputs if tensor is not None)
        for reference in self._saved:
            saved = reference()
            if saved is not None and saved.tensor is not None:
                yield saved.tensor

    def offload(self, inputs: Iterable[Tensor | None], engine: CopyEngine) -> Copy:
        """Start to copy `movable` memory to the host."""
        self._copy = engine.start(self.movable(inputs))
        return self._copy

    def free(self) -> None:
        """Wait for the end of that, and free the memory on the device."""
        assert self._copy is not None
        self._copy.free()
        self._is_away = True

    def reload(self) -> None:
        """Take memory again, and start to copy back."""
        assert self._copy is not None
        self._copy.start_back()

    def wait(self) -> None:
        """Wait for the end of that."""
        assert self._copy is not None
        self._copy.finish()
        self._copy, self._is_away = None, False

    def abandon(self) -> None:
        """No backward will come."""
        copy, self._copy = self._copy, None
        if copy is not None:
            copy.abandon()


def references(storage: UntypedStorage) -> int:
    """How many hold `storage`, the caller's variable among them."""
    return torch._C._storage_Use_Count(storage._cdata)
