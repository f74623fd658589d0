"""What makes orders: the schedules of the table (named.py), and what changes any schedule.

    gpipe.py             all forwards, then all backwards
    one_f_one_b.py       1F1B
    interleaved.py       interleaved 1F1B and zero bubble
    zero_bubble.py       zero-bubble schedules of one stage a rank
    building_block.py    a block, repeated and tightened (the paper, section 3)
    v_shape.py           V-Min, V-Half, V-ZB
    forward_only.py      evaluation

    fuse.py              whole backwards where the split gains nothing
    pending.py           fewer weight gradients that wait at once
    everything.py        everything recomputed, or everything offloaded
    micro_batch_order.py the order of micro-batches that take different times
"""
