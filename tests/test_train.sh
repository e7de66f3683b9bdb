#!/bin/sh
# The program as its users run it: what it writes, computes and reproduces. tests/test_train.sh [BUILD]
# Prints "ok", "not ok" or "skip" before the name of each case. Needs jq; for real data mnist/ and
# cifar-10-batches-bin/ under DATA_DIR; for sanitizers BUILD/asan/train and BUILD/tsan/train.
set -u
. tests/lib.sh

# A run that must succeed: run NAME OPTIONS. It writes to $work/NAME; its stdout and stderr lie beside it.
# small_run: the same with a small model and few images.
run() {
    directory=$work/$1
    shift
    "$train" --output-dir "$directory" "$@" >"$directory.out" 2>"$directory.err" && return
    echo "status $? of train $*: $(tail -1 "$directory.err")"
    return 1
}
small='--embed-dim 16 --depth 2 --num-heads 2 --limit-train 100 --limit-val 50 --quiet'
# shellcheck disable=SC2086
small_run() { small_name=$1; shift; run "$small_name" $small "$@"; }

# What can be asked of a run by its name.
metrics() { jq "$2" "$work/$1/metrics.jsonl"; }                  # NAME FILTER-OF-ONE-LINE
all_metrics() { jq -s "$2" "$work/$1/metrics.jsonl"; }           # NAME FILTER-OF-ALL-LINES
option() { jq -c ".options[\"$2\"]" "$work/$1/config.json"; }    # NAME OPTION
latest() { echo "$work/$1/checkpoints/$(cat "$work/$1/checkpoints/latest")"; }
losses() { metrics "$1" 'select(.event == "step").train_loss'; }
numbers() { # without times: the same text for the same run
    metrics "$1" 'select(.event == "step" or .event == "eval") | del(.step_time_s, .images_per_s)'
}
same_weights() { cmp "$(latest "$1")/model.safetensors" "$(latest "$2")/model.safetensors" 2>&1; }
same_numbers() { [ "$(numbers "$1")" = "$(numbers "$2")" ] || echo "the numbers of $1 and $2 differ"; }
# The largest difference between the losses of two runs, where it is above the tolerance.
far_losses() {
    losses "$1" >"$work/a"
    losses "$2" >"$work/b"
    paste "$work/a" "$work/b" | awk -v most="$3" '
        { d = $1 > $2 ? $1 - $2 : $2 - $1; if (d > largest) largest = d; if (NF != 2) largest = 1e9 }
        END { if (!NR || largest > most) print "losses differ by up to " largest }'
}

# -------------------------------------------------------------------------------------------- metrics.jsonl

# What tests/metrics.jq finds wrong in a run: consistent NAME TRAINING-IMAGES VALIDATION-IMAGES [CHANNELS]
consistent() {
    jq -r -s --slurpfile config "$work/$1/config.json" --argjson images "$2" --argjson val "$3" \
        --argjson channels "${4:-1}" -f tests/metrics.jq "$work/$1/metrics.jsonl" 2>&1 | head -3
}
epoch_losses='[.[] | select(.event == "epoch").train_loss]'

