"""What a rank does in a batch, instruction by instruction.

    instructions.py       the instruction set
    wrappers.py           what is put around the instructions
    rank.py               what others know of the engine: this rank's place and training
    micro_batch.py        what a micro-batch brings in, and the losses that come out of it
    drawn_batch.py        a batch's data, drawn when it starts
    token_mean.py         a batch's loss as the mean over its tokens
    buffers.py            what a stage holds of a micro-batch from its forward to the end of its backward
    saved_tensors.py      what a forward leaves for its backward, moved to the host and back
    recomputation.py      a forward that keeps nothing and is run again
    copy_engine.py        copies to the host and back
    gradients.py          where gradients add up, and their clipping
    reduction.py          their sum over data parallel ranks, started stage by stage
    gradient_release.py   weights that a script's own hooks step in the middle of a batch
    script_functions.py   functions that a script has put in the place of DeepSpeed's
    wall_clock.py         DeepSpeed's named timers, around the instructions
    random_state.py       the states of the random number generators
    anomaly.py            the first NaN or infinity ends the batch
"""
