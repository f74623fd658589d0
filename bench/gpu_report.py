"""What the results of gpu.py's steps show, each in one line; RuntimeError where they are wrong."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

# Of losses on several ranks from those on one, relative: 16-bit products may be rounded in another way.
_LARGEST_DIFFERENCE = 1e-2
_GIB = 2 ** 30


def of_machine(results: list[Any]) -> str:
    machine, = results
    names = [f"{device['name']} ({device['bytes'] / _GIB:.0f} GiB)" for device in machine["devices"]]
    devices = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "no GPU"
    cuda = f", CUDA {machine['cuda']}, NCCL {machine['nccl']}" if "cuda" in machine else ""
    return f"{devices}; torch {machine['torch']}{cuda}, DeepSpeed {machine['deepspeed']}, triton: {machine['triton']}"


def of_products(results: list[Any]) -> str:
    """Times over those of a product that is added afterwards."""
    rows, = results
    told = []
    for size in dict.fromkeys(row["size"] for row in rows):
        ms = {row["way"]: row["ms"] for row in rows if row["size"] == size}
        base = ms.pop("product, then sum")
        ways = ", ".join(f"{way} {took / base:.2f}" for way, took in ms.items() if " x " not in way)
        cut = {way: took for way, took in ms.items() if " x " in way}
        best = f", best tiling {min(cut, key=cut.__getitem__).rpartition(', ')[2]}" if cut else ""
        told.append(f"{size}: {base:.2f} ms{', ' if ways else ''}{ways}{best}")
    return "; ".join(told)


def of_split(results: list[Any]) -> str:
    """F + B + W over a forward and a whole backward."""
    rows, = results
    told = []
    for hidden in dict.fromkeys(row["hidden"] for row in rows):
        ways = [f"{row['contender']} {row['over_unsplit']:.3f}" for row in rows
                if row["hidden"] == hidden and row["contender"] != "unsplit"]
        told.append(f"hidden {hidden}: {', '.join(ways)}")
    return "; ".join(told)


def largest_difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """Relative."""
    return max(abs(one - other) / abs(other) for one, other in zip(losses, others, strict=True))


def of_training(on_one: Sequence[float] | None) -> Callable[[list[Any]], str]:
    """For a training whose losses on one rank, if it ran there, were `on_one`."""

    def found(results: list[Any]) -> str:
        losses = results[0]["losses"]
        if any(result["losses"] != losses for result in results) or not all(map(math.isfinite, losses)):
            raise RuntimeError(f"losses of the ranks: {[result['losses'] for result in results]}")
        told = [f"{1000 * median(results[0]['seconds']):.1f} ms a batch, {results[0]['over_simulated']:.3f} of the "
                f"simulated, {results[0]['tokens_per_second']:.0f} tokens/s",
                f"bubble {results[0]['measured_bubble']:.3f} ({results[0]['predicted_bubble']:.3f} predicted)"]
        if "peak_bytes" in results[0]:
            # Sizes that couldn't be measured are 0.
            ratios = ", ".join(f"{result['peak_bytes'] / result['predicted_bytes']:.2f}" if result["predicted_bytes"]
                               else "unknown" for result in results)
            told.append(f"peak over predicted {ratios}; at most {max(r['peak_total'] for r in results) / _GIB:.1f} GiB")
            waits = max((result["waits"] for result in results), key=lambda waits: sum(waits.values()))
            told.append(f"the host waits {sum(waits.values())} times a batch {list(waits)}")
        if on_one is not None:
            difference = largest_difference(losses, on_one)
            if difference > _LARGEST_DIFFERENCE:
                raise RuntimeError(f"losses {losses} instead of {list(on_one)} on one rank")
            told.append("losses as on one rank, " + (f"to {difference:.1e}" if difference else "bit for bit"))
        return "; ".join(told)

    return found


def of_repeat(results: list[Any]) -> str:
    return "a second run, and one from a checkpoint, are equal bit for bit"


def of_links(results: list[Any]) -> str:
    """The slowest link, which a pipeline waits for."""
    seconds: dict[str, float] = {}
    for result in results:
        for link, took in result["seconds"].items():
            seconds[link] = max(took, seconds.get(link, 0.0))
    small = {link: took for link, took in seconds.items() if link.endswith("small")}
    large = {link: took for link, took in seconds.items() if link.endswith("large")}
    size = results[0]["large_bytes"]
    return (f"a message takes {1e6 * min(small.values()):.0f} to {1e6 * max(small.values()):.0f} us, "
            f"{size / max(large.values()) / 1e9:.1f} to {size / min(large.values()) / 1e9:.1f} GB/s")


def of_killed(results: list[Any]) -> str:
    """`results` are the ranks' logs, their exit codes, and which hadn't ended in time."""
    logs, codes, late = results
    *others, victim = range(len(logs))
    if codes[victim] != -9 or victim in late:
        raise RuntimeError(f"rank {victim} wasn't killed: status {codes[victim]}, {logs[victim][-300:]!r}")
    if late:
        raise RuntimeError(f"ranks {late} still ran at the end")
    silent = [rank for rank in others if codes[rank] == 0 or f"rank {victim} is lost" not in logs[rank]]
    if silent:
        raise RuntimeError(f"ranks {silent} don't say that rank {victim} is lost: status "
                           f"{[codes[rank] for rank in silent]}, {logs[silent[0]][-300:]!r}")
    return f"rank {victim} was killed, and all others ended and said so"


def table(outcomes: Sequence[Mapping[str, Any]], width: int = 100) -> str:
    """A row for each step; what is long goes on in the next line."""
    first = max(len(outcome["name"]) for outcome in outcomes)
    lines = [f"{'step':{first}}  state      s  found"]
    for outcome in outcomes:
        told = outcome["found"] + (f" (If {outcome['hint']}.)" if outcome["hint"] else "")
        head, *rest = textwrap.wrap(told, width) or [""]
        lines.append(f"{outcome['name']:{first}}  {outcome['state']:7} {outcome['seconds']:4.0f}  {head}")
        lines += [" " * (first + 16) + line for line in rest]
    return "\n".join(lines)
