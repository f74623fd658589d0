"""The file of `ds-vshape plan --layer-costs`: what each layer of a model costs.

    {"costs": [[1, 0, 2], [10, 12, 8], [10, 12, 8], 90],
     "activations": [[0, 1], [17, 16], [17, 16], 17],
     "hop": 1}

    costs         the times of F, B and W of each layer, or one number for all three together
    activations   the memory that F of each leaves until B, and B until W, or one number for both
    hop           the time of a message between ranks

Times have any one unit, and so do sizes. Without activations all layers leave as much, without a hop messages take no
time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ds_vshape.config.section import shown
from ds_vshape.schedule.partition.balance import MOST_COST
from ds_vshape.schedule.partition.layers import Layers

_Number = Annotated[float, Field(ge=0, le=MOST_COST, allow_inf_nan=False, strict=True)]


class LayerCostsFile(BaseModel):
    """What the file has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    costs: Annotated[tuple[_Number | tuple[_Number, _Number, _Number], ...], Field(min_length=2)]
    activations: tuple[_Number | tuple[_Number, _Number], ...] = ()
    hop: _Number = 0.0

    @classmethod
    def read(cls, file: Path) -> LayerCostsFile:
        """ValueError, with the file's name, for a file that can't be read or has anything else."""
        try:
            found = cls.model_validate_json(file.read_bytes())
        except OSError as error:
            raise ValueError(f"--layer-costs {file} can't be read: {error}") from None
        except ValidationError as error:
            problems = error.errors()
            # Of a value that may be a number or a list, what is wrong in the list.
            first = max((problem for problem in problems if problem["loc"][:2] == problems[0]["loc"][:2]),
                        key=lambda problem: len(problem["loc"]))
            place = ".".join(str(part) for at, part in enumerate(first["loc"]) if at < 2 or isinstance(part, int))
            raise ValueError(f"--layer-costs {file}: {place or 'the file'} = {shown(first['input'])}: {first['msg']}; "
                             'must be {"costs": [a number, or F, B and W, for each layer], "activations": [a number, '
                             'or what F and B leave, for each], "hop": a number}, of which the last two may be left '
                             "out") from None
        if found.activations and len(found.activations) != len(found.costs):
            raise ValueError(f"--layer-costs {file}: activations of {len(found.activations)} layers, but costs of "
                             f"{len(found.costs)}")
        for key, values in (("costs", found.costs), ("activations", found.activations)):
            if values and not any(sum(value) if isinstance(value, tuple) else value for value in values):
                raise ValueError(f"--layer-costs {file}: {key} are all 0: at least one must be more")
        return found

    @property
    def layers(self) -> Layers:
        """The same for planning; where a cost is one number, F, B and W take a third each."""
        times = [cost if isinstance(cost, tuple) else (cost / 3,) * 3 for cost in self.costs]
        if not self.activations:
            return Layers.alike_in_memory(*zip(*times))
        sizes = [size if isinstance(size, tuple) else (size, size) for size in self.activations]
        return Layers(*zip(*times), *zip(*sizes))
