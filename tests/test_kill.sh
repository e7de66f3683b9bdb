#!/bin/sh
# kill -9 while checkpoints are written: every visible one must be whole, and training must go on to the same
# end.
#   KILLS=100 tests/test_kill.sh [BUILD]        default: 25
# Two ranks write a checkpoint after each step, so that most of the time is spent on writing; a kill after a
# random time hits the window when it leaves a "*.tmp" or "*.replaced" behind, or a folder that `latest` does
# not name yet.
set -u
. tests/lib.sh

kills=${KILLS:-25}
options='--nproc-per-node 2 --embed-dim 128 --depth 4 --num-heads 4 --limit-train 64 --limit-val 2
    --batch-size 4 --epochs 1000000 --max-steps 1000000 --scheduler constant --warmup-steps 0
    --checkpoint-interval-steps 1 --eval-interval 1000000 --keep-checkpoints 2 --gradient-reduction every --quiet'
run=$work/run
last_step() { basename "$(printf '%s\n' "$run"/checkpoints/step-*[0-9] | tail -1)" | sed 's/step-0*//'; }

hits=0 why=
for i in $(seq "$kills"); do
    strategy=$(echo ddp zero1 zero2 zero3 dp | cut -d ' ' -f $((i % 5 + 1)))
    # shellcheck disable=SC2086
    set -- $options --output-dir "$run" --resume auto --strategy "$strategy"
    before=$(last_step)
    $train "$@" >/dev/null 2>"$work/err" &
    pid=$!
    for _ in $(seq 500); do # until it has written one
        [ "$(last_step)" != "$before" ] && break
        kill -0 $pid 2>/dev/null || break
        sleep 0.01
    done
    sleep "0.0$(awk -v i="$i" 'BEGIN { srand(i); printf "%02d", int(100 * rand()) }')"
    kill -9 $pid 2>/dev/null || why="$why it ended by itself: $(tail -1 "$work/err")"
    wait $pid 2>/dev/null
    newest=$(basename "$(printf '%s\n' "$run"/checkpoints/step-*[0-9] | tail -1)")
    if find "$run" \( -name '*.tmp' -o -name '*.replaced' \) | grep -q . ||
        [ "$(cat "$run/checkpoints/latest")" != "$newest" ]; then
        hits=$((hits + 1))
    fi
    grep -q '^train: warning' "$work/err" && why="$why $(grep '^train: warning' "$work/err" | head -1)"
    for folder in "$run"/checkpoints/step-*[0-9]; do # each is whole: training can begin from it
        step=$(basename "$folder" | sed 's/step-0*//')
        # shellcheck disable=SC2086
        $train $options --output-dir "$work/from" --resume "$folder" --max-steps "$((step + 1))" \
            >/dev/null 2>"$work/err" || why="$why $folder: $(tail -1 "$work/err")"
        rm -rf "$work/from"
    done
    [ -n "$why" ] && break
done
verdict "kill -9 at $kills moments, $hits of them in the write window: all checkpoints whole" "$why"
[ $hits -ge $((kills / 2)) ] || bad "half of the kills hit the window" "$hits of $kills did"

steps=$(($(last_step) + 3))
# shellcheck disable=SC2086
why=$($train $options --output-dir "$run" --resume auto --max-steps $steps 2>&1 >/dev/null &&
    $train $options --output-dir "$work/never" --max-steps $steps --checkpoint-interval-steps 1000000 2>&1 \
        >/dev/null &&
    cmp "$run/checkpoints/$(cat "$run/checkpoints/latest")/model.safetensors" \
        "$work/never/checkpoints/$(cat "$work/never/checkpoints/latest")/model.safetensors" 2>&1)
verdict "after $kills kills, step $steps: the weights of the run that was never killed" "$why"
found=$(find "$run" \( -name '*.tmp' -o -name '*.replaced' \) | head -1)
verdict "nothing half-written is left" "$found"
exit $failed
