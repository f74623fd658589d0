"""Which channels share a communicator: all from one rank to another, in one direction.

On a communicator NCCL runs a rank's operations one after another, in the order of their start. So channels can share
one if both of their ends start the same messages in the same order, and none of these waits for a later one.

    one direction     they can, whatever the schedule: sends start in the order in which a rank makes messages, and the
                      receiver posts in that order (lowering.py). What stands before a message was sent before it.
    both directions   they can't: each rank posts a receive before it sends, and would wait for the other's send.

What is shown of programs before they run (proofs/) is shown with these communicators.
"""

from __future__ import annotations

from typing import NamedTuple

from ds_vshape.schedule.lowering import Channel, channels
from ds_vshape.schedule.placement import Placement

# The most blocks (CTAs, each on one streaming multiprocessor) that a communicator of messages gets from NCCL.
MAX_CTAS = 4
# An estimate of what each takes on a GPU, not measured here: tens of MB. NCCL's maintainers say that it grows with the
# number of NCCL's channels, one for each CTA (github.com/NVIDIA/nccl/issues/864), and its manual that a buffer between
# two GPUs has 4 MiB (NCCL_BUFFSIZE). Each channel is taken to have one, and as much again for other protocols.
COMMUNICATOR_BYTES = MAX_CTAS * 2 * 4 * 1024**2


class Communicator(NamedTuple):
    """That of all messages from the pipeline rank `source` to `target`."""

    source: int
    target: int


def communicator_of(channel: Channel) -> Communicator:
    """The one that `channel` uses."""
    return Communicator(channel.source, channel.target)


def communicators(placement: Placement) -> list[Communicator]:
    """All of a pipeline, in an order that is the same on all ranks."""
    return sorted(set(map(communicator_of, channels(placement))))


def communicators_of_ranks(placement: Placement) -> list[int]:
    """How many of them each pipeline rank belongs to."""
    every = communicators(placement)
    return [sum(rank in communicator for communicator in every) for rank in range(placement.ranks)]


def communicator_bytes(placement: Placement) -> list[int]:
    """What they take on each pipeline rank's GPU."""
    return [COMMUNICATOR_BYTES * count for count in communicators_of_ranks(placement)]
