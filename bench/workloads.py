"""What the contenders compute: layers, data and loss, the same for every engine.

    Sleeping            layers that take a set time and no core: what a schedule does on as many devices as ranks
    SleepingLayers      the same, of different times
    SleepingByLength    the same, in proportion to the length of a micro-batch
    Blocks              the same with parameters, messages and activations as those of a transformer's block
    Holding             the same with large activations, of which a copy to the host sleeps as long as their F
    Gpt                 a byte-level GPT with real matrix products: one thread a rank, and no more ranks than cores
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from deepspeed.pipe import LayerSpec
from layers import BlockLinear, HoldingLinear, HoldingPaths, LengthSleepingLinear, SleepingLinear
from resident import map_large_tensors
from torch import Tensor, nn
from torch.nn import functional

from ds_vshape.models.gpt import VOCABULARY, Block, GPTConfig, PositionEmbedding
from ds_vshape.runtime.copy_engine import CopyEngine, HostMemory
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Times, simulate
from ds_vshape.split_backward.head import HeadOutput, Projection

Batch = list[tuple[Tensor, Tensor]]


class Workload(Protocol):
    """`layers` layers of equal cost for all `ranks` together, in batches of `micro_batches`."""

    ranks: int
    layers: int
    micro_batches: int
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    tokens: int | None

    def spec(self, number: int) -> LayerSpec:
        """A layer, for DeepSpeed's engines and ours."""

    def layer_of_paths(self, number: int) -> nn.Module:
        """The same for torch's pipelines, whose split goes through autograd's graph."""

    def batch(self, number: int) -> Batch:
        """The micro-batches of batch `number`."""

    def prepare(self, engine: Any) -> None:
        """Change one of our engines before its first batch."""

    def simulated(self, engine: Any) -> float:
        """The seconds of one of our engine's batches if nothing but its passes took time; collective."""

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Sleeping:
    """Layers of which F, B and W sleep `seconds`, around a small product."""

    ranks: int
    layers: int
    micro_batches: int
    seconds: tuple[float, ...]
    width: int = 16
    loss_fn = staticmethod(functional.mse_loss)
    tokens = None

    def spec(self, number: int) -> LayerSpec:
        return LayerSpec(SleepingLinear, self.width, self.seconds)

    def layer_of_paths(self, number: int) -> nn.Module:
        return HoldingPaths(self.width, self.seconds)

    def batch(self, number: int) -> Batch:
        generator = torch.Generator().manual_seed(number)
        return [(torch.randn(2, self.width, generator=generator), torch.randn(2, self.width, generator=generator))
                for _ in range(self.micro_batches)]

    def prepare(self, engine: Any) -> None:
        pass

    def simulated(self, engine: Any) -> float:
        """With sleeps as long as they really are here: they take a little longer than asked for, on every machine."""
        schedule: Schedule = engine.schedule()
        stages = schedule.placement.stages
        return simulate(schedule, Times.uniform(stages, *self._slept(self.layers / stages))).makespan

    def work(self) -> float:
        """The seconds of a rank's work in a batch, with sleeps as long as they really are here."""
        return self.micro_batches * sum(self._slept(self.layers / self.ranks))

    def _slept(self, layers: float) -> list[float]:
        return [layers * _sleep_of(seconds) for seconds in self.seconds]

    def __str__(self) -> str:
        milliseconds = "/".join(f"{1000 * seconds:g}" for seconds in self.seconds)
        work = self.micro_batches * self.layers * sum(self.seconds) / self.ranks
        return f"{self.layers} layers of {milliseconds} ms (F/B/W), the work alone {work:.2f} s"


@dataclass(frozen=True)
class SleepingLayers(Sleeping):
    """Layers of which F, B and W of each sleep its own seconds, `of_layers`, and keep `held` bytes of a micro-batch."""

    of_layers: tuple[tuple[float, ...], ...] = ()
    held: tuple[int, ...] = ()

    def spec(self, number: int) -> LayerSpec:
        if not self.held:
            return LayerSpec(SleepingLinear, self.width, self.of_layers[number])
        return LayerSpec(HoldingLinear, self.width, self.of_layers[number], self.held[number])

    def layer_of_paths(self, number: int) -> nn.Module:
        return HoldingPaths(self.width, self.of_layers[number], self.held[number] if self.held else 0)


