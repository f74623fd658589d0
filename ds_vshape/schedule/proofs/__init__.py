"""That programs can't hang, shown before a rank runs any.

    rendezvous.py        all programs run together, without times
    deadlock.py          the checker of all programs
    synchronization.py   a synchronized device can't hang them
    own_proof.py         what each rank shows of its own program, which together proves them all
"""
