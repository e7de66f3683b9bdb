#!/bin/sh
# Fine-tunes ViT-B/32 at 224 pixels on CIFAR-10 with ddp.
#   scripts/finetune_cifar10.sh PRETRAINED CIFAR10 [OPTION...]
# PRETRAINED: a timm or Hugging Face ViT-B/32, a safetensors file or a folder (timm's vit_base_patch32_224).
# CIFAR10: the folder with data_batch_*.bin and test_batch.bin. Further options go to ./train and win:
# --nproc-per-node 4, --batch-size 16, --epochs 3, --freeze-backbone (a linear probe, much faster), ...
set -eu
cd "$(dirname "$0")/.."
if [ $# -lt 2 ]; then
    sed -n '2,6s/^# //p' "$0" >&2
    exit 2
fi
pretrained=$1 data=$2
shift 2
[ -x ./train ] || make train

# The images are cropped and mirrored at 32 pixels, then resized to 224 by worker threads. The lower layers,
# which know edges and textures already, learn more slowly than the upper ones.
exec ./train --pretrained "$pretrained" --data-path "$data" --strategy ddp --nproc-per-node 2 \
    --batch-size 32 --epochs 5 --learning-rate 1e-4 --layer-decay 0.75 --weight-decay 0.05 --drop-path 0.1 \
    --label-smoothing 0.1 --gradient-clipping 1 "$@"
