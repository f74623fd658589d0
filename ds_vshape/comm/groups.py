"""Makes this package's process groups; those over gloo share one thread.

torch gives each gloo group a device of its own, whose thread wakes a hundred times a second, even if there is nothing
to do. A rank has a group for each neighbour and direction and a few more: with a dozen, these threads take 2% of
a core, and evict the caches of the passes. Apart from that, and from TORCH_GLOO_LAZY_INIT, which they ignore, groups
on one device behave as others do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import ProcessGroupGloo

from ds_vshape.schedule.communicators import MAX_CTAS

GLOO = "gloo"
_SHARED = "ds_vshape_gloo"
# The environment variable by which torch has gloo connect ranks late.
_LAZY = "TORCH_GLOO_LAZY_INIT"
# A time limit that is longer than any job.
FOREVER = timedelta(days=365)

# Those of this process's first group.
_devices: list[Any] = []


def new_group(ranks: Sequence[int] | None = None, backend: str | None = None, seconds: float | None = None,
              options: Any = None) -> Any:
    """A process group of the global `ranks` (None: all) over `backend` (None: the job's own), with the `options` of
    that backend, which no other group may have.

    What is done in it may take `seconds`; None: as long as it needs, since a watch ends it where a rank is lost
    (watch.py). Collective over the job, in the same order on every rank.
    """
    timeout = FOREVER if seconds is None else timedelta(seconds=seconds)
    if (backend or dist.get_backend()) == GLOO:
        backend = _SHARED
    if options is not None:
        options._timeout = timeout
    with unbound():
        return dist.new_group(ranks, timeout=timeout, backend=backend, pg_options=options)


def light_options() -> Any:
    """Options for a group over the job's own backend in which one rank sends to another: where that is NCCL, new ones
    with few CTAs and a stream of high priority; else None.

    A receive that waits for its message holds a streaming multiprocessor for each of its CTAs, which the passes need.
    """
    # By what NCCL's options have, which are RCCL's too.
    options = _options(dist.group.WORLD)
    if not hasattr(getattr(options, "config", None), "max_ctas"):
        return None
    light = type(options)()
    light.config.max_ctas = MAX_CTAS
    light.is_high_priority_stream = True
    return light


def messenger(group: Any) -> Any:
    """What sends and receives in `group` with the same arguments: gloo's backend itself, past torch's dispatcher, which
    takes longer than all that this package does for a message."""
    backend = _backend(group) if get_accelerator().is_synchronized_device() else None
    return backend if isinstance(backend, ProcessGroupGloo) else group


def allow_at_least(group: Any, seconds: float) -> None:
    """Let each operation of `group` take `seconds`, if its limit is a shorter one.

    NCCL counts from the moment at which the host starts an operation, whatever the device has to do before it.
    """
    options, least = _options(group), timedelta(seconds=seconds)
    if options is not None and options._timeout < least:
        _backend(group)._set_default_timeout(least)


def _backend(group: Any) -> Any:
    backend = group._get_backend(torch.device(get_accelerator().device_name()))
    # What torch puts around each backend with TORCH_DISTRIBUTED_DEBUG=DETAIL has no time limit to set.
    return getattr(backend, "wrapped_pg", backend)


def _options(group: Any) -> Any:
    """The options of `group`; None if its backend has none."""
    with suppress(RuntimeError):
        return _backend(group).options
    return None


@contextmanager
def unbound() -> Iterator[None]:
    """Make groups inside as if DeepSpeed hadn't bound the job's default group to a GPU (comm/torch.py).

    torch would look for that GPU in a group over gloo, and make each other group by a split of the default
    communicator, in which all ranks of the job meet and wait. Without it a communicator is made by its members alone,
    in their first operation; and none, with the memory that it takes, for the many groups in which there is none.
    """
    world: Any = dist.group.WORLD
    bound, world.bound_device_id = world.bound_device_id, None
    try:
        yield
    finally:
        world.bound_device_id = bound


def _on_shared_devices(store: Any, rank: int, size: int, timeout: timedelta) -> ProcessGroupGloo:
    """What torch makes for backend "gloo", on the devices that it chose for the first."""
    if not _devices:
        with _connected_at_once():
            group = ProcessGroupGloo(store, rank, size, timeout=timeout)
        _devices.extend(group.options._devices)  # type: ignore[attr-defined]
        return group
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices, options._threads, options._timeout = _devices, 2 * len(_devices), timeout
    return ProcessGroupGloo(store, rank, size, options)


@contextmanager
def _connected_at_once() -> Iterator[None]:
    """Let gloo connect the ranks of a group when it's made, even where the environment asks it to connect two ranks
    when they first use the group: a send then waits until the other rank uses it too, and two ranks that both send
    first wait forever."""
    asked = os.environ.pop(_LAZY, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[_LAZY] = asked


dist.Backend.register_backend(_SHARED, _on_shared_devices, devices=["cpu"])