@dataclass(frozen=True)
class SleepingByLength(Sleeping):
    """Layers that sleep in proportion to a micro-batch's length, `mean` on average: lognormal with `sigma`."""

    sigma: float = 0.0
    mean: int = 64

    def spec(self, number: int) -> LayerSpec:
        return LayerSpec(LengthSleepingLinear, self.width, self.seconds, self.mean)

    def batch(self, number: int) -> Batch:
        generator = torch.Generator().manual_seed(number)
        lengths = [round(self.mean * scale) for scale in self.scales(number)]
        return [(torch.randn(length, self.width, generator=generator),
                 torch.randn(length, self.width, generator=generator)) for length in lengths]

    def scales(self, number: int) -> list[float]:
        """The lengths of batch `number` as multiples of their mean."""
        dice = random.Random(number)
        lengths = [dice.lognormvariate(0, self.sigma) for _ in range(self.micro_batches)]
        return [max(1, round(self.mean * length * len(lengths) / sum(lengths))) / self.mean for length in lengths]


@dataclass(frozen=True)
class Blocks(Sleeping):
    """Layers whose parameters, messages and activations are in the proportions of a transformer's block.

    A block of hidden size h has 12 h^2 parameters, hands on t h elements of a micro-batch of t tokens, and keeps about
    17 times as many (34 t h bytes in bf16). With t = h, as 4096 of Llama 7B, that is 12 to 1 to 17. Here a layer of
    `width` w has w^2 parameters.
    """

    width: int = 512

    @property
    def rows(self) -> int:
        """Of a micro-batch [rows, width]."""
        return self.width // 12

    @property
    def message(self) -> int:
        """The bytes that a layer hands on."""
        return 4 * self.rows * self.width

    def spec(self, number: int) -> LayerSpec:
        # It keeps its input too.
        return LayerSpec(BlockLinear, self.width, self.seconds, 16 * self.message, self.rows)

    def layer_of_paths(self, number: int) -> nn.Module:
        return HoldingPaths(self.width, self.seconds, 16 * self.message)

    def batch(self, number: int) -> Batch:
        generator = torch.Generator().manual_seed(number)
        return [(torch.randn(self.rows, self.width, generator=generator),
                 torch.randn(self.rows, self.width, generator=generator)) for _ in range(self.micro_batches)]

    def __str__(self) -> str:
        return f"{super().__str__()}, {4 * self.width ** 2 / 2 ** 20:g} MiB of parameters each"


@dataclass(frozen=True)
class Holding(Sleeping):
    """Layers of which each keeps `held` bytes of a micro-batch."""

    held: int = 2 ** 20

    def layer_of_paths(self, number: int) -> nn.Module:
        return HoldingPaths(self.width, self.seconds, self.held)

    def spec(self, number: int) -> LayerSpec:
        return LayerSpec(HoldingLinear, self.width, self.seconds, self.held)

    def prepare(self, engine: Any) -> None:
        """With copies that sleep until they have taken as long as F of what they move; and resident memory falls when
        activations die."""
        map_large_tensors()
        usual: CopyEngine = engine.copy_engine
        per_byte = self.seconds[0] / self.held
        engine.copy_engine = CopyEngine(usual.outwards, usual.backwards, lambda: _SlowHost(usual.host(), per_byte),
                                        usual.free, usual.now)

    def simulated(self, engine: Any) -> float:
        """With the times that the schedule was planned for, or the mean times of the passes in the last batch."""
        return float(engine.timelines()[0].makespan)

    def __str__(self) -> str:
        return f"{super().__str__()}, {self.held / 2 ** 20:g} MiB of activations each"


