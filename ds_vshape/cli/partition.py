"""The "partition" of a ds_config as the planner takes it: what it says of the layers and of the stages."""

from __future__ import annotations

from pathlib import Path

from ds_vshape.cli.layer_costs import LayerCostsFile
from ds_vshape.config.section import KEY, LayerCosts, Partition, shown
from ds_vshape.schedule.partition.balance import PartitionError, check_bounds, check_costs
from ds_vshape.schedule.placement import Placement

_NAME = f"{KEY}.partition"
# The method that divides the layers by what they cost, which it measures.
_MEASURED = "profile"


def read_costs(file: Path | None, partition: Partition | None) -> tuple[LayerCostsFile | None, str]:
    """What layers cost, by `file` or by the config's `partition`, and how errors name where it is from; None where
    neither says it. ValueError where both do, and for a partition that divides by anything else than the costs."""
    if isinstance(partition, LayerCosts):
        if file is not None:
            raise ValueError(f"--layer-costs can't be used with {_NAME}, which has the costs of layers too")
        try:
            check_costs(partition.costs, len(partition.costs))
        except PartitionError as error:
            raise ValueError(f"{_NAME}: {error}") from None
        return LayerCostsFile.model_construct(costs=partition.costs), _NAME
    if file is None:
        return None, ""
    if isinstance(partition, str) and partition.lower() != _MEASURED:
        raise ValueError(f"--layer-costs can't be used with {_NAME} = {shown(partition)}, which divides the layers by "
                         f"something else; legal: {_MEASURED!r}, or the first layer of each stage with the number of "
                         "layers")
    return LayerCostsFile.read(file), f"--layer-costs {file}"


def check_stages(partition: Partition | None, placement: Placement, costs: LayerCostsFile | None) -> None:
    """ValueError for bounds that can't be those of the stages on `placement`, of as many layers as have `costs`."""
    if isinstance(partition, tuple):
        layers = partition[-1] if partition and costs is None else len(costs.costs) if costs else 0
        try:
            check_bounds(partition, placement.stages, layers)
        except PartitionError as error:
            raise ValueError(f"{_NAME} = {shown(list(partition))}: {error}") from None


def counted_alike(partition: Partition) -> str:
    """What figures leave out of a `partition` where they don't take in what layers cost."""
    value = (list(partition) if isinstance(partition, tuple) else
             {"costs": list(partition.costs)} if isinstance(partition, LayerCosts) else partition)
    return f"{_NAME} = {shown(value)}: all stages count as alike here"
