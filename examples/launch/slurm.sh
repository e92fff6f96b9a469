#!/bin/sh
# SLURM: sbatch examples/launch/slurm.sh
# Resumes by itself where the run's directory holds a checkpoint, so the job may be sent again when its time is up.
#SBATCH --job-name=mlpint
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=1
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
# On GPUs: #SBATCH --gpus-per-task=1, and NCCL moves what is on them.
set -e
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
OUT="${OUT:-runs/slurm}"
if [ -e "$OUT/checkpoints/latest" ]; then
  exec srun mlpint train --resume "$OUT"
fi
exec srun mlpint train --layers 64 --chain-slices 8 --batch 32 --checkpoint-every 200 --out "$OUT" "$@"
