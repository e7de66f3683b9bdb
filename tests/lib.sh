# lib.sh - what the tests of the program share. They run from the root, with a build directory as argument;
# TRAIN names another program than ./train.
# shellcheck shell=sh disable=SC2034
build=${1:-build}
train=${TRAIN:-./train}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
failed=0

ok() { echo "ok $1"; }
bad() { echo "not ok $1: $2"; failed=1; }
skip() { echo "skip $1: $2"; }
verdict() { if [ -z "$2" ]; then ok "$1"; else bad "$1" "$2"; fi; } # NAME WHAT-IS-WRONG

# What differs between the weights or the optimizer state of two runs of 4 steps in $work: difference ONE OTHER
difference() {
    for file in model optimizer; do
        file=checkpoints/step-00000004/$file.safetensors
        cmp -s "$work/$1/$file" "$work/$2/$file" || echo "$file of $1 differs from that of $2"
    done
}

# Escapes of so many bytes below a modulus, for printf %b: bytes COUNT MODULUS SEED (a linear congruence).
bytes() {
    awk -v n="$1" -v m="$2" -v x="$3" 'BEGIN { for (i = 0; i < n; i++) {
        x = (x * 1103 + 12345) % 1048576; printf "\\0%03o", int(x / 64) % m } }'
}

# An MNIST folder: mnist_of DIRECTORY COUNT. Images have 5 x 3 pixels; validation has those of training.
mnist_of() {
    mkdir -p "$work/$1"
    count='\0\0\0'$(printf '\\0%03o' "$2")
    printf '%b' '\0\0\010\03' "$count" '\0\0\0\05\0\0\0\03' "$(bytes $(($2 * 15)) 256 "$2")" \
        >"$work/$1/train-images-idx3-ubyte"
    printf '%b' '\0\0\010\01' "$count" "$(bytes "$2" 10 7)" >"$work/$1/train-labels-idx1-ubyte"
    cp "$work/$1/train-images-idx3-ubyte" "$work/$1/t10k-images-idx3-ubyte"
    cp "$work/$1/train-labels-idx1-ubyte" "$work/$1/t10k-labels-idx1-ubyte"
}

# A CIFAR-10 folder: training files of 20 and 10 records, a validation file of 10: cifar_of DIRECTORY
cifar_of() {
    mkdir -p "$work/$1"
    for file in data_batch_1:20 data_batch_3:10 test_batch:10; do
        i=0
        while [ $i -lt "${file#*:}" ]; do
            printf '%b' "$(printf '\\0%03o' $((i % 10)))" "$(bytes 3072 256 $((i * 31 + ${file#*:})))"
            i=$((i + 1))
        done >"$work/$1/${file%:*}.bin"
    done
    for label in airplane automobile bird cat deer dog frog horse ship truck ''; do echo $label; done \
        >"$work/$1/batches.meta.txt"
}
