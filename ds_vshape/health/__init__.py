"""How the ranks of a job know of each other's state: lost ranks, failures that all share, checks before training.

    preflight.py    ranks have the same versions, config, layout and plan, and every channel answers
    names.py        how errors name a rank
    heartbeat.py    signs of life between ranks
    attendance.py   decides from them which rank is lost
    waits.py        waits in torch.distributed, and how they are ended
    watch.py        ends every wait for a lost rank, with its name
    step.py         how far the step of a batch has come on this rank
    failures.py     a batch that fails on one rank fails on all
    meeting.py      work that succeeds on all ranks or on none
"""

from ds_vshape.health.failures import Agreement, Failure
from ds_vshape.health.preflight import Preflight
from ds_vshape.health.watch import Watch, watch_job

__all__ = ["Agreement", "Failure", "Preflight", "Watch", "watch_job"]
