"""One rank of one step of gpu.py, which starts it:

    python bench/gpu_steps.py '{"step": "links", "device": "cuda", "arguments": {...}, "result": "links.0.json"}'

with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in the environment where the step has ranks. Writes what
the step returns to the file `result`. SIGUSR1 makes it print where all of its threads are.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

faulthandler.register(signal.SIGUSR1, all_threads=True)
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")


def run(request: dict[str, Any]) -> Any:
    """What the step returns on this rank."""
    import torch

    step, device, arguments = request["step"], request["device"], request["arguments"]
    if step in ("machine", "products", "split"):
        import gpu_kernels

        of_device = {"machine": gpu_kernels.machine, "products": gpu_kernels.products, "split": gpu_kernels.split}
        return of_device[step](device, **arguments)
    import deepspeed
    import deepspeed.ops

    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)
        # Building DeepSpeed's shared-memory collectives takes minutes.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(backend, verbose=False)
    import gpu_training

    if step == "links":
        return gpu_training.links(device, **arguments)
    of_engine = {"train": gpu_training.train, "first_run": gpu_training.first_run,
                 "same_again": gpu_training.same_again, "killed": gpu_training.killed}
    return of_engine[step](**arguments)


def main() -> None:
    request = json.loads(sys.argv[1])
    result = run(request)
    draft = Path(request["result"] + ".draft")
    draft.write_text(json.dumps(result))
    draft.rename(request["result"])
    sys.stdout.flush()
    sys.stderr.flush()
    # Groups aren't taken down: NCCL waits for others there, and there is nothing left to lose.
    os._exit(0)


if __name__ == "__main__":
    main()
