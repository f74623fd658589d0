"""What is measured and reported of training: times, memory, log lines, monitors and traces.

    observer.py      what is seen of training batches while they run
    profiling.py     what the passes of a batch took
    own_engine.py    the same of DeepSpeed's own engine
    hops.py          how long messages take
    memory.py        how many bytes each rank needs, measured and predicted
    keeping.py       what recomputation and offload would save and cost
    allocations.py   what operators allocate, as a dispatch mode sees it
    rank_memory.py   the bytes of a rank, by what they are for
    log_lines.py     what the engine says in the log
    monitor.py       what is reported to DeepSpeed's monitors
    trace/           a batch as a picture, pass by pass
"""
