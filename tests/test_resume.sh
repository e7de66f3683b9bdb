#!/bin/sh
# Runs that stop and go on: at a step folder, by a signal, under another strategy, on other ranks, from a
# damaged folder. What counts is the run that never stopped: its weights byte for byte, and its lines of
# metrics.jsonl but for times. tests/test_resume.sh [BUILD]. Needs jq.
set -u
. tests/lib.sh

strategies="dp ddp zero1 zero2 zero3"
# 11 steps an epoch of 25 images (accumulated: 5 an epoch), three epochs; a checkpoint at every second step
small='--embed-dim 16 --depth 2 --num-heads 2 --limit-train 275 --limit-val 30 --epochs 3 --drop-path 0.1
    --gradient-clipping 1 --quiet --checkpoint-interval-steps 2 --keep-checkpoints 1000 --eval-interval 2
    --gradient-reduction every'
# shellcheck disable=SC2086
run() { name=$1; shift
    $train $small --output-dir "$work/$name" "$@" >"$work/$name.out" 2>"$work/$name.err" ||
    { echo "status $? of $name: $(grep '^train: error' "$work/$name.err")"; return 1; }; }
step() { printf '%s/%s/checkpoints/step-%08d' "$work" "$1" "$2"; }                    # RUN STEP
latest() { echo "$work/$1/checkpoints/$(cat "$work/$1/checkpoints/latest")"; }
same_weights() { # RUN RUN: and the same optimizer state
    for file in model.safetensors optimizer.safetensors; do
        cmp "$(latest "$1")/$file" "$(latest "$2")/$file" 2>&1
    done
}
lines() { # what must not depend on a stop: no times, one "start"
    jq -c 'select(.event != "start" and .event != "end" and .event != "memory" and .event != "communication")
        | del(.step_time_s, .images_per_s, .seconds, .epoch_time_s, .data_time_s, .communication_time_s,
              .compute_time_s)' "$work/$1/metrics.jsonl"
}
same_lines() { lines "$1" >"$work/a"; lines "$2" >"$work/b"; cmp "$work/a" "$work/b" 2>&1; }
far_losses() { # RUN RUN TOLERANCE
    for r in "$1" "$2"; do
        jq 'select(.event == "step").train_loss' "$work/$r/metrics.jsonl" >"$work/$r.losses"
    done
    paste "$work/$1.losses" "$work/$2.losses" | awk -v most="$3" '
        { d = $1 > $2 ? $1 - $2 : $2 - $1; if (d > largest) largest = d; if (NF != 2) largest = 1e9 }
        END { if (!NR || largest > most) print "losses differ by up to " largest }'
}
copy() { rm -rf "${work:?}/$2"; cp -r "$work/$1" "$work/$2"; } # RUN NEW
# A copy of a run as it was right after a step, as a kill would leave it: stopped RUN STEP NEW
stopped() {
    copy "$1" "$3"
    for folder in "$work/$3"/checkpoints/step-*; do
        [ "$folder" \> "$(step "$3" "$2")" ] && rm -r "$folder"
    done
    basename "$(step "$3" "$2")" | tr -d '\n' >"$work/$3/checkpoints/latest"
}

# -------------------------------------------------------------------- where it stops, and how it goes on

