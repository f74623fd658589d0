"""Before a job trains: all ranks have the same versions, config, layout and plan, and every channel answers.

Ranks that differ don't fail: they make other groups, wait for messages that no rank sends, and hang for half an hour.
So they tell each other what they have, each time before it would first matter:

    [1] PipelineModule   versions, config, the module's arguments     else ranks make other process groups
                         its layers are built, tied weights fit       else a rank is gone, or takes in other bytes
    [2] initialize       the config that it got                       else other batches
    [3] the engine       placement, pipelines, the schedule's orders  else other messages
    [4] the channels     one byte through each, with a time-out       else a batch that never ends

A rank that can't read its own config says so in place of its facts, so that the others don't wait for it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import suppress
from importlib import metadata
from itertools import groupby
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.module import PipelineError

import ds_vshape
from ds_vshape.comm.channels import End
from ds_vshape.comm.exchange import Exchange
from ds_vshape.comm.groups import FOREVER
from ds_vshape.config.section import KEY, ScheduleConfig
from ds_vshape.health.watch import Watch
from ds_vshape.schedule.schedule import Schedule

# What a healthy channel takes is far less; with NCCL its communicator is made here.
PROBE_SECONDS = 20.0
# Seconds between two looks whether a rank is lost meanwhile.
_LOOK_SECONDS = 0.2
# Where a rank writes to is its own affair.
_OWN_AFFAIRS = {"output_path", "output_file", "path", "nvme_path", "job_name"}
_NAME = f"{KEY}.name"
_ERROR = "error"
_TOLD = 4
_SHOWN = 80

T = TypeVar("T")
# What a rank has, by name; values are JSON.
Facts = Mapping[str, Any]


class PreflightError(PipelineError):  # type: ignore[misc]
    """Ranks that can't train together; the message is the same on all of them, and names ranks and hosts."""


class Preflight:
    """The checks of one job, over which `watch` watches. Creating it is collective, and so are its methods.

    Its `exchange` is for all that the ranks of the job tell each other between batches, in one order and by the thread
    that trains: gloo connects each rank of another group with each other rank anew.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.exchange = Exchange()

    def compare(self, read: Callable[[], Facts]) -> None:
        """Return if all ranks read the same facts.

        Raises PreflightError on every rank else, also where `read` raised on some of them. Where it raised the same
        error on all of them, that is what is raised. Jobs without a schedule of ours may differ.
        """
        failure: Exception | None = None
        try:
            text = json.dumps(read(), sort_keys=True, default=_data)
        except Exception as error:
            text, failure = json.dumps({_ERROR: f"{type(error).__name__}: {error}"}), error
        # Two numbers go around once, where the texts, or whole digests, of all ranks would go to all ranks.
        number = int(_digest(text)[:15], 16)
        most, negative_least = self.exchange.largest_of_each([number, -number])
        if most != -negative_least:
            every = [json.loads(other) for other in self.exchange.texts(text)]
            # Only a config has a schedule's name, and None where it asks for none.
            if any(_ERROR in facts or facts.get(_NAME, "") is not None for facts in every):
                raise PreflightError(self._difference(every)) from failure
        if failure is not None:
            raise failure

    def run(self, work: Callable[[], T]) -> T:
        """What `work` gives; an error of it is raised on all ranks, as by `compare`, once all have done theirs: a rank
        that ended earlier would be taken for lost. Collective. In `work` this rank must not wait for others."""
        results: list[T] = []

        def done() -> Facts:
            results.append(work())
            return {}

        self.compare(done)
        return results[0]

    def gather(self, facts: Facts) -> list[Facts]:
        """The facts of all ranks, in rank order."""
        return [json.loads(text) for text in self.exchange.texts(json.dumps(facts))]

    def probe(self, ends: Iterable[End], seconds: float = PROBE_SECONDS) -> None:
        """Return if a byte got through each communicator of messages within `seconds`, once all ranks are here.

        Args:
            ends: this rank's ends of them.

        Otherwise raises PreflightError on every rank, which names the pairs that can't reach each other.
        """
        self.exchange.largest(0)
        silent = sorted({tuple(sorted((end.source, end.target))) for end in self._unanswered(ends, seconds)})
        reports = self.exchange.texts(json.dumps(silent))
        pairs = sorted({tuple(pair) for report in reports for pair in json.loads(report)})
        if pairs:
            broken = [f"{self._named([one])} and {self._named([two])} can't reach each other" for one, two in pairs]
            raise PreflightError(f"no messages between pipeline ranks within {seconds:g} s: {'; '.join(broken)}. All "
                                 "of them are running: check for closed ports, and for the wrong network interface "
                                 "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)")

    def _unanswered(self, ends: Iterable[End], seconds: float) -> list[End]:
        """The ends of communicators through which no byte got within `seconds`."""
        # One order for all ranks, in which pairs that share no rank come first: NCCL makes communicators one by one.
        ordered = sorted(ends, key=lambda end: (min(end.communicator) % 2, end.communicator))
        pending = dict.fromkeys(ordered)
        # NCCL may block where a message is posted, so that is for a thread which can be left behind.
        prober = threading.Thread(target=_probe, args=(ordered, pending), daemon=True)
        prober.start()
        deadline = time.monotonic() + seconds
        while prober.is_alive() and (left := deadline - time.monotonic()) > 0:
            prober.join(min(left, _LOOK_SECONDS))
            self.watch.check()
            if self.watch.silent:
                # Whether that rank is lost is for the watch to decide.
                deadline = time.monotonic() + seconds
        return list(pending)

    def _difference(self, every: Sequence[Facts]) -> str:
        """What isn't the same on all ranks, in one line."""
        failed = {rank: facts[_ERROR] for rank, facts in enumerate(every) if _ERROR in facts}
        if failed:
            return f"not all ranks can go on: {self._grouped(failed)}"
        names = sorted({name for facts in every for name in facts})
        differing = [name for name in names if len({_shown(facts, name) for facts in every}) > 1]
        if any(facts.get(_NAME, "") is None for facts in every):
            # Without a schedule nothing else has to be alike.
            differing = [_NAME]
        differences = [f"{name} = {self._grouped({rank: _shown(facts, name) for rank, facts in enumerate(every)})}"
                for name in differing[:_TOLD]]
        more = f"; and {len(differing) - _TOLD} more" if len(differing) > _TOLD else ""
        return f"the ranks must have the same: {'; '.join(differences)}{more}"

    def _grouped(self, values: Mapping[int, str]) -> str:
        """Each value with the ranks that have it."""
        ranks: dict[str, list[int]] = {}
        for rank, value in values.items():
            ranks.setdefault(value, []).append(rank)
        return ", ".join(f"{value} on {self._named(having)}" for value, having in ranks.items())

    def _named(self, ranks: Sequence[int]) -> str:
        """The ranks with their hosts, runs of them in short."""
        runs = []
        for host, having in groupby(ranks, lambda rank: self.watch.names[rank].host):
            for _, run in groupby(enumerate(having), lambda numbered: numbered[1] - numbered[0]):
                first, *rest = [rank for _, rank in run]
                runs.append(f"{first}{f'-{rest[-1]}' if rest else ''} ({host})")
        return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(runs)}"


