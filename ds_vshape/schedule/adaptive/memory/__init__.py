"""Plans that recompute activations, or offload them to the host, to stay within a memory limit.

    search.py       the phases of a search
    relaxed.py      problems without either whose orders suit one with them
    candidates.py   an order with activations kept in some way, made to fit; the best ones
    lengthened.py   a candidate for few micro-batches made one for many
    rounds.py       a race of candidates, and rounds of annealing
    keeping.py      in which ways an activation can be kept
    layout.py       a problem as arrays, for the loops
    conversion.py   between problems and schedules and their arrays
    annealing.py    the loops: where copies stand, how long it takes, what to change
"""
