#!/usr/bin/env bash
# Trains on all hosts of a hostfile with Open MPI's mpirun, which starts one process for each slot. torch's own messages
# are what is used then: MPI only starts the ranks.
#
#   HOSTFILE=launch/cluster/hostfile bash launch/cluster/openmpi.sh \
#       launch/train_rank.py schedule=v-half parallel.pipe=8 batches=100
#
# MPIRUN_OPTIONS: more for mpirun, such as "--mca btl_tcp_if_include ib0".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/cluster/environment.sh

HOSTFILE=${HOSTFILE:-launch/cluster/hostfile}
check_hosts "$HOSTFILE"

MASTER_ADDR=$(host_names "$HOSTFILE" | head -n 1)
MASTER_PORT=${MASTER_PORT:-29500}
export MASTER_ADDR MASTER_PORT
exports=(-x MASTER_ADDR -x MASTER_PORT)
for variable in $(variables); do
    exports+=(-x "$variable")
done
# Ranks bind their threads themselves. Without a terminal mpirun would read what is meant for this shell.
# shellcheck disable=SC2086
mpirun --hostfile "$HOSTFILE" --map-by slot --bind-to none "${exports[@]}" ${MPIRUN_OPTIONS:-} \
    bash "$PWD/launch/cluster/rank.sh" "$@" < /dev/null
