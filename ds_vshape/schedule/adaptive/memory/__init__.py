"""Plans that recompute activations, or offload them to the host, to stay within a memory limit.

    relaxed.py      problems without either whose orders suit one with them
    keeping.py      in which ways an activation can be kept
    layout.py       a problem as arrays, for the loops
    conversion.py   between problems and schedules and their arrays
    annealing.py    the loops: where copies stand, how long it takes, what to change
    search.py       the phases of a search
"""
