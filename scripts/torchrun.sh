#!/bin/sh
# Two nodes under torchrun, a process a GPU: ViT-B/16 in bf16 with ZeRO-3. On each node, with the first one's
# name or address:
#   scripts/torchrun.sh FIRST_NODE NODE_RANK DATA [OPTIONS OF ./train]     NODE_RANK: 0 on the first, 1 on the other
# GPUS (4) is the number of GPUs of a node, DEVICE=cpu trains without them, over TCP; PORT (29500) must be free on
# the first node, and so must PORT + 1, where ./train's ranks meet. A rank that fails ends all: what torchrun calls
# a restart begins with the last checkpoint.
set -eu
first=${1?usage: scripts/torchrun.sh FIRST_NODE NODE_RANK DATA [OPTIONS OF ./train]} node=$2 data=$3
shift 3
exec "${TORCHRUN:-torchrun}" --no-python --nnodes 2 --node-rank "$node" --nproc-per-node "${GPUS:-4}" \
    --master-addr "$first" --master-port "${PORT:-29500}" \
    ./train --device "${DEVICE:-cuda}" --precision bf16 --strategy zero3 --model vit_base_patch16_224 \
    --data-path "$data" --batch-size 128 --checkpoint-interval-steps 500 --resume auto \
    --output-dir "${RUNS:-runs/torchrun}" "$@"
