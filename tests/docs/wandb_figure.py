"""The figure of a fine-tuning on its page, drawn from what wandb recorded of it offline.

    PYTHONPATH=tests/support python tests/docs/wandb_figure.py wandb/offline-run-DATE-ID ds_vshape/docs/fine-tuning.png

wandb's own pages need its server. The record is read as wandb's protobuf messages (tests/support/wandb_log.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from wandb_log import history

PANELS = {"loss, nats a token": {"Train/Samples/train_loss": "training", "Train/Samples/eval_loss": "evaluation"},
          "learning rate": {"Train/Samples/lr": ""}, "gradient norm": {"Train/Finetuning/gradient_norm": ""},
          "tokens a second": {"Train/Finetuning/tokens_per_second": ""}}


def draw(run: Path, figure: Path) -> None:
    """One panel for each of PANELS, over samples."""
    steps = history(run)
    made = Figure(figsize=(9, 5), layout="constrained")
    places = made.subplots(2, 2, sharex=True)
    for place, (title, lines) in zip(places.flat, PANELS.items(), strict=True):
        for name, label in lines.items():
            points = [(step["_step"], step[name]) for step in steps if name in step]
            place.plot(*zip(*points, strict=True), label=label, marker="o" if label == "evaluation" else None)
        place.set_title(title, fontsize=10)
        if any(lines.values()):
            place.legend(fontsize=8)
    for place in places[1]:
        place.set_xlabel("samples")
    made.savefig(figure, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("figure", type=Path)
    args = parser.parse_args()
    draw(args.run, args.figure)
