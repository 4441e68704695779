#!/usr/bin/env bash
# A sweep on a Ray cluster that lives as long as a job of Slurm:
#   sbatch cluster/slurm.sh sweeps/ablate_layers.yaml --preset small
# Before: `cluster/node.sh install cluster/slurm.site.yaml` on a machine that sees the same home folder as the nodes.
#SBATCH --job-name=pdiff
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --output=pdiff-%j.log
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
export PATH="$PWD/.venv/bin:$PATH" PDIFF_SITE="$PWD/cluster/slurm.site.yaml" RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
umask 077
# Others may reach these machines: a token of this job alone, which stands in no command line.
RAY_AUTH_TOKEN_PATH=$(mktemp "$HOME/.pdiff-token-XXXXXXXX")
export RAY_AUTH_TOKEN_PATH
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
port=$((20000 + SLURM_JOB_ID % 20000))
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # which srun does not take from the job since Slurm 22.05

srun --ntasks="$SLURM_JOB_NUM_NODES" "$(command -v python)" cluster/check_node.py uv.lock
# Starts Ray on every node, runs the sweep on the first one, and stops every Ray there: hence --exclusive above.
srun --ntasks="$SLURM_JOB_NUM_NODES" ray symmetric-run --address="$head:$port" --min-nodes="$SLURM_JOB_NUM_NODES" \
  --num-cpus="$SLURM_CPUS_PER_TASK" -- python -m pdiff_ray.sweep "$@"
