"""Messages and collectives between ranks.

    payload.py      what crosses a stage boundary: tensors, their signature, the form in which they travel
    ownership.py    copies results whose memory something else may write
    channels.py     messages between pipeline ranks, asynchronous
    device_waits.py which message an asynchronous device is waiting for
    groups.py       makes the process groups
    exchange.py     short texts and numbers between all ranks of the job
    background.py   runs exchanges concurrently with the passes
"""

from ds_vshape.comm.channels import Channels, PeerLost
from ds_vshape.comm.exchange import Exchange

__all__ = ["Channels", "Exchange", "PeerLost"]
