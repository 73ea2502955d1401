#!/usr/bin/env bash
# Slurm: two machines with eight GPUs each. Arguments are those of `bfpo fit`:
#   sbatch configs/launch/slurm.sh -c configs/base.yaml -c configs/experiment/bfpo.yaml -c configs/strategy/fsdp2.yaml
# Three minutes before the time is over Slurm sends SIGUSR1: the run saves a checkpoint, asks to be queued anew, and goes
# on from there in its folder (--resume auto). The same after a preemption or the failure of a machine.
#SBATCH --job-name=bfpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=SIGUSR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
srun --kill-on-bad-exit=1 bfpo fit "$@" \
  --trainer.devices="$SLURM_NTASKS_PER_NODE" --trainer.num_nodes="$SLURM_NNODES" --resume=auto