for setting in "1 25 1" "2 5 2" "3 4 2"; do # ranks, batch size, accumulation
    n=${setting%% *} M=${setting##* } B=${setting#* } B=${B% *}
    options="--nproc-per-node $n --batch-size $B --gradient-accumulation-steps $M"
    strategy=zero2
    rm -rf "$work/whole"
    # shellcheck disable=SC2086
    why=$(run whole $options --strategy $strategy)
    last=$(jq -s 'map(select(.event == "end"))[0].steps' "$work/whole/metrics.jsonl")
    for at in 2 6 10 12 22 $((last - 2)); do # in an epoch, at its end (11 and 13 steps), in a later one
        [ -d "$(step whole $at)" ] || continue
        stopped whole $at stopped
        # shellcheck disable=SC2086
        [ -n "$why" ] || why=$(run stopped $options --strategy $strategy --resume auto)
        [ -n "$why" ] || why="$(same_weights whole stopped)$(same_lines whole stopped)"
        [ -z "$why" ] || why="after step $at: $why"
    done
    verdict "resumed = never stopped: $n ranks, accumulation $M" "$(echo "$why" | head -1)"
done

# in lower precision: master weights and the loss scale go into the step folder
for precision in "bf16 fp32" "bf16 bf16" "fp16 fp16" "fp16 fp32"; do
    options="--nproc-per-node 2 --batch-size 5 --gradient-accumulation-steps 2 --precision ${precision% *}"
    options="$options --reduce-dtype ${precision#* }"
    rm -rf "$work/low"
    # shellcheck disable=SC2086
    why=$(run low $options --strategy zero3)
    for at in 2 6; do
        stopped low $at stopped
        # shellcheck disable=SC2086
        [ -n "$why" ] || why=$(run stopped $options --strategy ddp --resume auto)
        [ -n "$why" ] || why="$(same_weights low stopped)$(same_lines low stopped)"
        [ -z "$why" ] || why="after step $at: $why"
    done
    verdict "resumed = never stopped: $precision" "$(echo "$why" | head -1)"
done

options='--nproc-per-node 3 --batch-size 4 --gradient-accumulation-steps 2'
for from in $strategies; do
    rm -rf "$work/from"
    # shellcheck disable=SC2086
    why=$(run from $options --strategy "$from")
    for to in $strategies; do
        stopped from 6 to
        # shellcheck disable=SC2086
        [ -n "$why" ] || why=$(run to $options --strategy "$to" --activation-checkpointing --resume auto)
        [ -n "$why" ] || why="$(same_weights whole to)$(same_lines whole to)"
        [ -z "$why" ] || why="$to: $why"
    done
    verdict "from $from to every strategy, byte for byte" "$(echo "$why" | head -1)"
done

# A chain over strategies and numbers of ranks. The global batch, 24, is kept: 2 x 12, 3 x 8, 2 x 6 x 2, and
# 1 x 6 x 4.
constant='--scheduler constant --warmup-steps 1'
# shellcheck disable=SC2086
why=$(run one --nproc-per-node 2 --batch-size 12 &&
    run reference --nproc-per-node 2 --batch-size 12 $constant &&
    run chain --nproc-per-node 2 --batch-size 12 $constant --max-steps 4)
for link in "zero3 3 8" "zero1 2 15" "single 1 100"; do
    strategy=${link%% *} steps=${link##* } n=${link#* } n=${n% *}
    # shellcheck disable=SC2086
    [ -n "$why" ] || why=$(run chain --nproc-per-node "$n" --strategy "$strategy" --max-steps "$steps" \
        $constant --resume auto)
done
[ -n "$why" ] || why=$(far_losses reference chain 1e-5)
batches=$(jq -s -c 'map(select(.event == "start").global_batch_size)' "$work/chain/metrics.jsonl")
[ -n "$why" ] || [ "$batches" = "[24,24,24,24]" ] || why="the global batch was not kept"
verdict "ddp x 2, zero3 x 3, zero1 x 2, single: losses within 1e-5" "$(echo "$why" | head -1)"

# SGD, a step folder of another run, an explicit folder further back.
sgd='--optimizer sgd --scheduler constant --warmup-steps 1'
# shellcheck disable=SC2086
why=$(run sgd $sgd && stopped sgd 6 sgd2 && run sgd2 $sgd --resume auto && same_weights sgd sgd2)
verdict "SGD's momentum is resumed" "$why"
# shellcheck disable=SC2086
why=$(run other $sgd --resume "$(step sgd 6)" && same_weights sgd other)
[ "$(jq -s 'map(select(.event == "step"))[0].step' "$work/other/metrics.jsonl")" = 7 ] ||
    why="$why: metrics.jsonl does not begin at step 7"
verdict "from the folder of another run into a new one" "$why"
copy sgd back
# shellcheck disable=SC2086
why=$(run unused $sgd --resume "$(step back 4)" --output-dir "$work/back" --max-steps 5)
grep -q 'checkpoints after step 4 removed' "$work/unused.err" || why="$why: nothing is said of later ones"
found=$(cd "$work/back/checkpoints" && echo step-*)
[ "$found" = "step-00000002 step-00000004 step-00000005" ] || why="$why: found $found"
# shellcheck disable=SC2086
why="$why$(run unused $sgd --resume auto --output-dir "$work/back" && same_weights sgd back)"
verdict "from an older folder of the same run" "$why"
copy sgd done
# shellcheck disable=SC2086
why=$(run unused $sgd --resume auto --output-dir "$work/done" && cmp "$work/sgd/metrics.jsonl" \
    "$work/done/metrics.jsonl" && grep -q 'complete, step 12 of 12' "$work/unused.err" || echo "not complete")
verdict "a run that is complete stays as it is" "$why"
why=$(run anew --resume auto --max-steps 1)
grep -q 'found no checkpoint to resume, training begins anew' "$work/anew.err" || why="$why: it is silent"
verdict "auto without a checkpoint begins anew" "$why"

# ------------------------------------------------------------------------------------------------- signals

interrupt() { # NAME SIGNAL OPTIONS: sends the signal after some steps; prints the exit status
    name=$1 signal=$2
    shift 2
    # shellcheck disable=SC2086
    $train $small --checkpoint-interval-steps 100000 --output-dir "$work/$name" "$@" >"$work/$name.out" \
        2>"$work/$name.err" &
    pid=$!
    for _ in $(seq 400); do
        [ "$(grep -c '"event":"step"' "$work/$name/metrics.jsonl" 2>/dev/null)" -gt 3 ] 2>/dev/null && break
        sleep 0.01
    done
    kill -s "$signal" $pid
    wait $pid
    echo $?
}
long='--epochs 200 --scheduler constant --warmup-steps 0'
for signal in INT TERM; do
    # shellcheck disable=SC2086
    status=$(interrupt interrupted $signal $long --nproc-per-node 3 --batch-size 4 --strategy zero3)
    why=
    [ "$status" = 130 ] || why="status $status: $(cat "$work/interrupted.err")"
    at=$(jq -s 'map(select(.event == "step")) | last.step' "$work/interrupted/metrics.jsonl")
    [ "$(latest interrupted)" = "$(step interrupted "$at")" ] || why="$why: no checkpoint of step $at"
    grep -q "interrupted after step $at of .*--resume auto" "$work/interrupted.err" ||
        why="$why: it does not say so"
    grep -q '^train: error' "$work/interrupted.err" && why="$why: it is no error"
    # shellcheck disable=SC2086
    [ -n "$why" ] || { rm -rf "$work/never"
        why=$(run never $long --nproc-per-node 3 --batch-size 4 --strategy zero3 --max-steps $((at + 7)) &&
            run interrupted $long --nproc-per-node 3 --batch-size 4 --strategy zero3 --max-steps $((at + 7)) \
                --resume auto && same_weights never interrupted); }
    verdict "SIG$signal finishes the step and writes a checkpoint, from which it goes on" "$why"
    rm -rf "$work/interrupted"
done
# A second signal ends at once: while a step takes long.
slow='--model vit_base_patch16_224 --dataset synthetic --limit-train 64 --limit-val 1 --batch-size 32
    --threads-per-rank 1 --max-steps 2 --quiet'
# shellcheck disable=SC2086
$train $slow --output-dir "$work/slow" >/dev/null 2>"$work/slow.err" &
pid=$!
for _ in $(seq 600); do [ -e "$work/slow/metrics.jsonl" ] && break; sleep 0.05; done
sleep 0.2
kill -s TERM $pid
sleep 0.1
kill -s TERM $pid
begin=$(date +%s%N)
wait $pid
status=$? took=$(($(date +%s%N) - begin))
why=
[ "$status" = 130 ] && [ "$took" -lt 2000000000 ] || why="status $status after $took ns"
verdict "a second signal ends at once" "$why"

# --------------------------------------------------------------------------------------------- bad folders

fails() { # NAME PATTERN OPTIONS
    name=$1 pattern=$2
    shift 2
    # shellcheck disable=SC2086
    $train $small "$@" >"$work/bad.out" 2>"$work/bad.err"
    status=$? why=
    [ $status -eq 1 ] || why="status $status"
    [ "$(grep -c '^train: error: ' "$work/bad.err")" = 1 ] &&
        grep -E -q "^train: error: .*$pattern" "$work/bad.err" ||
        why="$why: expected $pattern, found $(tail -1 "$work/bad.err")"
    verdict "$name" "$why"
}
fails "a model of another width" \
    "model.safetensors: tensor patch_embed.proj.weight: found shape \[16, .*expected shape \[24" \
    --resume auto --output-dir "$work/one" --embed-dim 24 --nproc-per-node 2
fails "a model of another depth" "tensor blocks.2.attn.qkv.weight: found none" \
    --resume auto --output-dir "$work/one" --depth 3 --nproc-per-node 2
fails "a model with other heads" "num_heads: found 2, expected 4" \
    --resume auto --output-dir "$work/one" --num-heads 4 --nproc-per-node 2
fails "a model with another GELU" "act_layer: found gelu, expected gelu_tanh" \
    --resume auto --output-dir "$work/one" --gelu tanh --nproc-per-node 2
fails "another seed" "trainer_state.json: found seed 0, asked for is 1: .*--seed" \
    --resume auto --output-dir "$work/one" --seed 1 --nproc-per-node 2
fails "a global batch that the ranks do not divide" \
    "global batch of 24 \(micro-batch 12\) cannot be kept on 5 ranks" \
    --resume auto --output-dir "$work/one" --nproc-per-node 5
fails "more ranks than samples in a batch" \
    "global batch of 24 \(micro-batch 12\) cannot be kept on 25 ranks" \
    --resume auto --output-dir "$work/one" --nproc-per-node 25
fails "an output directory that holds a run" "already holds a run; .*--resume auto" --output-dir "$work/one"
fails "no step folder" "none: found no model.safetensors, expected a step folder" --resume "$work/none"
copy one empty && rm -r "$work/empty/checkpoints"
sed -i 's/"embed-dim":.*/"embed-dim": 20,/' "$work/empty/config.json"
fails "an output directory of another configuration" "config.json: found embed-dim 20, asked for is 16" \
    --resume auto --output-dir "$work/empty" --nproc-per-node 2
copy one short && truncate -s 100 "$work/short/metrics.jsonl"
fails "metrics.jsonl is too short" \
    "metrics.jsonl: found 100 bytes, expected the [0-9]* that the checkpoint tells of" \
    --resume "$(step short 10)" --nproc-per-node 2

stopped one 12 damaged
flip() { # FILE OFFSET: another byte
    old=$(od -An -tu1 -j "$2" -N 1 "$1" | tr -d ' ')
    printf '%b' "\\0$(printf %o $((255 - old)))" | dd of="$1" bs=1 seek="$2" conv=notrunc 2>/dev/null
}
size=$(wc -c <"$(step damaged 12)/model.safetensors")
flip "$(step damaged 12)/model.safetensors" $((size / 2))
half=$(($(wc -c <"$(step damaged 11)/optimizer.safetensors") / 2))
truncate -s $half "$(step damaged 11)/optimizer.safetensors"
why=$(run damaged --nproc-per-node 2 --batch-size 12 --resume auto && same_weights one damaged)
grep -E -q 'warning: .*12/model.safetensors: tensor .blocks.*checksum .*damaged' "$work/damaged.err" ||
    why="$why: $(head -1 "$work/damaged.err")"
grep -E -q 'warning: .*11/optimizer.safetensors: found a file of [0-9]* bytes, expected .*tensor .exp_avg' \
    "$work/damaged.err" || why="$why: $(sed -n 2p "$work/damaged.err")"
verdict "auto passes over damaged and half-copied folders, and names them" "$why"
stopped one 12 damaged
flip "$(step damaged 12)/optimizer.safetensors" $((size / 2))
fails "a damaged folder by name" "step-00000012/optimizer.safetensors: tensor .exp_avg.*damaged" \
    --resume "$(step damaged 12)" --nproc-per-node 2
exit $failed
