"""A GPU and its communication library, simulated on the CPU, for tests of what only goes wrong there.

    device.py        which memory is the device's; streams and events whose work runs as late as it may
    deferral.py      the mode that puts operators on a stream instead of running them
    accelerator.py   DeepSpeed's accelerator for it
    communicator.py  a c10d backend that obeys NCCL's rules
    processes.py     forked ranks that have all of it

An operator on the device's memory returns at once and leaves NaN; it runs when something waits for it. So whatever is
read, sent, or let go of too early shows in the numbers. Not simulated: kernels, their speed, the allocator.
"""
