"""What the engine says in the log, in words."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from ds_vshape.schedule.activations import peak_activations
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Timeline, Times, simulate


def schedule_line(schedule: Schedule) -> str:
    """What a schedule costs while all passes take equally long."""
    placement = schedule.placement
    timeline = simulate(schedule, Times.uniform(placement.stages))
    return (f"pipeline_schedule {schedule.name}: {placement.ranks} ranks, {placement.stages} stages, "
            f"{schedule.micro_batches} micro-batches; with equal times bubble {timeline.bubble:.1%}, peak "
            f"{max(peak_activations(schedule)):g} of 1F1B's {2 * placement.ranks} activations{ends_line(placement)}")


def ends_line(placement: Placement) -> str:
    """What a script has to know where both ends of the model are on one rank; nothing elsewhere."""
    last = placement.rank_of(placement.last_stage)
    if last == placement.ranks - 1:
        return ""
    return (f"; pipeline rank {last} holds the first and the last stage, and a script must send nothing from the one's "
            "rank to the other's")


def comparison_line(name: str, predicted: Timeline, measured: Timeline) -> str:
    """How a planned schedule ran."""
    return (f"pipeline_schedule {name}: makespan {predicted.makespan:.4f} s predicted, {measured.makespan:.4f} s "
            f"measured ({measured.makespan / predicted.makespan:.2f})")


def split_line(rank: int, module: nn.Module, split: Collection[nn.Parameter]) -> str:
    """Which share of a rank's trained parameters has its gradients in W, and the names of the others."""
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    unsplit = [(name, parameter) for name, parameter in trained if parameter not in split]
    share = 1 - sum(p.numel() for _, p in unsplit) / max(1, sum(p.numel() for _, p in trained))
    names = f"; in B: {', '.join(name for name, _ in unsplit)}" if unsplit else ""
    return f"pipeline rank {rank}: {share:.1%} of the parameters have their gradients in W{names}"
