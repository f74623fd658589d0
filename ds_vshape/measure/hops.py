"""How long messages between pipeline ranks take."""

from __future__ import annotations

from ds_vshape.comm.channels import Channels
from ds_vshape.schedule.lowering import message_into
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement


def hop_seconds(channels: Channels, placement: Placement) -> list[float]:
    """Seconds of a hop from each stage to the next [boundary] that leaves this rank; 0 for all others.

    Collective over the pipeline, between batches, once signatures are known.
    """
    boundaries = [message_into(Pass(Kind.F, stage, 0), placement) for stage in range(1, placement.stages)]
    measured = iter(channels.measure_hops([message for message in boundaries if message is not None]))
    return [0.0 if message is None else next(measured) for message in boundaries]
