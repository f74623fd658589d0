"""The options that let a plan recompute and offload, in chunks as all that the command plans."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

from ds_vshape.config.section import shown
from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.timeline import Times

# What F of a chunk leaves where it is recomputed, if nothing is said: its input.
_INPUT = 0.1
# The longest copy, in any unit.
MOST_TIME = 1e9


@dataclass(frozen=True)
class GivingBack:
    """Whether plans of adaptive may recompute and offload, and what that takes.

    `input_size` is what F of a recomputed chunk leaves, as a share of what it leaves otherwise; `copies` are the times
    of a chunk's copies to the host and back, None for as long as its F.
    """

    recompute: bool = False
    offload: bool = False
    input_size: float = _INPUT
    copies: tuple[float, float] | None = None

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace, recompute: bool, offload: bool) -> GivingBack:
        """From options, and from a config for the first two; ValueError for an option without the one that it belongs
        to."""
        recompute, offload = recompute or arguments.recompute, offload or arguments.offload
        if arguments.input_size is not None and not recompute:
            raise ValueError("--input-size needs --recompute")
        if arguments.copy_times is not None and not offload:
            raise ValueError("--copy-times needs --offload")
        size = _INPUT if arguments.input_size is None else arguments.input_size
        return cls(recompute, offload, size, arguments.copy_times)

    @property
    def any(self) -> bool:
        """Whether a plan may do either."""
        return self.recompute or self.offload

    def includes(self, other: GivingBack) -> bool:
        """Whether a plan that may do this may do all that `other` may."""
        return self.recompute >= other.recompute and self.offload >= other.offload

    def times(self, times: Times, placement: Placement) -> Times:
        """`times` of the stages on `placement` with those of the copies, if there are any."""
        if not self.offload:
            return times
        if self.copies is None:
            return replace(times, offload=times.forward, reload=times.forward)
        # With more stages on a rank each is a part of a chunk.
        out, back = (2 * placement.ranks / placement.stages * seconds for seconds in self.copies)
        return replace(times, offload=(out,) * placement.stages, reload=(back,) * placement.stages)

    def sizes(self, placement: Placement) -> Activations:
        """As the paper counts, with those of recomputed chunks, if there are any."""
        counted = Activations.counted(placement)
        if not self.recompute:
            return counted
        return replace(counted, recomputed=tuple((self.input_size * size,) for size in counted.after_forward))

    def __str__(self) -> str:
        done = [*(["recomputing"] if self.recompute else []), *(["offloading"] if self.offload else [])]
        return " and ".join(done) or "order alone"


def add_options(parser: argparse.ArgumentParser, number: Callable[[str], float]) -> None:
    """Add them to `parser`; `number` reads one, with an error for what isn't one."""
    def share(text: str) -> float:
        value = number(text)
        if not 0 <= value <= 1:
            raise argparse.ArgumentTypeError(f"{shown(text)} must be from 0 to 1")
        return value

    def copies(text: str) -> tuple[float, float]:
        values = [number(part) for part in text.split(",")]
        if len(values) not in (1, 2) or min(values) < 0 or max(values) > MOST_TIME:
            raise argparse.ArgumentTypeError(f"{shown(text)} must be one or two times from 0 to {MOST_TIME:g}: to the "
                                             "host, and back")
        return values[0], values[-1]

    parser.add_argument("--recompute", action="store_true",
                        help="adaptive may run forwards again before their backwards, to keep less meanwhile")
    parser.add_argument("--offload", action="store_true",
                        help="adaptive may move activations to the host and back, beside the passes")
    parser.add_argument("--input-size", type=share, metavar="X",
                        help="what stays of the activation of a chunk that is recomputed, as a share of it (default: "
                             f"{_INPUT:g})")
    parser.add_argument("--copy-times", type=copies, metavar="OUT[,BACK]",
                        help="times of copying a chunk's activation to the host and back (default: those of its "
                             "forward); a rank that shares the host's bandwidth with others has a share of it")
