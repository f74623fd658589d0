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
    gpipe.py             all forwards, then all backwards
    one_f_one_b.py       1F1B
    interleaved.py       interleaved 1F1B and zero bubble
    zero_bubble.py       zero-bubble schedules of one stage a rank
    building_block.py    a block, repeated and tightened (the paper, section 3)
    v_shape.py           V-Min, V-Half, V-ZB
    steady_state.py      many micro-batches, from a schedule for few
    forward_only.py      evaluation
    fuse.py              whole backwards where the split gains nothing
    pending.py           fewer weight gradients that wait at once
    everything.py        everything recomputed, or everything offloaded
    adaptive/            schedules made for measured times under a memory limit
    micro_batch_order.py the order of micro-batches that take different times

What it costs:
    timeline.py          the simulator
    bounds.py            how fast any schedule could be
    memory_on_demand.py  what recomputation and offload cost at least, for that bound
    activations.py       the memory of activations
    memory_limit.py      whether it stays within a limit
    within.py            schedules within limits that hold for running passes, too
    chunk_times.py       times by chunks and links
    metrics.py           all figures in one place
    layers.py            costs of layers, and of stages of them
    balance.py           where to cut the layers
    balance_many.py      the same for more than two chunks on a rank
    partition_and_order.py   where to cut them, together with the order
    choose.py            which schedule a name stands for, once times are known

How it runs:
    moments.py           when passes start and end, as the next one looks at it
    lowering.py          each rank's program, communication included
    deadlock.py          the checker of such programs
    rendezvous.py        all of them run together, as that checker and the next one look at them
    synchronization.py   a synchronized device can't hang them
    own_proof.py         what each rank shows of its own program, which together proves them all
    communicators.py     which channels share a communicator
    collection.py        the garbage collector, out of the way of plans
    request.py           a request to a planner in a process of its own
    worker.py            that process

How it looks:
    drawing.py           as text
    pictures.py          as the papers' figures
"""