def versions() -> Facts:
    """The versions that must be the same on all hosts."""
    return {"Python": platform.python_version(), "ds_vshape": ds_vshape.__version__,
            **{package: metadata.version(package) for package in ("deepspeed", "torch")}}


def config_facts(ds_config: Mapping[str, Any], section: ScheduleConfig | None) -> Facts:
    """All that a ds_config says, by dotted key, with our section as it is understood."""
    flat = _flat({key: value for key, value in ds_config.items() if key != KEY})
    if section is None:
        return {**flat, _NAME: None}
    return {**flat, **_flat({KEY: section.model_dump(mode="json", exclude_defaults=True)})}


def module_facts(arguments: Mapping[str, Any]) -> Facts:
    """The arguments of a PipelineModule that are plain data, and the number of its layers."""
    facts = {f"PipelineModule's {name}": value for name, value in arguments.items()
             if isinstance(value, (bool, int, float, str, list, tuple, dict)) and name != "layers"}
    if isinstance(arguments["layers"], Sized):
        facts["number of layers"] = len(arguments["layers"])
    topology = arguments.get("topology")
    if topology is not None:
        facts["topology"] = dict(zip(topology.axes, topology.dims))
    return facts


def plan_facts(schedule: Schedule, pipelines: Sequence[Sequence[int]]) -> Facts:
    """The schedule's orders as a hash, where its stages are, and the global ranks of each pipeline."""
    shown = schedule.with_repeats(1).orders
    orders = json.dumps([schedule.repeats, [[repr(action) for action in order] for order in shown]])
    return {"schedule": schedule.name, "micro-batches": schedule.micro_batches, "orders": _digest(orders)[:12],
            "placement": schedule.placement.chunks, "pipelines": [list(ranks) for ranks in pipelines]}


def _probe(ends: Sequence[End], pending: dict[End, None]) -> None:
    accelerator = get_accelerator()
    if ends and accelerator.device_name() != "cpu":
        accelerator.set_device(ends[0].device.index)
    waiting = []
    for end in ends:
        byte = torch.zeros(1, dtype=torch.uint8, device=end.device)
        with suppress(RuntimeError):
            work = (dist.isend(byte, end.target, group=end.group) if end.sends else
                    dist.irecv(byte, end.source, group=end.group))
            # NCCL may block the next post for ever; this one may be answered all the same.
            waiting.append(threading.Thread(target=_await, args=(end, byte, work, pending), daemon=True))
            waiting[-1].start()
    for thread in waiting:
        thread.join()


def _await(end: End, byte: torch.Tensor, work: Any, pending: dict[End, None]) -> None:
    with suppress(RuntimeError):
        # With a time limit NCCL's wait blocks the host too, and for this channel alone: others may never be done.
        work.wait(FOREVER)
        del pending[end]


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif key not in _OWN_AFFAIRS:
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(facts: Facts, name: str) -> str:
    if name not in facts:
        return "nothing"
    text = json.dumps(facts[name], sort_keys=True)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... (hash {_digest(text)[:12]})"


def _data(value: Any) -> Any:
    """Replaces a value that JSON doesn't have: a NumPy number by Python's, any other by the name of its type."""
    return value.item() if hasattr(value, "item") else type(value).__name__


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
