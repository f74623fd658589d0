"""How long messages between pipeline ranks take."""

from __future__ import annotations

import statistics
import time

import torch
from deepspeed.accelerator import get_accelerator

from ds_vshape.comm.channels import Channels
from ds_vshape.schedule.communicators import Communicator
from ds_vshape.schedule.lowering import message_into
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement

ROUNDS = 5


def hop_seconds(channels: Channels, placement: Placement) -> list[float]:
    """Seconds of a hop from each stage to the next [boundary] that leaves this rank, half a round trip of as many bytes
    as its activations have; 0 for all other boundaries.

    Collective over the pipeline, between batches, once signatures are known.
    """
    ends = {end.communicator: end for end in channels.ends()}
    hops = [0.0] * (placement.stages - 1)
    for boundary in range(placement.stages - 1):
        message = message_into(Pass(Kind.F, boundary + 1, 0), placement)
        if message is None:
            continue
        source, target = message.channel.source, message.channel.target
        there, back = ends.get(Communicator(source, target)), ends.get(Communicator(target, source))
        if there is None or back is None:
            continue
        sample = torch.zeros(channels.nbytes(message), dtype=torch.uint8, device=there.device)
        trips = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            there.transfer(sample)
            back.transfer(sample)
            get_accelerator().synchronize()
            trips.append(time.perf_counter() - start)
        # The receiver's first trip includes its wait for the sender.
        if there.sends:
            hops[boundary] = statistics.median(trips) / 2
    return hops
