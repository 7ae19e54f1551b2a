#!/bin/bash
# 70B on 8 machines with 8 GPUs each. params.yaml:
#   train.launch: {engine: fsdp2, processes: 64, machines: 8, machine_rank: null, address: null, port: 29500}
# The checkout, with its .venv, lies on a file system that all machines share.
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
set -euo pipefail
source .venv/bin/activate
dvc repro pack                     # rows are packed once, before any GPU waits for them
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Slurm says which machine is which (SLURM_NODEID). The first one runs the stage through DVC, which records it.
srun --kill-on-bad-exit=1 bash -c 'if [ "$SLURM_NODEID" = 0 ]; then dvc repro train; else python -m stages train; fi'
dvc repro                          # merge, quantize, evaluate, publish
