"""What is measured and reported of training: times, memory, log lines, monitors and traces.

    observer.py      what is seen of training batches while they run
    profiling.py     what the passes of a batch took
    own_engine.py    the same of DeepSpeed's own engine
    hops.py          how long messages take
    memory.py        what the passes of a rank keep and need
    keeping.py       what recomputation and offload would save and cost
    allocations.py   what operators allocate, as a dispatch mode sees it
    on_meta.py       what layers need to run with shapes alone
    passes_on_meta.py   all passes of a stage there
    layer_costs.py   what a layer costs there
    accounting.py    what each rank needs, part by part
    rank_memory.py   these parts, and their sum
    optimizer_needs.py  what an optimizer's step makes
    process_memory.py   what the process has besides tensors
    log_lines.py     what the engine says in the log
    monitor.py       what is reported to DeepSpeed's monitors
    trace/           a batch as a picture, pass by pass
"""
