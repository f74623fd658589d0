"""The order in which the micro-batches of a batch are trained, where they are of different lengths.

The rank of the first stage has drawn all inputs of the batch, and knows their sizes; it decides. The rank of the last
stage needs the labels in the same order: where that is another rank, it is told. All others run the schedule as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ds_vshape.comm.channels import PeerLost
from ds_vshape.comm.exchange import Exchange, Numbers
from ds_vshape.schedule.builders.micro_batch_order import micro_batch_order
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Times


class Ordering:
    """Of one pipeline, on the rank of its first or its last stage.

    Args:
        decides: whether this rank has the first stage.
        exchange: of the two ranks, the first stage's before the other; None where one rank has both stages.
    """

    def __init__(self, decides: bool, exchange: Exchange | None) -> None:
        self._decides, self._exchange = decides, exchange
        self._told: Numbers | None = None

    def order(self, schedule: Schedule, times: Times, sizes: Sequence[int]) -> Sequence[int]:
        """Which micro-batch takes each place of a batch by `schedule`; collective over the two ranks.

        `sizes` are those of the inputs, to which times are taken to be in proportion; with fewer of them than
        micro-batches, since drawing has failed, the order is that of the data.
        """
        given = range(schedule.micro_batches)
        order: Sequence[int] = given
        if self._decides and len(sizes) == schedule.micro_batches:
            order = micro_batch_order(schedule, replace(times, scales=_scales(sizes)))
        if self._exchange is None:
            return order
        return self._tell(order) if self._decides else self._hear(given)

    def _tell(self, order: Sequence[int]) -> Sequence[int]:
        """Doesn't wait for the other rank, which may still be in the batch before."""
        assert self._exchange is not None
        if self._told is not None:
            self._result(self._told)
        self._told = self._exchange.start_numbers(order)
        return order

    def _hear(self, given: Sequence[int]) -> Sequence[int]:
        assert self._exchange is not None
        return [round(place) for place in self._result(self._exchange.start_numbers(given))[0]]

    def _result(self, told: Numbers) -> list[list[float]]:
        try:
            return told.result()
        except RuntimeError as error:
            raise PeerLost("the ranks of the first and the last stage didn't agree on the order of micro-batches: "
                           f"{str(error).partition(chr(10))[0]}") from error


def _scales(sizes: Sequence[int]) -> tuple[float, ...]:
    """The sizes as multiples of their mean."""
    mean = sum(sizes) / len(sizes) or 1.0
    return tuple(size / mean for size in sizes)


def ordering_for(placement: Placement, pipelines: Sequence[Sequence[int]], rank: int) -> Ordering | None:
    """The ordering of the global `rank`'s pipeline; None on ranks that load no data. Collective over the job, which has
    `pipelines` of these global ranks.
    """
    first, last = placement.rank_of(0), placement.rank_of(placement.last_stage)
    found = None
    for ranks in pipelines:
        ends = [ranks[first], ranks[last]]
        exchange = None if first == last else Exchange(ends)
        if rank in ends:
            found = Ordering(rank == ends[0], exchange)
    return found
