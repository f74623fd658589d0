#!/usr/bin/env bash
# Sets up the environment and runs the quick tests, in one process for each core; all arguments go to pytest:
#
#   bash tests/run.sh -k launch
#   bash tests/run.sh -n 0        # in one process, which shows output with -s
#   bash tests/run.sh -m slow     # the slow ones
#   bash tests/run.sh -m drill    # slow ones on more cases, or for longer
#   bash tests/run.sh -m ""       # all
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup_env.sh
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
# A file's tests stay together, for they share what its fixtures have trained; conftest.py puts the files in order.
exec python -m pytest --numprocesses logical --dist loadfile --no-loadscope-reorder "$@"
