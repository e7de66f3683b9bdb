#!/bin/sh
# What make test-gpu asks of a GPU, of vit_cuda.cu run by the CPU (tests/cuda_on_cpu.h); and what only that
# can show: streams in other orders, host code that touches the device's memory.
. tests/lib.sh
TRAIN=$build/cuda_on_cpu/train
[ -x "$TRAIN" ] || { skip "CUDA on the CPU" "there is no nvcc, whose headers it needs"; exit 0; }
export TRAIN
STEPS=4 sh tests/test_gpu.sh "$build" || failed=1

# weights ORDER OPTIONS...: of a run with the streams in that order
weights() {
    order=$1
    shift
    guard="" # costs much where work runs at once
    [ "$order" != late ] || guard=CUDA_ON_CPU_GUARD=1
    # shellcheck disable=SC2086
    env "CUDA_ON_CPU=$order" $guard "$TRAIN" --device cuda --deterministic --depth 2 --embed-dim 32 \
        --max-steps 4 --limit-val 8 --batch-size 4 --quiet --output-dir "$work/$order" "$@" \
        >"$work/log" 2>&1 || echo "$order: $(tail -1 "$work/log")"
    cat "$work/$order/checkpoints/step-00000004/model.safetensors"
    rm -rf "$work/$order"
}

for options in "--strategy ddp --nproc-per-node 3" "--strategy zero1 --nproc-per-node 3" \
    "--strategy zero3 --nproc-per-node 3 --prefetch 2" \
    "--strategy zero2 --nproc-per-node 2 --offload optimizer" "--strategy zero3 --cuda-graphs"; do
    set -- $options --backend local
    weights early "$@" >"$work/early.bin"
    wrong=""
    for order in late compute communication; do
        weights $order "$@" | cmp -s - "$work/early.bin" || wrong="$wrong $order"
    done
    verdict "streams in any order: $options" "${wrong:+other weights: $wrong}"
    # that this can tell: the same without the waits between streams
    wrong="the same weights"
    for order in late compute communication; do
        CUDA_ON_CPU_FORGET=1 weights $order "$@" | cmp -s - "$work/early.bin" || wrong=""
    done
    verdict "without waits: $options" "$wrong"
done
exit $failed
