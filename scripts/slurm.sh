#!/bin/bash
# Two nodes with four GPUs each, under Slurm: ViT-B/16 in bf16 with DDP, then the same under ZeRO-3.
#   sbatch scripts/slurm.sh DATA [OPTIONS OF ./train]
# DATA is a folder of images (train/CLASS/*, val/CLASS/*) that all nodes see, like the working directory.
# What sbatch is told wins over the lines below. DEVICE=cpu trains without GPUs, over TCP. RUNS names where the
# results go. Two minutes before the time limit every rank gets SIGTERM, finishes its step and writes a
# checkpoint; submitted again, the script goes on there.
#SBATCH --job-name=vit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=4
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=vit-%j.log
set -eu
data=${1?usage: sbatch scripts/slurm.sh DATA [OPTIONS OF ./train]}
shift
runs=${RUNS:-runs/slurm}

for strategy in ddp zero3; do
    # -K1: a rank that fails ends the step, instead of leaving the others to their --timeout
    srun -K1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" ./train --device "${DEVICE:-cuda}" --precision bf16 \
        --strategy "$strategy" --model vit_base_patch16_224 --data-path "$data" --batch-size 128 \
        --checkpoint-interval-steps 500 --resume auto --output-dir "$runs-$strategy" "$@"
done
