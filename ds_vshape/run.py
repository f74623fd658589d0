"""Runs a script that knows only DeepSpeed, with our module and engine in DeepSpeed's place.

    deepspeed --num_gpus 4 --module ds_vshape.run train.py --deepspeed_config ds_config.json

The script may import PipelineModule and PipelineEngine from anywhere in DeepSpeed and subclass them. With
"pipeline_schedule" in the config it trains by that schedule; without, nothing changes.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

_USAGE = "usage: deepspeed [launcher options] --module ds_vshape.run SCRIPT [script options]"
# The launcher puts this before the script's name.
_LOCAL_RANK = "--local_rank"


def substitute() -> None:
    """Replace DeepSpeed's public names by ours in this process.

    DeepSpeed's own code keeps what it imported before: it asks only whether a model is one of its PipelineModules,
    and ours are.
    """
    import deepspeed
    import deepspeed.pipe
    import deepspeed.runtime.pipe
    import deepspeed.runtime.pipe.module

    from ds_vshape.plugin import PipelineModule, engines_for_our_models, initialize

    for home in (deepspeed, deepspeed.pipe, deepspeed.runtime.pipe, deepspeed.runtime.pipe.module):
        home.PipelineModule = PipelineModule
    deepspeed.initialize = initialize
    engines_for_our_models()


def main(arguments: Sequence[str]) -> None:
    """Run the script that `arguments` name, with the rest of them as its own."""
    of_launcher = [argument for argument in arguments[:1] if argument.startswith(_LOCAL_RANK)]
    script, *options = arguments[len(of_launcher):] or [""]
    if not os.path.isfile(script):
        sys.exit(f"{_USAGE}\n{f'no such script: {script}' if script else 'no script given'}")
    # As Python itself does for a script.
    sys.argv = [script, *of_launcher, *options]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    substitute()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