for world in "single 1" "dp 2" "ddp 2" "dp 3" "ddp 3" "zero1 2" "zero2 3" "zero3 2" "zero3 3"; do
    n=${world#* }
    why=$(run "learn $world" --embed-dim 32 --depth 2 --num-heads 2 --limit-train 403 --limit-val 57 \
        --batch-size $((24 / n)) --epochs 7 --learning-rate 5e-3 --min-learning-rate 1e-4 \
        --strategy "${world% *}" --nproc-per-node "$n") && why=$(consistent "learn $world" 403 57)
    [ "$(all_metrics "learn $world" "$epoch_losses | .[-1] < 0.85 * .[0]")" = true ] ||
        why="$why: the loss did not fall"
    verdict "digits learn: ${world% *}, $n ranks" "$why"
done

for precision in bf16 fp16; do # an overflow of the first steps has no norm
    why=$(run "learn $precision" --embed-dim 32 --depth 2 --num-heads 2 --limit-train 403 --limit-val 57 \
        --batch-size 12 --epochs 2 --precision $precision --strategy zero1 --nproc-per-node 2) &&
        why=$(consistent "learn $precision" 403 57)
    verdict "lines of a run in $precision" "$why"
done

case_of() { # NAME RUN OPTIONS: a small run with consistent lines
    name=$1 of_run=$2
    shift 2
    why=$(small_run "$of_run" "$@") && why=$(consistent "$of_run" 100 50)
    verdict "$name" "$why"
}
case_of "scheduler linear, warm-up, minimum" linear \
    --scheduler linear --warmup-steps 5 --min-learning-rate 1e-5 --batch-size 8 --epochs 2
case_of "scheduler constant with warm-up" constant \
    --scheduler constant --warmup-steps 3 --batch-size 8 --epochs 1
case_of "warm-up longer than the run" warmup --warmup-steps 100 --batch-size 16 --epochs 2
case_of "cosine without warm-up" cosine --warmup-steps 0 --batch-size 5 --epochs 1 --min-learning-rate 1e-4
case_of "accumulation, 3 ranks, an incomplete global batch dropped" accumulate \
    --nproc-per-node 3 --batch-size 5 --gradient-accumulation-steps 2 --epochs 2
case_of "ddp, every micro-batch reduced" every --nproc-per-node 3 --batch-size 5 \
    --gradient-accumulation-steps 2 --epochs 2 --gradient-reduction every --bucket-size-mb 0.01
case_of "dp, every micro-batch reduced" every-dp --strategy dp --nproc-per-node 2 --batch-size 4 \
    --gradient-accumulation-steps 3 --epochs 1 --eval-interval 2 --gradient-reduction every
case_of "zero1, every micro-batch reduced" every-zero1 --strategy zero1 --nproc-per-node 3 --batch-size 5 \
    --gradient-accumulation-steps 2 --epochs 2 --gradient-reduction every
case_of "zero2, the whole gradient kept" last-zero2 --strategy zero2 --nproc-per-node 2 --batch-size 4 \
    --gradient-accumulation-steps 3 --epochs 1 --gradient-reduction last
case_of "zero3, SGD, prefetching, activation checkpointing" zero3 --strategy zero3 --nproc-per-node 3 \
    --batch-size 5 --gradient-accumulation-steps 2 --epochs 1 --prefetch 2 --activation-checkpointing \
    --optimizer sgd
case_of "intervals of lines, evaluations and checkpoints" intervals --batch-size 16 --epochs 7 \
    --log-interval 5 --eval-interval 2 --checkpoint-interval 3 --checkpoint-interval-steps 4 \
    --keep-checkpoints 2
case_of "a checkpoint at every second step" often \
    --batch-size 25 --epochs 2 --checkpoint-interval-steps 2 --checkpoint-interval 9
case_of "sgd with momentum and clipping" sgd --optimizer sgd --momentum 0.8 --learning-rate 0.05 \
    --batch-size 20 --epochs 2 --gradient-clipping 0.1 --nproc-per-node 2
case_of "--max-steps in the middle of an epoch" middle \
    --batch-size 16 --max-steps 9 --nproc-per-node 2 --epochs 5
case_of "--max-steps alone decides on the epochs" alone --batch-size 30 --max-steps 7
[ "$(option alone epochs)" = 3 ] || bad "--max-steps alone decides on the epochs" "$(option alone epochs)"

# 42 steps, evaluations after 12, 24, 36 and 42, checkpoints after 4, 8, ... and 18, 36, 42; two are kept.
kept_checkpoints() {
    folder=$work/intervals/checkpoints
    last=$(cat "$folder/latest") best=$(cat "$folder/best")
    [ "$last" = step-00000042 ] || echo "latest is $last"
    most=$(all_metrics intervals '[.[] | select(.event == "eval" and .val_accuracy > 0)]
        | max_by([.val_accuracy, -.step]).step')
    [ "$best" = "$(printf 'step-%08d' "$most")" ] || echo "best is $best, expected step $most"
    [ -f "$folder/$last/model.safetensors" ] || echo "the latest is missing"
    [ -f "$folder/$best/model.safetensors" ] || echo "the best is missing"
    [ "$(find "$folder" -name 'step-*' | wc -l)" -eq 2 ] || echo "found $(cd "$folder" && echo step-*)"
    find "$folder" -name '*.tmp'
}
verdict "best and latest are kept" "$(kept_checkpoints | head -1)"
# All evaluations give the same, and of the checkpoints only the last was evaluated: that is the best one.
why=$(small_run evaluated --learning-rate 0 --batch-size 16 --epochs 2 --checkpoint-interval 9 \
    --checkpoint-interval-steps 5) && why=$(consistent evaluated 100 50)
best=$(cat "$work/evaluated/checkpoints/best")
[ "$best" = step-00000012 ] || why="$why: best is $best"
verdict "the best checkpoint is one that was evaluated" "$why"

# ----------------------------------------------------------------------------------------------------- bits

# The same ranks and reduction: every strategy, bucket size and number of threads ends in the same bits.
bits() { # RANKS ACCUMULATION REDUCTION; the runs are called bits-N-M-R-1, -2, ...
    i=0 first="bits-$1-$2-$3-1"
    for variant in "ddp 25 1" "ddp 0.001 1" "ddp 0.02 1" "ddp 25 2" "dp 25 1" "dp 25 2"; do
        i=$((i + 1)) threads=${variant##* } strategy=${variant%% *} bucket=${variant#* }
        small_run "bits-$1-$2-$3-$i" --matmul own --nproc-per-node "$1" --gradient-accumulation-steps "$2" \
            --gradient-reduction "$3" --batch-size 4 --max-steps 4 --drop-path 0.3 --label-smoothing 0.1 \
            --gradient-clipping 1 --strategy "$strategy" --bucket-size-mb "${bucket% *}" \
            --threads-per-rank "$threads" || return
        same_weights "$first" "bits-$1-$2-$3-$i" | sed "s/^/$variant: /"
        same_numbers "$first" "bits-$1-$2-$3-$i" | sed "s/^/$variant: /"
    done
}
for n in 2 3; do
    for m in 1 3; do
        for reduction in last every; do
            verdict "same bits: $n ranks, accumulation $m, reduction $reduction" \
                "$(bits $n $m $reduction | head -1)"
        done
        why=$(run "single-$n-$m" --config "$work/bits-$n-$m-last-1/config.json" --strategy single \
            --nproc-per-node 1 --batch-size $((4 * n))) &&
            why=$(for r in last every; do far_losses "single-$n-$m" "bits-$n-$m-$r-1" 1e-5; done)
        verdict "one rank with the same global batch: $n ranks, accumulation $m" "$why"
    done
done

why=$(small_run seed0 --max-steps 3 && small_run seed1 --max-steps 3 --seed 1)
[ -n "$(far_losses seed0 seed1 1e-3)" ] || why="$why: the losses are the same"
verdict "another seed is another run" "$why"

# config.json is enough to run it again, elsewhere.
again() { # NAME RUN OPTIONS
    name="--config of an output directory: $1" of_run=$2
    shift 2
    why=$(run "$of_run" "$@" && run "$of_run-again" --config "$work/$of_run/config.json") &&
        why=$(same_weights "$of_run" "$of_run-again"; same_numbers "$of_run" "$of_run-again")
    for again in "$of_run" "$of_run-again"; do
        jq '.options | del(.["output-dir", "config"])' "$work/$again/config.json" >"$work/$again.options"
    done
    cmp -s "$work/$of_run.options" "$work/$of_run-again.options" || why="$why: the options differ"
    verdict "$name" "$why"
}
# shellcheck disable=SC2086
{
    again "digits, 2 ranks" config $small --nproc-per-node 2 --max-steps 4 --drop-path 0.1 \
        --gradient-clipping 0.5
    again "sgd, dp, no shuffling" config-sgd $small --optimizer sgd --learning-rate 0.01 --strategy dp \
        --no-shuffle --nproc-per-node 3 --batch-size 3 --gradient-accumulation-steps 2 \
        --gradient-reduction every --epochs 2
    again "synthetic, a rectangle" config-synthetic --dataset synthetic --image-size 6x8 --patch-size 2 \
        --embed-dim 16 --depth 1 --num-heads 1 --num-classes 3 --limit-train 40 --limit-val 10 \
        --batch-size 8 --quiet --seed 5
    again "a pretrained model" config-pretrained $small --pretrained "$work/config" --max-steps 2
}
why=$(run override --config "$work/config/config.json" --max-steps 2 --strategy dp)
found="$(option override max-steps) $(option override strategy) $(option override drop-path)"
[ "$found" = '2 "dp" 0.1' ] || why="$why: found $found"
verdict "the command line wins over --config" "$why"
echo '{"embed-dim": 16, "depth": 1, "image-size": "8x8", "mean": [0.5], "quiet": true, "max-steps": 1}' \
    >"$work/flat.json"
why=$(run flat --config="$work/flat.json" --batch-size=32)
found="$(option flat embed-dim) $(option flat mean) $(option flat batch-size)"
[ "$found" = '16 [0.5] 32' ] || why="$why: found $found"
verdict "--config of a flat object" "$why"

# ----------------------------------------------------------------------------------------------------- data

# With learning rate 0 a step's loss is that of its images. Step i of a run with batch size 1 reads image i;
# the evaluation of the first images says which loss that is; a global batch is the next N x M x B images.
mnist_of order 24
still="--data-path $work/order --patch-size 2 --embed-dim 16 --depth 1 --num-heads 2 --learning-rate 0
    --weight-decay 0 --quiet --matmul own"
in_order() {
    # shellcheck disable=SC2086
    run one $still --no-shuffle --augmentation none --batch-size 1 --epochs 2 &&
        run many --config "$work/one/config.json" --epochs 1 --nproc-per-node 2 --batch-size 2 \
            --gradient-accumulation-steps 3 --strategy ddp || return
    losses one | head -24 >"$work/one.losses"
    losses one | tail -24 | cmp -s - "$work/one.losses" || echo "the second epoch has another order"
    for k in 1 2 5 24; do
        $train eval --checkpoint "$work/one" --data-path "$work/order" --limit-val $k --batch-size 3 2>&1 |
            jq -r --slurpfile one "$work/one.losses" '.val_loss - ($one[:.images] | add / length)
                | select(fabs > 1e-6) | "evaluation differs by \(.)"'
    done
    losses many | jq -r -s --slurpfile one "$work/one.losses" '
        [., [$one[0:12], $one[12:24] | add / 12]] | transpose[]
        | select(.[0] - .[1] | fabs > 1e-6) | "global batch: loss \(.[0]), expected \(.[1])"'
}
verdict "without shuffling images come in their own order" "$(in_order | head -1)"

shuffled() { # the same losses in another order, and in another again in the next epoch
    # shellcheck disable=SC2086
    run shuffled $still --batch-size 1 --epochs 2 || return
    sort "$work/one.losses" >"$work/sorted"
    for part in head tail; do
        losses shuffled | $part -24 >"$work/$part"
        cmp -s "$work/$part" "$work/one.losses" && echo "the images are in their own order"
        sort "$work/$part" | cmp -s - "$work/sorted" || echo "an epoch has other images"
    done
    cmp -s "$work/head" "$work/tail" && echo "two epochs have one order"
}
verdict "shuffling visits every image once an epoch" "$(shuffled | head -1)"

why=$(cp -r "$work/order" "$work/zipped" && gzip "$work"/zipped/* &&
    run plain --data-path "$work/order" --embed-dim 16 --patch-size 1 --batch-size 8 --epochs 1 --quiet &&
    run gzip --config "$work/plain/config.json" --data-path "$work/zipped" && same_weights plain gzip)
verdict "MNIST in gzip is MNIST" "$why"

cifar_of cifar
why=$(run cifar-run --data-path "$work/cifar" --embed-dim 16 --num-heads 2 --depth 1 --patch-size 8 \
    --batch-size 5 --nproc-per-node 2 --epochs 2 --quiet) && why=$(consistent cifar-run 30 10 3)
found=$(jq -c '.pretrained_cfg | [.label_names[9], .input_size]' "$(latest cifar-run)/config.json")
[ "$found" = '["truck",[3,32,32]]' ] || why="$why: found $found"
verdict "CIFAR-10 files of any number of records, with label names" "$why"
why=$(run cifar-plain --config "$work/cifar-run/config.json" --augmentation none)
[ -n "$(far_losses cifar-run cifar-plain 1e-4)" ] || why="$why: the losses are the same"
verdict "CIFAR-10 is augmented unless told otherwise" "$why"

shapes() { # IMAGE PATCH OPTIONS
    name="images of $1 in patches of $2" of_run=shape-$1 image=$1 patch=$2
    shift 2
    why=$(run "$of_run" --dataset synthetic --image-size "$image" --patch-size "$patch" --limit-train 60 \
        --limit-val 31 --batch-size 4 --epochs 1 --quiet --matmul own "$@")
    found=$($train eval --checkpoint "$work/$of_run" --dataset synthetic --limit-val 31 --matmul own 2>&1 |
        jq .val_loss)
    [ "$found" = "$(metrics "$of_run" 'select(.event == "eval").val_loss')" ] || why="$why: eval found $found"
    verdict "$name" "$why"
}
shapes 7x9 2 --embed-dim 21 --num-heads 3 --depth 1 --mlp-ratio 2.3 --num-classes 7 --nproc-per-node 3
shapes 33x17 5 --embed-dim 10 --num-heads 1 --depth 2 --num-classes 2 --strategy dp --nproc-per-node 2
shapes 1 1 --embed-dim 3 --num-heads 3 --depth 1 --mlp-ratio 0.4 --num-classes 1

why=$(run synthetic --dataset synthetic --image-size 8 --embed-dim 32 --depth 2 --num-heads 2 --epochs 4 \
    --limit-train 320 --limit-val 100 --batch-size 16 --quiet) && why=$(consistent synthetic 320 100 3)
[ "$(all_metrics synthetic '.[-1].best_val_accuracy > 0.5')" = true ] || why="$why: nothing was learnt"
verdict "synthetic images can be learnt" "$why"

# ------------------------------------------------------------------------------------ options have an effect

effects() {
    small_run plain-steps --max-steps 3 --matmul own
    for option in "drop-path 0.5" "label-smoothing 0.3" "gradient-clipping 0.01" "weight-decay 0.9" \
        "beta1 0.5" "beta2 0.9" "eps 0.1" "optimizer sgd" "layer-norm-eps 0.1" "mean 0" "std 2" \
        "mlp-ratio 2" "gelu tanh"; do
        small_run "plain-${option% *}" --max-steps 3 --matmul own "--${option% *}" "${option#* }"
        [ -n "$(same_weights plain-steps "plain-${option% *}")" ] || echo "--$option changes nothing"
    done
    for option in gradient-clipping weight-decay; do
        [ "$(numbers plain-steps | head -6)" = "$(numbers plain-$option | head -6)" ] ||
            echo "--$option changes loss or norm of the first step"
    done
}
verdict "regularisation and optimizer options have an effect" "$(effects | head -1)"

# ----------------------------------------------------------------------------------------------------- eval

scores_of() { metrics config "select(.event == \"eval\" and .step == $1) | del(.event, .step, .epoch)"; }
evaluated() { $train eval --limit-val 50 --matmul own "$@" 2>"$work/eval.err" | jq 'del(.step, .epoch)'; }
evaluates() {
    step=$(latest config) best=$(sed 's/step-0*//' "$work/config/checkpoints/best")
    $train eval --checkpoint "$step" --limit-val 50 | jq 'keys_unsorted' >"$work/a"
    all_metrics config 'map(select(.event == "eval"))[0] | keys_unsorted - ["event"]' | cmp -s - "$work/a" ||
        echo "found other keys: $(tr '\n' ' ' <"$work/a")"
    [ "$(evaluated --checkpoint "$step")" = "$(scores_of 4)" ] || echo "a step folder gives others"
    [ "$(evaluated --checkpoint "$work/config")" = "$(scores_of "$best")" ] ||
        echo "the output directory does not give its best"
    for n in 1 2 3; do
        scores=$(evaluated --checkpoint "$step/model.safetensors" --num-heads 2 --image-size 8 \
            --mean "$(option config mean | tr -d '[]')" --std "$(option config std | tr -d '[]')" \
            --nproc-per-node $n --batch-size 7)
        [ "$scores" = "$(scores_of 4)" ] || echo "the bare file on $n ranks gives $scores"
    done
    [ -s "$work/eval.err" ] && echo "stderr: $(head -1 "$work/eval.err")"
    find "$work/config" -newer "$work/before"
}
touch "$work/before"
verdict "eval of a step folder, an output directory, a bare file" "$(evaluates | head -1)"

# 16 x 16 images of 3 channels in 5 classes, normalised as the model says, or as the options say.
timm() {
    timm_loss() { # FILE-OF-THE-FOLDER OPTIONS
        checkpoint=tests/golden/timm_tiny$1
        shift
        $train eval --dataset synthetic --limit-val 20 --checkpoint "$checkpoint" "$@" 2>&1 |
            jq 'select(.images == 20 and .val_top5_accuracy == 1).val_loss'
    }
    own=$(timm_loss '') half=$(timm_loss '' --mean 0.5 --std 0.5)
    [ "$own" = "$(timm_loss '' --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225)" ] ||
        echo "its own normalisation was not taken"
    [ "$half" != "$own" ] || echo "--mean and --std have no effect"
    [ "$half" = "$(timm_loss /model.safetensors --num-heads 2)" ] || echo "a bare file: not 0.5 and 0.5"
}
verdict "eval of a model that timm saved" "$(timm | head -1)"

pretrained() {
    best=$work/config/checkpoints/$(cat "$work/config/checkpoints/best")
    for world in "single 1" "dp 2" "ddp 3"; do
        small_run "same-${world% *}" --pretrained "$work/config" --learning-rate 0 --weight-decay 0 \
            --max-steps 1 --strategy "${world% *}" --nproc-per-node "${world#* }"
        cmp "$best/model.safetensors" "$(latest "same-${world% *}")/model.safetensors" 2>&1
    done
}
verdict "--pretrained with learning rate 0 gives the weights bit for bit" "$(pretrained | head -1)"
why=$(small_run eps --layer-norm-eps 1e-3 --max-steps 1 &&
    small_run eps-kept --pretrained "$work/eps" --max-steps 1)
[ "$(jq .layer_norm_eps "$(latest eps-kept)/config.json")" = 0.001 ] || why="$why: it was lost"
verdict "a pretrained model keeps its LayerNorm eps" "$why"

# A model with GELU by tanh: its form goes where its weights go, unless --gelu says otherwise.
gelu() {
    small_run tanh --gelu tanh --max-steps 1
    [ "$(option tanh gelu)" = '"tanh"' ] || echo "config.json does not have it"
    $train eval --checkpoint "$work/tanh" --limit-val 50 >"$work/a"
    $train eval --checkpoint "$work/tanh" --gelu erf --limit-val 50 | cmp -s - "$work/a" &&
        echo "--gelu erf has no effect on it"
    for format in timm hf; do
        $train export --checkpoint "$work/tanh" --format $format --output-dir "$work/tanh-$format" >"$work/b"
        $train eval --checkpoint "$work/tanh-$format" --limit-val 50 --quiet | cmp - "$work/a" 2>&1
    done
    small_run tanh-kept --pretrained "$work/tanh-hf" --max-steps 1
    small_run tanh-erf --pretrained "$work/tanh-hf" --gelu erf --max-steps 1
    found=$(jq -c .model_args.act_layer "$(latest tanh)/config.json" "$(latest tanh-kept)/config.json" \
        "$(latest tanh-erf)/config.json" "$work/tanh-timm/config.json" | tr '\n' ' ')
    [ "$found" = '"gelu_tanh" "gelu_tanh" null "gelu_tanh" ' ] || echo "found act_layer $found"
    found=$(jq -c .hidden_act "$work/tanh-hf/config.json")
    [ "$found" = '"gelu_pytorch_tanh"' ] || echo "found hidden_act $found"
}
verdict "checkpoints, exports and pretrained models keep the form of GELU" "$(gelu | head -1)"

# Another image size, other classes: adapted, said once whatever the ranks, and not with --quiet.
adapted() {
    for n in 1 3; do
        run "adapted-$n" --pretrained tests/golden/timm_tiny --image-size 8 --limit-train 30 --limit-val 9 \
            --batch-size 2 --max-steps 1 --nproc-per-node $n
        found=$(grep -c '^pretrained ' "$work/adapted-$n.err")
        [ "$found" = 1 ] || echo "$n ranks: found $found lines"
        grep '^pretrained ' "$work/adapted-$n.err" | grep -F -x -v "pretrained tests/golden/timm_tiny: \
new head of 10 classes (file: 5); positions resampled from 2x2 to 1x1"
    done
    found=$(jq -c '[.num_classes, .model_args.img_size, .pretrained_cfg.label_names[9]]' \
        "$(latest adapted-1)/config.json")
    [ "$found" = '[10,[8,8],"9"]' ] || echo "the checkpoint is of $found"
    run adapted-quiet --pretrained tests/golden/timm_tiny --image-size 8 --max-steps 1 --limit-val 9 --quiet
    cat "$work/adapted-quiet.err"
}
verdict "a pretrained model gets another head and other positions" "$(adapted | head -1)"
# The weights of a new head depend on the seed; those of the old one do not.
new_head() { # RUN SEED
    run "$1" --pretrained tests/golden/pretrained/hf_base --dataset synthetic --learning-rate 0 \
        --weight-decay 0 --max-steps 1 --limit-val 9 --quiet --num-classes 4 --seed "$2"
}
heads() {
    new_head head-1 1; new_head head-again 1; new_head head-2 2
    same_weights head-1 head-again
    [ -n "$(same_weights head-1 head-2)" ] || echo "the seed has no effect"
}
verdict "a new head is drawn by the seed" "$(heads | head -1)"

exports() {
    $train eval --checkpoint "$work/config" --limit-val 50 >"$work/a"
    for format in timm hf; do
        to=$work/export/$format
        $train export --checkpoint "$work/config" --format $format --output-dir "$to" 2>&1 |
            grep -v "^results: $to\$"
        $train eval --checkpoint "$to" --limit-val 50 --quiet 2>&1 | cmp - "$work/a"
        small_run "from-$format" --pretrained "$to" --max-steps 1
    done
    cmp "$work/export/timm/model.safetensors" \
        "$work/config/checkpoints/$(cat "$work/config/checkpoints/best")/model.safetensors"
    same_weights from-timm from-hf
    found=$(cd "$work/export" && echo *)
    [ "$found" = "hf timm" ] || echo "found $found"
}
verdict "an exported model evaluates and trains as the checkpoint does" "$(exports | head -1)"

# --------------------------------------------------------------------------------------------- help and env

helps() {
    for topic in "" train eval predict compare export simulate plan env help model; do
        # shellcheck disable=SC2086
        $train help $topic >"$work/help" 2>"$work/err" || echo "help $topic: status $?"
        [ -s "$work/err" ] && echo "help $topic: stderr is not empty"
        [ "$(wc -l <"$work/help")" -ge 3 ] || echo "help $topic: found $(wc -l <"$work/help") lines"
        awk -v topic="$topic" 'length > 110 { print "help " topic ": over 110 columns: " $0 }' "$work/help"
    done
    $train help >"$work/help"
    $train --help | cmp - "$work/help"
    $train -h | cmp - "$work/help"
    for option in $(jq -r '.options | keys[]' "$work/config/config.json"); do
        grep -q -e "--$option \|--\[no-\]$option\( \|\[\)" "$work/help" || echo "help lacks --$option"
    done
    $train help model | awk 'NR > 1 { print $1, $2, $3, $4, $5, $6, $7 }' | sort >"$work/models"
    jq -r '.models[] | [.name, .image_size, .patch_size, .embed_dim, .depth, .num_heads, .parameters]
        | map(tostring) | join(" ")' tests/golden/parameters.json | sort | cmp - "$work/models"
}
verdict "help of everything; the models as timm has them" "$(helps 2>&1 | head -1)"

environment() {
    $train env >"$work/env" 2>"$work/err" || echo "status $?"
    grep -q '^cores  *[1-9]' "$work/env" || echo "no cores"
    grep -q '^matrix product  *[a-zA-Z]' "$work/env" || echo "no matrix product"
    for n in 2 3; do
        $train env --nproc-per-node $n >"$work/env" 2>>"$work/err" || echo "status $? on $n ranks"
        # bytes, microseconds, algorithm and bus bandwidth = algorithm x 2 (n - 1) / n, rounded to 0.01
        sed '1,/^all-reduce over/d' "$work/env" | awk -v n=$n '
            NR == 1 { next }
            { off = $4 - $3 * 2 * (n - 1) / n; rows++ }
            $1 < 1024 || $2 <= 0 || off > 0.02 || off < -0.02 { print n " ranks: " $0 }
            END { if (rows < 4) print n " ranks: found " rows + 0 " rows" }'
    done
    [ -s "$work/err" ] && echo "stderr is not empty"
}
verdict "env, alone and with an all-reduce" "$(environment 2>&1 | head -1)"

# ------------------------------------------------------------------------------------------- stdout, stderr

streams() {
    run loud --embed-dim 16 --depth 1 --limit-train 64 --limit-val 10 --batch-size 16 --epochs 2 \
        --nproc-per-node 2 && run quiet --config "$work/loud/config.json" --quiet
    [ "$(wc -l <"$work/loud.out")" -eq 2 ] || echo "stdout: found $(wc -l <"$work/loud.out") lines"
    grep -q '^validation accuracy 0\.[0-9]* (best 0\.[0-9]*) after 4 steps' "$work/loud.out" ||
        echo "stdout: no result"
    grep -q 'global batch 32 = 16 batch size x 1 accumulation x 2 ranks' "$work/loud.err" ||
        echo "stderr: no global batch"
    progress='^epoch [12]/2  step [24]/4  loss .* images/s  data wait .* time left'
    [ "$(grep -c "$progress" "$work/loud.err")" -eq 2 ] || echo "stderr: not one line of progress an epoch"
    tr -d '\n' <"$work/loud.err" | LC_ALL=C grep -q '[[:cntrl:]]' && echo "stderr: found control characters"
    [ -s "$work/quiet.err" ] && echo "--quiet: $(head -1 "$work/quiet.err")"
    sed '$d; s/, [0-9.]* s$//' "$work/loud.out" >"$work/a"
    sed '$d; s/, [0-9.]* s$//' "$work/quiet.out" | cmp - "$work/a" || echo "--quiet changes stdout"
}
verdict "results go to stdout, progress to stderr, nothing with --quiet" "$(streams 2>&1 | head -1)"

program=$(cd "$(dirname "$train")" && pwd)/$(basename "$train")
why=$(cd "$work" && "$program" --embed-dim 16 --max-steps 1 --limit-val 5 --quiet >named.out || echo "failed")
found=$(cd "$work" && echo runs/*)
echo "$found" | grep -q '^runs/[0-9]\{8\}-[0-9]\{6\}-vit_tiny_patch16_224-single$' || why="$why: found $found"
verdict "the default output directory tells time, model and strategy" "$why"

# ------------------------------------------------------------------------------------------------ real data

real() { # NAME FOLDER CHANNELS TRAINING-IMAGES VALIDATION-IMAGES
    [ -n "${DATA_DIR:-}" ] || { skip "$1" "DATA_DIR is not set"; return; }
    [ -d "$DATA_DIR/$2" ] || { skip "$1" "$DATA_DIR/$2 is missing"; return; }
    why=$(run "$2" --data-path "$DATA_DIR/$2" --limit-train "$4" --limit-val "$5" --nproc-per-node 2 \
        --epochs 2 --quiet) && why=$(consistent "$2" "$4" "$5" "$3")
    [ "$(all_metrics "$2" "$epoch_losses | .[1] < .[0] and .[1] < 2.3")" = true ] ||
        why="$why: the loss did not fall"
    verdict "$1" "$why"
}
real "MNIST, 2000 images, gzip" mnist 1 2000 500
real "CIFAR-10, 1500 images" cifar-10-batches-bin 3 1500 300

# The process holds little beside what the ledger counts: 15 % and 50 MB.
why=$(run resident --strategy zero3 --nproc-per-node 2 --model vit_tiny_patch16_224 --dataset synthetic \
    --limit-train 16 --limit-val 8 --batch-size 4 --max-steps 2 --quiet)
[ "$(all_metrics resident '(map(select(.event == "memory").total_peak_bytes) | add) as $ledger
    | .[-1].resident_peak_bytes | . > 0.9 * $ledger and . <= 1.15 * $ledger + 50e6')" = true ] ||
    why="$why: $(all_metrics resident '.[-1].resident_peak_bytes') bytes resident"
verdict "resident memory of zero3, 2 ranks, against the ledger" "$why"

# ----------------------------------------------------------------------------------------------- sanitizers

export TSAN_OPTIONS=halt_on_error=1
sanitized() { # NAME FLAVOUR OPTIONS
    name="$2: $1" train=$build/$2/train
    shift 2
    [ -x "$train" ] || { skip "$name" "$train is not built"; return; }
    rm -rf "$work/sanitized"
    why=$(small_run sanitized "$@" --limit-val 9 --max-steps 3)
    [ -s "$work/sanitized.err" ] && why="$why: $(head -3 "$work/sanitized.err")"
    verdict "$name" "$why"
}
for flavour in asan tsan; do
    sanitized "ddp, 3 ranks, every micro-batch reduced" $flavour --nproc-per-node 3 --batch-size 2 \
        --gradient-accumulation-steps 2 --gradient-reduction every --bucket-size-mb 0.01 --drop-path 0.2
    sanitized "dp, 3 ranks, clipping" $flavour --strategy dp --nproc-per-node 3 --batch-size 2 \
        --gradient-accumulation-steps 3 --gradient-clipping 0.1 --checkpoint-interval-steps 1
    sanitized "zero3, 3 ranks, every second block recomputed" $flavour --strategy zero3 --nproc-per-node 3 \
        --batch-size 2 --gradient-accumulation-steps 2 --activation-checkpointing=2 --prefetch 2 \
        --drop-path 0.2
    sanitized "zero2, 2 ranks" $flavour --strategy zero2 --nproc-per-node 2 --batch-size 2
    sanitized "one rank, a loaded model" $flavour --pretrained "$work/config" --optimizer sgd
done
exit $failed
