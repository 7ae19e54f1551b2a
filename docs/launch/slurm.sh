#!/bin/bash
# 70B on 8 machines with 8 GPUs each. params.yaml:
#   train.launch: {engine: fsdp2, processes: 64, machines: 8, machine_rank: null, address: null, port: 29500}
# The checkout, with its .venv, lies on a file system that all machines share.
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --signal=TERM@120           # two minutes before the time limit: the training saves a checkpoint
set -euo pipefail
source .venv/bin/activate
dvc repro pack                     # rows are packed once, before any GPU waits for them
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Slurm says which machine is which (SLURM_NODEID). The first one runs the stage through DVC, which records it.
# supervise.py waits for the checkpoint after SIGTERM; dvc alone would end at once.
export SFT_GRACE_S=110
srun --kill-on-bad-exit=1 bash -c 'if [ "$SLURM_NODEID" = 0 ]; then
  exec python -P flows/processes/supervise.py $PPID 110 dvc repro train; else exec python -m stages train; fi'
dvc repro                          # merge, quantize, evaluate, publish
