#!/usr/bin/env bash
# Trains on all hosts of a hostfile: DeepSpeed's launcher, over pdsh and ssh. Run it on one of them.
#
#   HOSTFILE=launch/cluster/hostfile bash launch/cluster/deepspeed.sh \
#       launch/train_rank.py schedule=v-half parallel.pipe=8 batches=100
#
# Arguments before the script go to the launcher: --include worker-0:0,1  --master_port 29501  --module ds_vshape.run
# Ports and keys of ssh belong in ~/.ssh/config. Ranks on other hosts get the variables that environment.sh names.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/cluster/environment.sh

HOSTFILE=${HOSTFILE:-launch/cluster/hostfile}
check_hosts "$HOSTFILE"

# The launcher gives the lines of this file to all ranks.
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
for variable in $(variables); do
    echo "$variable=${!variable}" >> "$DS_ENV_FILE"
done
deepspeed --hostfile "$HOSTFILE" "$@"
