"""What ranks send to each other, and through what.

    payload.py      what crosses a stage boundary: tensors, their signature, the form in which they travel
    ownership.py    what is sent has memory of its own
    channels.py     messages between pipeline ranks, asynchronous
    device_waits.py the message that a device which runs behind its host waits for
    groups.py       makes the process groups
    exchange.py     short texts and numbers between all ranks of the job
    background.py   runs exchanges concurrently with the passes
"""

from ds_vshape.comm.channels import Channels, PeerLost
from ds_vshape.comm.exchange import Exchange

__all__ = ["Channels", "Exchange", "PeerLost"]
