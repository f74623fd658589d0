#!/usr/bin/env bash
# Sets up the environment and runs the tests, but for the slow ones; all arguments go to pytest:
#
#   bash tests/run.sh -k launch
#   bash tests/run.sh -m slow     # the slow ones
#   bash tests/run.sh -m ""       # all
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup_env.sh
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
exec python -m pytest "$@"
