#!/bin/sh
# What can be wrong with GPUs, one line each, without one: a CUDA runtime of tests/fake_cuda.c tells of it. And
# with the number of ranks.
. tests/lib.sh
port=$((20000 + $$ % 9000))

# refused NAME PATTERN ARGUMENTS...: exit status 1, and one line of an error that matches
refused() {
    name=$1 pattern=$2 wrong=""
    shift 2
    timeout 60 "$@" >"$work/out" 2>"$work/err"
    status=$?
    grep -qE "^train: error: .*$pattern" "$work/err" || wrong="found '$(head -1 "$work/err")', expected '$pattern'"
    [ "$(grep -c '^train: error' "$work/err")" = 1 ] || wrong="not one line: $(cat "$work/err")"
    [ $status = 1 ] || wrong="exit status $status"
    verdict "$name" "$wrong"
}

fake=$build/cuda/fake_cuda.so
if [ -f "$fake" ]; then
    case_of() { name=$1 pattern=$2 what=$3; shift 3; refused "$name" "$pattern" env "FAKE_CUDA=$what" \
        "LD_PRELOAD=$(readlink -f "$fake")" "$train" --device cuda --output-dir "$work/none" "$@"; }
    case_of "driver too old" "the CUDA driver is too old: found 11.4, expected [0-9.]+ or newer" old
    case_of "driver too old, several ranks" "the CUDA driver is too old" old --nproc-per-node 2
    case_of "another architecture" \
        "device 0: found Test GPU \(sm_75\), for which this program was not built: .*CUDA_ARCHS=75" arch
    case_of "more ranks than devices" \
        "found 1 CUDA device.* number 3 .*--backend local lets ranks share" none --nproc-per-node 4
    case_of "tcp on GPUs" "device cuda: found --backend tcp, expected nccl" none --nproc-per-node 2 --backend tcp
    RANK=1 WORLD_SIZE=1 case_of "a rank beyond the world" "RANK: found '1', expected .* \[0, 0\]" none
    case_of "out of memory" "out of memory: .*1.000 GB|out of memory" none --dataset synthetic \
        --model vit_huge_patch14_224 --batch-size 64 --limit-train 64
    env FAKE_CUDA=none "LD_PRELOAD=$(readlink -f "$fake")" "$train" env >"$work/out" 2>&1
    verdict "env lists the GPU" "$(grep -q '^GPU 0  *Test GPU, sm_75, 2.0 GB, bus 00000000:3B:00.0, reaches no other' \
        "$work/out" || echo "found $(grep GPU "$work/out")")"
else
    skip "GPUs that cannot be used" "built without CUDA"
fi

wrong_size() { # RANK SIZE...: the ranks of a world that do not agree on its size
    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port timeout 30 "$train" env --timeout 5 \
        >/dev/null 2>"$work/err0" &
    RANK=1 WORLD_SIZE=3 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port timeout 30 "$train" env --timeout 5 \
        >/dev/null 2>"$work/err1"
    second=$?
    wait $!
    [ "$? $second" = "1 1" ] || echo "exit statuses are not 1"
    [ "$(cat "$work/err0" "$work/err1" | grep -c '^train: error')" = 1 ] || echo "not one line"
    grep -q "rank 1 says that there are 3 ranks, rank 0 that there are 2" "$work/err0" || cat "$work/err0"
}
verdict "ranks with another WORLD_SIZE" "$(wrong_size)"
for size in 0 -1 two 5000; do
    RANK=0 WORLD_SIZE=$size MASTER_ADDR=127.0.0.1 refused "WORLD_SIZE=$size" "WORLD_SIZE: found '$size'" "$train" env
done
exit $failed
