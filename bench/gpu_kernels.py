"""Steps of gpu.py on one device without an engine: what the machine is, products added to wider sums, and the cost of
the split."""

from __future__ import annotations

import importlib.util
import statistics
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from products import TRITON, WIDE, Add, ways
from split_cost import CONTENDERS, Case, measure
from stopwatch import in_turn, ratio, stopwatch
from torch import Tensor

# Of a sum of 32 bits, in relation to its norm; a product that is rounded to 16 bits on its way has 2e-3.
_LARGEST_ERROR = 1e-4


def machine(device: str) -> dict[str, Any]:
    """Versions, and the devices that torch finds."""
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"torch finds no GPU: {_why_none()}")
    found: dict[str, Any] = {"torch": torch.__version__, "deepspeed": deepspeed.__version__,
                             "triton": importlib.util.find_spec("triton") is not None, "devices": []}
    if device == "cuda":
        found["cuda"], found["nccl"] = torch.version.cuda, "none"
        if dist.is_nccl_available():
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            found["devices"].append({"name": properties.name, "bytes": properties.total_memory,
                                     "capability": f"{properties.major}.{properties.minor}",
                                     "multiprocessors": properties.multi_processor_count})
    return found


def _why_none() -> str:
    """What torch says when it's asked to use a GPU all the same."""
    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).splitlines()[0]
    return "the driver shows none"


def products(device: str, sizes: list[list[int]], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """For each of `sizes` (outputs, inputs) the ways to add a bf16 product to a fp32 sum: milliseconds, teraflops, the
    error, and whether repeated runs have the same bits."""
    rows = []
    for outputs, inputs in sizes:
        torch.manual_seed(0)
        gradient, x = (torch.randn(tokens, width, device=device).bfloat16() for width in (outputs, inputs))
        exact = gradient.t().double() @ x.double()
        sums = torch.zeros(outputs, inputs, device=device)
        ways = ways_to_add(device)
        measured = in_turn({name: [lambda add=add: add(sums, gradient.t(), x)] for name, add in ways.items()},
                           rounds, stopwatch(device))
        for name, add in ways.items():
            results = [_once(add, gradient, x) for _ in range(3)]
            error = float((results[0].double() - exact).norm() / exact.norm())
            seconds = statistics.median(of_round[0] for of_round in measured[name])
            rows.append({"size": f"{outputs} x {inputs}, {tokens} tokens", "way": name, "ms": 1000 * seconds,
                         "teraflops": 2 * outputs * inputs * tokens / seconds / 1e12, "error": error,
                         "same_bits": all(torch.equal(results[0], other) for other in results[1:])})
            if "in place" in name and not (error < _LARGEST_ERROR and rows[-1]["same_bits"]):
                raise RuntimeError(f"wrong sums: {rows[-1]}")
    return rows


def _once(add: Add, gradient: Tensor, x: Tensor) -> Tensor:
    sums = torch.zeros(gradient.size(1), x.size(1), device=x.device)
    add(sums, gradient.t(), x)
    return sums


def ways_to_add(device: str) -> dict[str, Add]:
    """The default, what it replaces, and the Triton kernel as it is and by each tiling."""
    found = ways(torch.float32, torch.bfloat16, device)
    found.pop(WIDE, None)
    if TRITON in found:
        import triton.language as tl

        from ds_vshape.split_backward.kernels.product import TILINGS, launch, with_even

        for tiling in TILINGS:
            found[f"{TRITON}, {tiling.rows} x {tiling.columns}"] = (
                lambda sums, left, right, tiling=tiling: launch(with_even, tiling, sums, left, right, tl.bfloat16))
    return found


def split(device: str, hidden: list[int], length: int, rounds: int) -> list[dict[str, Any]]:
    """A block's F, B and W, in bf16 with sums in fp32, over a forward and a whole backward."""
    rows = []
    for width in hidden:
        case = Case("block", width, length, 1, "bfloat16", "float32", device, 1)
        seconds = measure(case, list(CONTENDERS), rounds)
        first = next(iter(seconds.values()))
        for name, of_rounds in seconds.items():
            rows.append({"hidden": width, "tokens": length, "contender": name, "over_unsplit": ratio(of_rounds, first),
                         "ms": [1000 * statistics.median(phase) for phase in zip(*of_rounds)]})
    return rows
