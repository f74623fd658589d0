"""Times of what runs on one device, contenders in turn, so that a slow moment of the machine is everybody's."""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

Phase = Callable[[], object]


class Stopwatch(Protocol):
    def __call__(self, phases: Sequence[Phase]) -> list[float]:
        """The seconds of each phase, run one after another."""


def by_core(phases: Sequence[Phase]) -> list[float]:
    """The seconds of this thread on its core: what others take from the core doesn't count. For one thread."""
    marks = [time.thread_time()]
    for phase in phases:
        phase()
        marks.append(time.thread_time())
    return [end - start for start, end in zip(marks, marks[1:])]


def by_stream(phases: Sequence[Phase]) -> list[float]:
    """The seconds of the GPU's current stream."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(phases) + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for phase, mark in zip(phases, marks[1:]):
        phase()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in zip(marks, marks[1:])]


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """--device, for `stopwatch`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def set_up(device: str) -> None:
    """Ends the program if `device` isn't there; on a CPU one thread is measured."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: there is no GPU here")
    torch.set_num_threads(1)


def stopwatch(device: str) -> Stopwatch:
    """How seconds are measured on `device`."""
    return by_stream if device == "cuda" else by_core


def in_turn(contenders: Mapping[str, Sequence[Phase]], rounds: int, watch: Stopwatch) -> dict[str, list[list[float]]]:
    """For each contender the seconds of its phases in each of `rounds` rounds, after one to warm up.

    Each round has an order of its own: what stands in the caches is of the one before.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in contenders}
    order = random.Random(0)
    for number in range(rounds + 1):
        for name in order.sample(list(contenders), len(contenders)):
            measured = watch(contenders[name])
            if number:
                seconds[name].append(measured)
    return seconds


def ratio(seconds: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> float:
    """The median over the rounds of a contender's whole time over that of another one in the same round."""
    return statistics.median(sum(mine) / sum(others) for mine, others in zip(seconds, base, strict=True))
