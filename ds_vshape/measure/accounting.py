"""What each pipeline rank needs, by part: counted where it is there already, predicted where it isn't.

    parameters, gradients       from the module and the optimizer
    optimizer                   what it has, and before the first step what its step makes (optimizer_needs.py)
    activations, working        from the sizes of one micro-batch under a schedule
    batch end                   copies of gradients and temporary memory of the step
    process                     measured (process_memory.py)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves

from ds_vshape.comm.groups import light_options
from ds_vshape.deepspeed_adapter.optimizers import (GRADIENTS, GradAccumSums, core_of, gradient_copies, sums_in_memory,
                                                     sums_of)
from ds_vshape.measure.memory import Storages, memory_of_model
from ds_vshape.measure.optimizer_needs import step_needs
from ds_vshape.measure.process_memory import process_bytes
from ds_vshape.measure.rank_memory import RankMemory, batch_end_bytes
from ds_vshape.runtime.rank import Rank
from ds_vshape.schedule.communicators import communicator_bytes


def parts_of_ranks(rank: Rank, process: int = 0) -> tuple[RankMemory, ...]:
    """What each pipeline rank needs besides the passes, on every rank of the pipeline of `rank` (collective). `process`
    is what this rank's has besides tensors."""
    own = torch.tensor([*_own_parts(rank), process], device=rank.device)
    every = [torch.empty_like(own) for _ in range(rank.placement.ranks)]
    dist.all_gather(every, own, group=rank.grid.get_pipe_parallel_group())
    # Over gloo they have no memory of the device.
    communicators = communicator_bytes(rank.placement) if light_options() is not None else [0 for _ in every]
    return tuple(RankMemory(parameters, gradients, optimizer, None, None, rollback, of_communicators, batch_end,
                            max(0, process - of_communicators))
                 for (parameters, gradients, optimizer, rollback, batch_end, process), of_communicators
                 in zip(torch.stack(every).tolist(), communicators, strict=True))


def measured_process(rank: Rank, after_step: bool) -> int:
    """What this rank's process has besides tensors now, between two batches; `after_step` says whether there has been
    a step, of which a rollback may be kept."""
    parameters = [*rank.module.parameters()]
    gradients = [getattr(parameter, name, None) for name in GRADIENTS for parameter in parameters]
    there = memory_of_model(rank.module)
    there.add([*gradients, *(sums_in_memory(rank.optimizer) or ()), *optimizer_memory(rank.optimizer)])
    kept = rank.rollback_bytes() if after_step else 0
    if kept:  # and the gradients of that step with it
        kept += gradient_bytes(rank.module, rank.optimizer)
    return process_bytes(rank.device, there.nbytes() + kept)


def _own_parts(rank: Rank) -> list[int]:
    """Parameters, gradients, optimizer, rollback and the end of the batch."""
    module, optimizer = rank.module, rank.optimizer
    gradients, state, rollback = gradient_bytes(module, optimizer), optimizer_bytes(module, optimizer), (
        rank.rollback_bytes())
    needs = step_needs(core_of(optimizer))
    made = 0 if core_of(optimizer).state else needs.state or 0
    return [parameter_bytes(module), gradients, state + made, rollback + (made if rollback else 0),
            _batch_end(rank, gradients, needs.temporary or 0)]


def _batch_end(rank: Rank, gradients: int, temporary: int) -> int:
    """What comes to the gradients in the reduction and the step."""
    copies = gradient_copies(rank.optimizer)
    # On a host memory is there when it's written, and gradients that have moved are free.
    bucket = copies.bucket if rank.device.type == "cuda" else 0
    return batch_end_bytes(gradients, temporary, copies.flat, copies.made, bucket)


def parameter_bytes(module: nn.Module) -> int:
    """Parameters and buffers, and the flat memory that DeepSpeed's optimizers put them into."""
    return memory_of_model(module).nbytes()


def gradient_bytes(module: nn.Module, optimizer: Any) -> int:
    """What a batch accumulates: each parameter's gradient, or what the optimizer has for it."""
    flat = sums_in_memory(optimizer)
    if flat is not None:
        # `.grad` holds gradients only within a backward.
        return Storages(flat).nbytes()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trained)
    sums = sums_of(optimizer)
    if isinstance(sums, GradAccumSums):
        gradients += sum(parameter.numel() for parameter in trained) * sums.dtype.itemsize
    return gradients


def optimizer_memory(optimizer: Any) -> list[Any]:
    """The weights that the torch optimizer inside `optimizer` steps, and its state."""
    inner = core_of(optimizer)
    stepped = [parameter for group in inner.param_groups for parameter in group["params"]]
    return [*stepped, *tree_leaves([*inner.state.values()])]


def optimizer_bytes(module: nn.Module, optimizer: Any) -> int:
    """What the torch optimizer inside `optimizer` has that isn't the module's own."""
    return (Storages(optimizer_memory(optimizer)) - memory_of_model(module)).nbytes()
