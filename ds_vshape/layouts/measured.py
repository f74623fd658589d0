"""A model for the cost model whose layers' costs are those of its own modules on the meta device: of a Hugging Face
model, and of the package's GPT where a formula doesn't tell what passes keep, under autocast.

It imports torch, and is imported where that is asked for.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ds_vshape.deepspeed_adapter.silent_group import silent_group
from ds_vshape.layouts.gpt_costs import ENDS, Layer, TrainingCosts
from ds_vshape.layouts.job import Job
from ds_vshape.measure.layer_costs import Autocast, MeasuredCosts, measure_layer
from ds_vshape.models.gpt import GPTConfig, gpt_layers, head, loss_fn
from ds_vshape.models.gpt_parallel import parallel_gpt_layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class MeasuredTrainingCosts(TrainingCosts):
    """A training of a model whose layers have been measured; `costs` are one tensor parallel rank's. The `partition` is
    that of layers of gpt.py if the model `is_gpt`, else of the layers measured."""

    costs: tuple[MeasuredCosts, ...] = ()
    is_gpt: bool = False

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Those of pipeline_layers. The model's own products, for the share of the FLOPs, are F's of all ranks."""
        return tuple(_MeasuredLayer(self.tensor * costs.flops[0], 0, costs.parameters, costs.after_forward,
                                    costs.after_backward, costs.working, costs=costs) for costs in self.costs)

    @property
    def partition(self) -> list[int]:
        """PipelineModule's."""
        assert self.bounds is not None
        return super().partition if self.is_gpt else list(self.bounds)

    @property
    def _output(self) -> float:
        # Every tensor parallel rank sends all of it.
        return super()._output * self.tensor

    def _share(self, layer: Layer) -> Layer:
        return layer

    def _times_of(self, layer: Layer) -> tuple[float, float, float]:
        assert isinstance(layer, _MeasuredLayer)
        f, b, w = (flops / (self.speeds.flops * share)
                   for flops, share in zip(layer.costs.flops, self.speeds.efficiency, strict=True))
        bandwidth, latency = self.speeds.inside
        sums = [latency * count + 2 * (self.tensor - 1) / self.tensor * size / bandwidth
                for count, size in (layer.costs.sums_in_f, layer.costs.sums_in_b)]
        return f + sums[0], b + sums[1], w


@dataclass(frozen=True, kw_only=True)
class _MeasuredLayer(Layer):
    costs: MeasuredCosts


def autocast_for(job: Job) -> Autocast | None:
    """What the passes of `job` run in."""
    return None if job.autocast is None else (job.machine.accelerator, DTYPES[job.autocast])


def measured_gpt(job: Job, training: TrainingCosts) -> MeasuredTrainingCosts:
    """`training` of the package's GPT, with the costs that its layers have on the meta device."""
    model = GPTConfig(job.model.layers, job.model.hidden, job.model.heads, job.model.length, job.model.vocabulary)
    with nullcontext() if job.parallel.tensor == 1 else silent_group(job.parallel.tensor) as group:
        specs = gpt_layers(model) if group is None else parallel_gpt_layers(model, group)
        measured = _measured_gpt(specs, job)
    given = {field.name: getattr(training, field.name) for field in fields(TrainingCosts)}
    return MeasuredTrainingCosts(**given, costs=measured, is_gpt=True)


def _measured_gpt(specs: list[Any], job: Job) -> tuple[MeasuredCosts, ...]:
    """The costs of embedding, blocks and head, of which blocks are measured once."""
    with torch.device("meta"):
        embedding, positions, *blocks, norm, _ = [spec.build().to(DTYPES[job.precision.dtype]) for spec in specs]
        labels = torch.zeros(job.data.micro_batch, job.model.length, dtype=torch.long)
    measure = partial(measure_layer, autocast=autocast_for(job))
    first, hidden = measure(*_in_sequence(embedding, positions), labels)
    block, hidden = measure(blocks[0], blocks[0], hidden)
    ends = nn.ModuleList([norm, embedding])
    last, _ = measure(ends, lambda hidden: head(embedding, norm(hidden)), hidden, loss=partial(_loss, labels))
    return first, *[block] * (len(specs) - 2 * ENDS), last


def _in_sequence(*layers: nn.Module) -> tuple[nn.Module, nn.Module]:
    together = nn.Sequential(*layers)
    return together, together


def _loss(labels: Tensor, logits: Tensor) -> Tensor:
    return loss_fn(logits, labels)
