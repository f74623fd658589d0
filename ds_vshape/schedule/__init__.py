"""Schedules: who runs which pass when, as pure logic without torch.

What a schedule is:
    passes.py            F, B, W and the whole backward of a stage and a micro-batch; recomputation and offload
    placement.py         which rank holds which stage
    schedule.py          a placement, and each rank's passes in order
    repeated.py          the middle of an order or a program, which repeats, kept once
    of_stages.py         numbers for each stage, checked
    pieces.py            where a W is cut into pieces
    serial.py            schedules, times and sizes as JSON

Schedules by name:
    named.py             their table
    builders/            their orders, and what changes any schedule
    steady_state.py      many micro-batches, from a schedule for few
    adaptive/            schedules made for measured times under a memory limit

What it costs:
    timeline.py          the simulator
    bounds.py            how fast any schedule could be
    memory_on_demand.py  what recomputation and offload cost at least, for that bound
    activations.py       the memory of activations
    memory_limit.py      whether it stays within a limit
    within.py            schedules within limits that hold for running passes, too
    chunk_times.py       times by chunks and links
    metrics.py           all figures in one place
    partition/           where to cut the layers into stages
    choose.py            which schedule a name stands for, once times are known

How it runs:
    moments.py           when passes start and end, as the next one looks at it
    lowering.py          each rank's program, communication included
    proofs/              that such programs can't hang
    communicators.py     which channels share a communicator
    collection.py        the garbage collector, out of the way of plans
    request.py           a request to a planner in a process of its own
    worker.py            that process

How it looks:
    drawing.py           as text
    pictures.py          as the papers' figures
"""
