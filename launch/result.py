"""What one run of the main job measured, as the JSON file that rank 0 leaves behind."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class JobResult:
    """`losses` holds one loss a batch (nats a byte). `batch_seconds` and the bubbles (fractions) are medians over the
    batches after the first few. `stages` counts ranks; each rank's `peak_activations` are in 1/(2 x stages) of the
    model for one micro-batch.
    """

    schedule: str
    stages: int
    micro_batches: int
    losses: list[float]
    validation_loss: float
    batch_seconds: float
    predicted_bubble: float
    measured_bubble: float
    peak_activations: list[int]

    @property
    def loss(self) -> float:
        """The last batch's loss."""
        return self.losses[-1]

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        exact = {"loss": self.loss, "loss_hex": self.loss.hex()}
        path.write_text(json.dumps({**exact, **dataclasses.asdict(self)}, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> JobResult:
        fields = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in json.loads(path.read_text()).items() if key in fields})
