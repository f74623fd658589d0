"""What the B/W split costs: F + B + W of one layer over F + unsplit backward, and torch's own split beside it.

    python bench/split_cost.py
    python bench/split_cost.py --layer embedding --hidden 512 --vocabulary 32000
    python bench/split_cost.py --device cuda --dtype bfloat16 --sums float32 --hidden 4096 5120 --length 2048 4096 \
        --samples 1                                                         # on a GPU

Each contender adds its weight gradients to sums that exist already, as in every micro-batch but a batch's first.
Gradients are compared before any time is shown.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
os.environ.setdefault("DS_ACCELERATOR", "cuda" if "cuda" in sys.argv else "cpu")

import record
import torch
from stopwatch import Phase, add_device_option, in_turn, ratio, set_up, stopwatch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from ds_vshape.deepspeed_adapter.optimizers import GradAccumSums
from ds_vshape.models.gpt import Block, GPTConfig
from ds_vshape.runtime.gradients import InGrad, InGradAccum
from ds_vshape.split_backward import GradientAccumulator, SplitBackward, WeightGradientStore, WholeGradients

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One layer and the size of a micro-batch: `samples` sequences of `length` tokens."""

    layer: str
    hidden: int
    length: int
    samples: int
    dtype: str
    sums: str
    device: str
    vocabulary: int

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        made: nn.Module
        if self.layer == "block":
            made = Block(GPTConfig(1, self.hidden, self.hidden // 64, self.length))
        elif self.layer == "embedding":
            made = nn.Embedding(self.vocabulary, self.hidden)
        else:
            made = nn.Linear(self.hidden, self.vocabulary, bias=False)
        return made.to(self.device, DTYPES[self.dtype])

    def input(self) -> Tensor:
        if self.layer == "embedding":
            return torch.randint(self.vocabulary, (self.samples, self.length), device=self.device)
        x = torch.randn(self.samples, self.length, self.hidden, device=self.device)
        return x.to(DTYPES[self.dtype]).requires_grad_()

    def accumulator(self, module: nn.Module) -> GradientAccumulator:
        if self.sums == self.dtype:
            return InGrad()
        # What it asks DeepSpeed's optimizer for.
        optimizer: Any = SimpleNamespace(gradient_accumulation_dtype=DTYPES[self.sums],
                                         bit16_groups=[list(module.parameters())])
        return InGradAccum(GradAccumSums(optimizer))


class Contender:
    """One micro-batch of `case` in phases; `sums()` are the weights' gradients of all that have run."""

    names: tuple[str, ...]

    def __init__(self, case: Case) -> None:
        self.module, self.x = case.module(), case.input()
        self.accumulator = case.accumulator(self.module)
        self.gradient = torch.randn_like(self.module(self.x))
        self._apart = case.sums != case.dtype
        for parameter in self.module.parameters():
            start = torch.zeros_like(parameter, dtype=DTYPES[case.sums], requires_grad=False)
            setattr(parameter, "grad_accum" if self._apart else "grad", start)

    def phases(self) -> list[Phase]:
        return [getattr(self, name) for name in self.names]

    def forward(self) -> None:
        self.x.grad = None
        self.output = self.module(self.x)

    def sums(self) -> list[Tensor]:
        return [getattr(parameter, "grad_accum" if self._apart else "grad") for parameter in self.module.parameters()]

    def add_what_autograd_left(self) -> None:
        """As DeepSpeed does after each backward where sums have a dtype of their own."""
        if self._apart:
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    self.accumulator.add(parameter, parameter.grad)
                    parameter.grad = None


class Unsplit(Contender):
    names = ("forward", "backward")

    def backward(self) -> None:
        torch.autograd.backward(self.output, self.gradient)
        self.add_what_autograd_left()


class Ours(Contender):
    names = ("forward", "input_gradients", "weight_gradients")

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.store = WeightGradientStore()

    def forward(self) -> None:
        with SplitBackward(self.store):
            super().forward()

    def input_gradients(self) -> None:
        with SplitBackward(self.store):
            torch.autograd.backward(self.output, self.gradient)
        del self.output
        self.add_what_autograd_left()

    def weight_gradients(self) -> None:
        self.store.run(self.accumulator)


class OursWhole(Ours):
    """Without `gradient_accumulation_fusion`."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.whole = WholeGradients(self.accumulator.add)

    def weight_gradients(self) -> None:
        self.store.run(self.whole)


class Torchs(Contender):
    """torch.distributed.pipelining's split."""

    names = ("forward", "input_gradients", "weight_gradients")

    def input_gradients(self) -> None:
        _, self.groups = stage_backward_input([self.output], [self.gradient], [self.x], self.module.parameters())

    def weight_gradients(self) -> None:
        stage_backward_weight(self.module.parameters(), self.groups)
        del self.output, self.groups
        self.add_what_autograd_left()


CONTENDERS: dict[str, Callable[[Case], Contender]] = {
    "unsplit": Unsplit, "ours": Ours, "ours, whole gradients": OursWhole, "torch's": Torchs,
}


def measure(case: Case, names: Sequence[str], rounds: int) -> dict[str, list[list[float]]]:
    """Seconds of each phase in each round, once the gradients of all contenders agree; sys.exit where they don't."""
    contenders = {name: CONTENDERS[name](case) for name in names}
    base = contenders[names[0]]
    for contender in contenders.values():
        contender.x, contender.gradient = base.x, base.gradient
        for phase in contender.phases():
            phase()
    tolerance = 1e-5 if case.dtype == case.sums == "float32" else 2e-2
    for name, contender in contenders.items():
        for mine, others in zip(contender.sums(), base.sums(), strict=True):
            if (mine - others).norm() > tolerance * others.norm():
                sys.exit(f"no times: {name} has other gradients than {names[0]} with {case}")
    return in_turn({name: contender.phases() for name, contender in contenders.items()}, rounds, stopwatch(case.device))


def rows(case: Case, seconds: dict[str, list[list[float]]]) -> list[list[str]]:
    first = next(iter(seconds.values()))
    size = f"{case.hidden}, {case.samples} x {case.length}, {case.dtype}"
    table = []
    for name, of_rounds in seconds.items():
        phases = [f"{1000 * statistics.median(phase):.2f}" for phase in zip(*of_rounds)]
        whole = [sum(of_round) for of_round in of_rounds]
        table.append([size, name, *phases, *["-"] * (3 - len(phases)), f"{1000 * min(whole):.2f}",
                      f"{ratio(of_rounds, first):.3f}"])
    return table


def main() -> None:
    # Not at the top, so that bench/gpu.py needs nothing but torch and deepspeed.
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", choices=("block", "embedding", "head"), default="block")
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--length", type=int, nargs="+", default=[512])
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--vocabulary", type=int, default=32000, help="of an embedding or a head")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--sums", choices=DTYPES, help="the dtype that gradients add up in; the layer's if not given")
    add_device_option(parser)
    parser.add_argument("--rounds", type=int, default=25)
    record.add_json_option(parser)
    options = parser.parse_args()
    set_up(options.device)
    # An embedding has no input gradient, which torch's split needs.
    names = [name for name in CONTENDERS if options.layer != "embedding" or name != "torch's"]
    table = Table(title=f"a {options.layer}, seconds of {'one core' if options.device == 'cpu' else 'the GPU'}; "
                        f"{options.rounds} rounds")
    for column in ("hidden, tokens, dtype", "", "F ms", "B or all ms", "W ms", "least ms", "over unsplit"):
        table.add_column(column, justify="left" if column in ("", "hidden, tokens, dtype") else "right")
    sizes: Any = itertools.product(options.dtype, options.hidden, options.length, options.samples)
    written = []
    for dtype, hidden, length, samples in sizes:
        case = Case(options.layer, hidden, length, samples, dtype, options.sums or dtype, options.device,
                    options.vocabulary)
        seconds = measure(case, names, options.rounds)
        written.append({**asdict(case), "seconds": seconds})
        for row in rows(case, seconds):
            table.add_row(*row)
    Console(width=130).print(table)
    record.write(options.json, written)


if __name__ == "__main__":
    main()
