"""Ways to add weight gradients to their sum: product then sum, one call for both, a Triton kernel, and the gradients of
several micro-batches as one product.

    python bench/accumulation.py
    python bench/accumulation.py --device cuda --dtype bfloat16 --sums float32 --tokens 2048 4096 \
        --sizes 4096x4096 12288x4096 16384x4096 4096x16384 20480x5120                   # on a GPU

sums (outputs, inputs) += gradient (tokens, outputs)^T @ x (tokens, inputs), for each micro-batch in turn. Sums are
compared with those of float64 before any time is shown. The Triton kernel needs a GPU, and sums wider than the
products.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import record
import torch
from products import ways
from rich.console import Console
from rich.table import Table
from stopwatch import add_device_option, in_turn, ratio, set_up, stopwatch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def size(text: str) -> tuple[int, int]:
    """"16384x4096" as outputs and inputs."""
    outputs, _, inputs = text.partition("x")
    if not (outputs.isdecimal() and inputs.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: must be like 16384x4096, outputs x inputs")
    return int(outputs), int(inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=size, nargs="+", default=[(256, 256), (512, 512), (2048, 512), (1024, 4096)],
                        help="outputs x inputs")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of gradients and inputs")
    parser.add_argument("--sums", choices=DTYPES, help="the sums' own dtype, if they have one")
    add_device_option(parser)
    parser.add_argument("--rounds", type=int, default=30)
    record.add_json_option(parser)
    options = parser.parse_args()
    set_up(options.device)
    dtype, of_sums = DTYPES[options.dtype], DTYPES[options.sums or options.dtype]
    if options.device == "cpu" and dtype != of_sums:
        print("BLAS and the Triton kernel can't add into wider sums here: they need a GPU")
    types = f"{options.dtype} into {options.sums or options.dtype}"
    title = f"{options.micro_batches} micro-batches of {types} on {options.device}, {options.rounds} rounds"
    table = Table(title=title)
    for column in ("outputs x inputs, tokens", "way", "median ms", "least ms", "GFLOP/s", "over the first"):
        table.add_column(column, justify="left" if column[0] in "ow" else "right")
    written: list[dict[str, Any]] = []
    for tokens in options.tokens:
        for outputs, inputs in options.sizes:
            torch.manual_seed(0)
            pairs = [(torch.randn(tokens, outputs, device=options.device).to(dtype),
                      torch.randn(tokens, inputs, device=options.device).to(dtype))
                     for _ in range(options.micro_batches)]
            seconds = measure(table, f"{outputs} x {inputs}, {tokens}", pairs, of_sums, options.rounds)
            written.append({"outputs": outputs, "inputs": inputs, "tokens": tokens, "seconds": seconds})
    Console(width=130).print(table)
    record.write(options.json, written)


def measure(table: Table, title: str, pairs: list[tuple[Tensor, Tensor]], of_sums: torch.dtype,
            rounds: int) -> dict[str, list[float]]:
    """The seconds of every way in each round, on `pairs` of gradient and x; adds its rows."""
    gradient, x = pairs[0]
    sums = torch.zeros(gradient.size(1), x.size(1), dtype=of_sums, device=x.device)
    contenders: dict[str, Callable[[], None]] = {}
    for name, add in ways(of_sums, x.dtype, x.device.type).items():
        contenders[name] = lambda add=add: [add(sums, gradient.t(), x) for gradient, x in pairs]  # type: ignore[misc]
        contenders[f"{name}, concatenated"] = lambda add=add: add(  # type: ignore[misc]
            sums, torch.cat([gradient for gradient, _ in pairs]).t(), torch.cat([x for _, x in pairs]))
    exact = sum((gradient.t().double() @ x.double() for gradient, x in pairs), torch.zeros_like(sums).double())
    tolerance = 1e-5 if gradient.dtype == torch.float32 else 1e-2
    for name, contender in list(contenders.items()):
        sums.zero_()
        try:
            contender()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            print(f"{title}: {name} isn't there: {str(error).splitlines()[0]}")
            del contenders[name]
            continue
        if (sums - exact).norm() > tolerance * exact.norm():
            sys.exit(f"no times: {title}: {name} has other sums")
    watch = stopwatch(x.device.type)
    seconds = in_turn({name: [contender] for name, contender in contenders.items()}, rounds, watch)
    first = next(iter(seconds.values()))
    whole = {name: [of_round[0] for of_round in of_rounds] for name, of_rounds in seconds.items()}
    operations = 2 * sums.numel() * sum(x.size(0) for _, x in pairs)
    for name, of_rounds in seconds.items():
        median = statistics.median(whole[name])
        table.add_row(title, name, f"{1000 * median:.3f}", f"{1000 * min(whole[name]):.3f}",
                      f"{operations / median / 1e9:.0f}", f"{ratio(of_rounds, first):.3f}")
    return whole


if __name__ == "__main__":
    main()
