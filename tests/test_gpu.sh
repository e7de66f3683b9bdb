#!/bin/sh
# What only a machine with an NVIDIA GPU can show: every strategy on ranks that share one. tests/test_gpu.sh [BUILD]
# STEPS: how many a run takes. Prints "ok", "not ok" or "skip" before the name of each case. Needs jq.
set -u
. tests/lib.sh
steps=${STEPS:-20}

if ! "$train" env --device cuda >"$work/env" 2>&1; then
    skip "strategies on a GPU" "$(tail -1 "$work/env")"
    exit 0
fi

# run NAME OPTIONS: a small model for a few steps; it writes to $work/NAME.
run() {
    directory=$work/$1
    shift
    "$train" --output-dir "$directory" --embed-dim 128 --num-heads 2 --depth 3 --batch-size 8 --max-steps $steps \
        --gradient-clipping 1 --drop-path 0.1 --limit-val 64 "$@" >"$directory.out" 2>"$directory.err" && return
    echo "status $? of train $*: $(tail -1 "$directory.err")"
}
losses() { jq 'select(.event == "step").train_loss' "$work/$1/metrics.jsonl"; }
weights() { echo "$work/$1/checkpoints/$(cat "$work/$1/checkpoints/latest")/model.safetensors"; }

# The largest difference between the losses of two runs, relative to the larger, where it is above the bar.
far() { # NAME NAME BAR
    losses "$1" >"$work/a"
    losses "$2" >"$work/b"
    paste "$work/a" "$work/b" | awk -v bar="$3" -v steps="$steps" '
        { d = $1 > $2 ? ($1 - $2) / $1 : ($2 - $1) / $2; if (!(d <= most)) most = d; if (NF != 2) most = 1e9 }
        END { if (NR != steps || !(most <= bar)) print "losses differ by " most ", allowed " bar }'
}

# as_cpu NAME BAR OPTIONS: the losses of the CPU
as_cpu() {
    what=$1 bar=$2
    shift 2
    why=$(run "cpu $what" "$@" && run "gpu $what" --device cuda "$@")
    verdict "losses of the CPU: $what, $*" "${why:-$(far "cpu $what" "gpu $what" "$bar")}"
}

# In fp32 the GPU's losses are the CPU's but for rounding. Which algorithm a product takes is a matter of timing,
# so that runs agree to rounding only.
for world in "single 1" "ddp 4" "dp 4" "zero1 4" "zero2 4" "zero3 4"; do
    strategy=${world% *} n=${world#* }
    as_cpu "$strategy" 1e-4 --strategy "$strategy" --nproc-per-node "$n" --backend local
done
# The same algorithms in every run: then the weights are the same, bit for bit.
for strategy in ddp zero1 zero2 zero3; do
    why=$(run "bits $strategy" --device cuda --deterministic --strategy $strategy --nproc-per-node 4 --backend local \
        --gradient-reduction every)
    verdict "$strategy, 4 ranks on one GPU: weights of ddp, bit for bit" \
        "${why:-$(cmp "$(weights "bits ddp")" "$(weights "bits $strategy")" 2>&1)}"
done
# NCCL itself, with the one rank that one GPU can have.
run "no nccl" --device cuda --deterministic --strategy single
for way in "" --cuda-graphs; do
    # shellcheck disable=SC2086
    why=$(RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + $$ % 9000)) \
        run "nccl$way" --device cuda --deterministic --strategy zero3 --backend nccl $way)
    verdict "zero3, one rank over NCCL${way:+ with }$way: losses of single" "${why:-$(far "nccl$way" "no nccl" 1e-4)}"
done
# In 16 bits they differ by the rounding of a different order of sums.
for precision in bf16 fp16; do
    as_cpu "$precision" 2e-2 --precision $precision --strategy zero3 --nproc-per-node 4 --backend local
done
why=$(run "gpu checkpointing" --device cuda --strategy zero3 --nproc-per-node 4 --backend local \
    --activation-checkpointing)
verdict "zero3 with activation checkpointing: losses of zero3" "${why:-$(far "gpu zero3" "gpu checkpointing" 1e-4)}"

# other WAY REFERENCE BAR OPTIONS: the losses of the reference by another way, but for rounding
other() {
    way=$1 reference=$2 bar=$3
    shift 3
    why=$(run "gpu $way" --device cuda "$@")
    verdict "$way: losses of the $reference" "${why:-$(far "$reference" "gpu $way" "$bar")}"
}
other "update on the host" "gpu single" 1e-4 --offload optimizer
other "zero3, 4 ranks on one GPU, update on the host" "gpu zero3" 1e-4 --offload optimizer --strategy zero3 \
    --nproc-per-node 4 --backend local
other "bf16, update on the host" "gpu single" 2e-2 --offload optimizer --precision bf16
for strategy in single dp ddp zero1 zero2 zero3; do
    other "$strategy as CUDA graphs" "gpu single" 1e-4 --cuda-graphs --strategy $strategy
done
other "two micro-batches" "gpu single" 1e-4 --batch-size 4 --gradient-accumulation-steps 2
other "two micro-batches as CUDA graphs, zero3" "gpu two micro-batches" 1e-4 --cuda-graphs --strategy zero3 \
    --batch-size 4 --gradient-accumulation-steps 2
for set in "fp16 --precision fp16" "tanh --gelu tanh --precision bf16"; do
    set -- ${set#* }
    name="one rank, ${set%% *}" # whose steps, with loss scaling, are not those of fp32
    as_cpu "$name" 2e-2 "$@"
    other "$name, as CUDA graphs" "gpu $name" 2e-2 --cuda-graphs "$@"
done
other "TF32" "gpu single" 2e-2 --tf32

# Shapes and options of all kinds, against the CPU.
cases=0
while read -r bar options; do
    # shellcheck disable=SC2086
    as_cpu "options $((cases += 1))" "$bar" $options
done <<END
1e-4 --optimizer sgd --learning-rate 0.05
1e-4 --layer-decay 0.7 --label-smoothing 0.1 --scheduler linear --warmup-steps 2
1e-4 --freeze-backbone
1e-4 --strategy zero3 --nproc-per-node 3 --backend local --activation-checkpointing=2 --prefetch 2
1e-4 --strategy zero3 --nproc-per-node 3 --backend local --no-reshard-after-forward --gradient-reduction every
2e-2 --strategy ddp --nproc-per-node 2 --backend local --bucket-size-mb 0.05 --precision bf16 --reduce-dtype fp32
2e-2 --strategy zero2 --nproc-per-node 2 --backend local --precision bf16 --reduce-dtype bf16
1e-4 --embed-dim 40 --num-heads 5
2e-2 --embed-dim 160 --precision bf16
2e-2 --embed-dim 33 --num-heads 3 --mlp-ratio 1.7 --precision bf16
END

grep -q '^GPU, in use ' "$work/gpu single.err" && grep -q '^difference ' "$work/gpu single.err"
verdict "the ledger stands beside what the GPU says" "$([ $? -eq 0 ] || echo "no such lines: $(tail -3 "$work/gpu single.err")")"

# What cannot fit is refused with the GPU's memory, not the machine's.
"$train" --device cuda --dataset synthetic --model vit_huge_patch14_224 --embed-dim 16000 --depth 64 --batch-size 64 \
    --limit-train 64 --output-dir "$work/too-large" >"$work/out" 2>"$work/err"
why=
grep -q '^train: error: out of memory: ' "$work/err" || why="found $(head -1 "$work/err")"
verdict "a model that does not fit: the error and what would fit" "$why"
exit $failed
