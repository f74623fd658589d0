"""The engine: DeepSpeed's PipelineEngine, driven by any schedule.

    engine.py            train_batch, instruction by instruction
    evaluation.py        eval_batch
    construction.py      what DeepSpeed's constructor makes: groups of experts, the optimizer
    loading.py           a batch's inputs and labels
    ordering.py          the order of micro-batches of different lengths
    passes.py            forwards and backwards of a stage
    keeping.py           recomputation, and copies to the host and back
    messages.py          activations and gradients between stages
    batch_end.py         the end of a batch: loss, gradients, step
    plans.py             what batches run by: schedules, lowered to instructions
    scheduling.py        where their schedules come from
    planning.py          the adaptive planner's process
    guard.py             a batch that fails on one rank
    reports.py           what the engine says of its training
    flops_profile.py     DeepSpeed's flops profiler around a batch
    post_validation.py   steps that aren't held up by other pipeline ranks
    rollback.py          takes a step back to the last bit
    verdict.py           whether such a step is accepted
    verification.py      compares the split backward with a whole one
    rehearsal.py         runs the passes of a batch before the batch itself
    memory_limits.py     keeps to a memory limit in bytes
    rank_limit.py        what a limit for all of a rank leaves, and errors where it is broken
    shape_rehearsal.py   the sizes of activations by shapes, before the first batch
    batch_snapshot.py    what a batch changes, so that it can run again
    comparison.py        how far two runs of a batch agree
"""

from ds_vshape.engine.engine import PipelineEngine
from ds_vshape.engine.post_validation import PostValidatingEngine

__all__ = ["PipelineEngine", "PostValidatingEngine"]
