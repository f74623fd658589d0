"""The engine: DeepSpeed's PipelineEngine, driven by any schedule.

    engine.py            train_batch and eval_batch
    scheduling.py        which schedule trains the next batch
    planning.py          the adaptive planner's process
    post_validation.py   steps that aren't held up by other pipeline ranks
    rollback.py          takes a step back to the last bit
    verdict.py           whether such a step stands
    verification.py      the split backward beside a whole one
    batch_snapshot.py    what a batch changes, so that it can run again
    comparison.py        how far two runs of a batch agree
"""

from ds_vshape.engine.engine import PipelineEngine
from ds_vshape.engine.post_validation import PostValidatingEngine

__all__ = ["PipelineEngine", "PostValidatingEngine"]
