#!/usr/bin/env bash
# One rank that srun or mpirun has started: torch and DeepSpeed get by their own names what these two call otherwise.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# mpirun comes first: within a Slurm job both have set theirs.
export RANK=${OMPI_COMM_WORLD_RANK:-${SLURM_PROCID:?start this with srun or mpirun}}
export LOCAL_RANK=${OMPI_COMM_WORLD_LOCAL_RANK:-$SLURM_LOCALID}
export WORLD_SIZE=${OMPI_COMM_WORLD_SIZE:-$SLURM_NTASKS}
exec python -u "$@"
