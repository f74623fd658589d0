#!/usr/bin/env bash
# Trains on hosts that Slurm gives: one task is one rank.
#
#   sbatch launch/cluster/slurm.sh launch/train_rank.py schedule=v-half parallel.pipe=8
#
# What is asked for here holds unless sbatch's own options say otherwise (sbatch --nodes 4 launch/cluster/slurm.sh ...).
#SBATCH --job-name=ds-vshape
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
# A log for each job, where it was submitted.
#SBATCH --output=ds-vshape-%j.log
set -euo pipefail
# Slurm runs a copy of this file from elsewhere; submit it from the checkout.
cd "$SLURM_SUBMIT_DIR"
source launch/cluster/environment.sh

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Two jobs may share a host.
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export MASTER_ADDR MASTER_PORT
# A rank that fails ends the others, which would wait for it.
srun --kill-on-bad-exit=1 bash launch/cluster/rank.sh "$@"