class _SlowHost:
    """Memory of the `host`, which takes `per_byte` seconds to write or read a byte."""

    def __init__(self, host: HostMemory, per_byte: float) -> None:
        self._host, self._per_byte = host, per_byte

    def write(self, memory: Sequence[Tensor]) -> None:
        self._slowly(self._host.write, memory)

    def read(self, memory: Sequence[Tensor]) -> None:
        self._slowly(self._host.read, memory)

    def _slowly(self, transfer: Callable[[Sequence[Tensor]], None], memory: Sequence[Tensor]) -> None:
        end = time.perf_counter() + self._per_byte * sum(map(len, memory))
        transfer(memory)
        time.sleep(max(0.0, end - time.perf_counter()))


def _sleep_of(seconds: float, times: int = 20) -> float:
    start = time.perf_counter()
    for _ in range(times):
        time.sleep(seconds)
    return (time.perf_counter() - start) / times


@dataclass(frozen=True)
class Gpt:
    """Blocks of `hidden`, on micro-batches of `samples` sequences of `length` bytes; embedding and head go along with
    the first and the last one."""

    ranks: int
    layers: int
    micro_batches: int
    hidden: int = 256
    length: int = 128
    samples: int = 4

    @property
    def blocks(self) -> int:
        return self.layers

    @property
    def tokens(self) -> int:
        return self.micro_batches * self.samples * self.length

    @staticmethod
    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def spec(self, number: int) -> LayerSpec:
        return LayerSpec(_GptPart, self, number)

    def layer_of_paths(self, number: int) -> nn.Module:
        return _GptPart(self, number)

    def batch(self, number: int) -> Batch:
        generator = torch.Generator().manual_seed(number)
        texts = torch.randint(VOCABULARY, (self.micro_batches, self.samples, self.length + 1), generator=generator)
        return [(text[:, :-1], text[:, 1:]) for text in texts]

    def prepare(self, engine: Any) -> None:
        pass

    def simulated(self, engine: Any) -> float:
        """With the mean times of the passes in the last batch."""
        return float(engine.timelines()[0].makespan)

    def __str__(self) -> str:
        return (f"a GPT of {self.blocks} blocks, hidden {self.hidden}, {self.samples} sequences of {self.length} in a "
                "micro-batch")


class _GptPart(nn.Sequential):
    """Block `number`, with what belongs to the ends of the model."""

    def __init__(self, gpt: Gpt, number: int) -> None:
        config = GPTConfig(gpt.layers, gpt.hidden, gpt.hidden // 64, gpt.length)
        before = [nn.Embedding(VOCABULARY, gpt.hidden), PositionEmbedding(config)] if number == 0 else []
        after = [nn.LayerNorm(gpt.hidden), nn.Linear(gpt.hidden, VOCABULARY)] if number == gpt.layers - 1 else []
        super().__init__(*before, Block(config), *after)


@dataclass(frozen=True)
class GptWithHead(Gpt):
    """A Gpt whose last layer is a head of `vocabulary` words, with whole logits or in chunks of tokens."""

    vocabulary: int = VOCABULARY
    chunked: bool = False

    @property
    def blocks(self) -> int:
        return self.layers - 1

    @staticmethod
    def loss_fn(logits: Any, labels: Tensor) -> Tensor:
        return logits.loss(labels) if isinstance(logits, HeadOutput) else Gpt.loss_fn(logits, labels)

    def spec(self, number: int) -> LayerSpec:
        if number < self.layers - 1:
            return LayerSpec(_GptPart, self, number)
        return LayerSpec(_ChunkedHead if self.chunked else nn.Linear, self.hidden, self.vocabulary, bias=False)

    def costs(self) -> list[float]:
        """Of each layer by its multiplications, in units of hidden^2 for each token."""
        block = 12 + self.length / self.hidden
        return [block] * (self.layers - 1) + [self.vocabulary / self.hidden]

    def __str__(self) -> str:
        kind = "in chunks of tokens" if self.chunked else "with whole logits"
        return f"{super().__str__()}, a head of {self.vocabulary} words {kind}"


class _ChunkedHead(nn.Linear):
    def forward(self, hidden: Tensor) -> Any:
        return HeadOutput(hidden, Projection(self.weight))
