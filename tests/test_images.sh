#!/bin/sh
# Images in files, as users of the program meet them: predict against PyTorch's logits, training and evaluation
# on folders, and images that are none. tests/test_images.sh [BUILD]. Needs jq; for real JPEGs imagenette-mini/
# under DATA_DIR.
set -u
. tests/lib.sh
golden=tests/golden/pretrained

# ------------------------------------------------------------------------------------------------- predict

# NMSE of predict's logits against those of PyTorch in double, for the images of the model's size:
# nmse KEY MODEL IMAGE...
nmse() {
    key=$1 model=$2
    shift 2
    $train predict --checkpoint "$model" --logits "$@" >"$work/predicted" 2>"$work/predict.err" || {
        cat "$work/predict.err"; return; }
    jq -s --arg key "$key" --slurpfile golden "$golden/expected.json" -r '
        [[.[].logits[]], [$golden[0].logits[$key][][]]] | transpose
        | ((map((.[0] - .[1]) * (.[0] - .[1])) | add) / (map(.[1] * .[1]) | add)) as $nmse
        | if length > 0 and $nmse <= 1e-11 then empty else "NMSE \($nmse) of the logits" end' \
        "$work/predicted" 2>&1
}
for model in hf4 hf4_bf16 hf4_f16; do
    verdict "predict: logits of $model" "$(nmse $model $golden/$model $golden/[0-9].png)"
done
verdict "predict: logits of hf5" "$(nmse hf4 $golden/hf5 $golden/[0-9].png)"
verdict "predict: logits of timm_tiny" "$(nmse timm_tiny tests/golden/timm_tiny $golden/timm_[0-9].png)"

# What a line says: the file, the likeliest classes in order with their names, and no logits unless asked for.
$train predict --checkpoint $golden/hf4 $golden/2.png $golden/0.png >"$work/lines" 2>"$work/a"
verdict "predict: lines" "$(jq -s -r '
    if map(.file) == ["'$golden'/2.png", "'$golden'/0.png"]
       and all(.[]; keys_unsorted == ["file", "top"] and (.top | length) == 3
           and (.top | map(.probability) | . == (sort | reverse) and ((add - 1) | fabs) < 1e-6)
           and (.top | map([.index, .label]) | sort) == [[0, "ant"], [1, "bee"], [2, "cat"]])
    then empty else "found \(.)" end' "$work/lines" 2>&1)"
verdict "predict: likelier classes have larger logits" "$($train predict --checkpoint $golden/hf4 --logits \
    $golden/[0-9].png 2>"$work/a" | jq -s -r 'if all(.[]; .logits as $l | [.top[] | $l[.index]] | . == (sort | reverse))
        then empty else "found \(.)" end')"

# The batch and the workers are nobody's business.
expected=$($train predict --checkpoint $golden/hf4 --logits $golden/*.png 2>"$work/a")
why=
for way in "--batch-size 1 --num-workers 0" "--batch-size 2 --num-workers 1" "--batch-size 5 --num-workers 3"; do
    # shellcheck disable=SC2086
    found=$($train predict --checkpoint $golden/hf4 --logits $way $golden/*.png 2>"$work/a")
    [ "$found" = "$expected" ] || why="$way differs"
done
verdict "predict: any batch and any workers" "$why"

# ------------------------------------------------------------------------------------------------- folders

# A folder of three classes: folder_of NAME. Images of one class are alike, so that they can be learnt.
folder_of() {
    for part in train val; do
        for class in ant bee cat; do mkdir -p "$work/$1/$part/$class"; done
        for copy in 1 2 3 4; do
            cp $golden/0.png "$work/$1/$part/ant/$copy.png"
            cp $golden/1.png "$work/$1/$part/bee/$copy.JPEG" # a file's content tells what it is
            cp $golden/2.png "$work/$1/$part/cat/$copy.png"
        done
    done
}
folder_of folder
small='--embed-dim 16 --depth 2 --num-heads 2 --image-size 8 --patch-size 4 --batch-size 6 --quiet'
runs() { # NAME OPTIONS
    name=$1
    shift
    # shellcheck disable=SC2086
    $train --data-path "$work/folder" --output-dir "$work/$name" $small "$@" >"$work/$name.out" 2>&1 ||
        tail -1 "$work/$name.out"
}
losses() { jq -c 'select(.event == "step" or .event == "eval") | [.train_loss, .val_loss]' "$work/$1/metrics.jsonl"; }

why=$(runs learns --augmentation none --epochs 30 --learning-rate 1e-2)
[ "$(jq 'select(.event == "end").best_val_accuracy' "$work/learns/metrics.jsonl")" = 1 ] ||
    why="$why: $(tail -1 "$work/learns.out")"
verdict "a folder is learnt" "$why"

why=$(runs workers-0 --epochs 3 --num-workers 0)
for workers in 1 3; do
    why=$why$(runs workers-$workers --epochs 3 --num-workers $workers)
    [ "$(losses workers-0)" = "$(losses workers-$workers)" ] || why="$why: losses differ with $workers workers"
    cmp "$work/workers-0/checkpoints/step-00000006/model.safetensors" \
        "$work/workers-$workers/checkpoints/step-00000006/model.safetensors" || why="$why: weights differ"
done
verdict "a folder: any number of workers" "$why"

why=$(runs plain --epochs 3 --num-workers 1 --augmentation none)
[ "$(losses plain)" != "$(losses workers-0)" ] || why="$why: augmentation changed nothing"
verdict "a folder: augmentation" "$why"

why=$(runs ranks --epochs 2 --nproc-per-node 3 --batch-size 2 --num-workers 2)$(runs one --epochs 2)
for name in ranks one; do jq 'select(.event == "step" and .step == 1).train_loss' "$work/$name/metrics.jsonl"; done |
    jq -s -e '(.[0] - .[1] | fabs) < 1e-5' >"$work/a" || why="$why: the first losses differ: $(cat "$work/a")"
verdict "a folder: three ranks" "$why"

# Names of classes travel with the model, and by them a folder is read: of one part, of some of the classes.
evaluated() { $train eval --checkpoint "$work/learns" "$@" 2>"$work/a"; }
all=$(evaluated --data-path "$work/folder")
verdict "eval: a folder" "$(echo "$all" | jq -r 'if .images == 12 and .val_accuracy == 1 then empty else . end')"
why=
[ "$(evaluated --data-path "$work/folder/val")" = "$all" ] || why="a folder of classes alone differs"
[ "$(evaluated --data-path "$work/folder" --batch-size 5 --num-workers 2)" = "$all" ] || why="$why: in batches of 5"
mkdir "$work/some"
cp -r "$work/folder/val/cat" "$work/some/"
[ "$(evaluated --data-path "$work/some" | jq -c '[.images, .val_accuracy]')" = "[4,1]" ] ||
    why="$why: cat alone: $(evaluated --data-path "$work/some")"
verdict "eval: by the names of classes" "$why"
label=$($train predict --checkpoint "$work/learns" "$work/folder/val/bee/3.JPEG" | jq -r '.top[0].label')
verdict "predict: the name of the class" "$([ "$label" = bee ] || echo "found $label")"

# Images in memory are resized to a model that takes another size.
why=$($train --image-size 12 --patch-size 4 --limit-train 64 --limit-val 8 --embed-dim 16 --depth 1 \
    --num-heads 1 --max-steps 1 --quiet --output-dir "$work/resized" 2>&1 >"$work/a")
[ "$(jq -c '.options["image-size"]' "$work/resized/config.json")" = 12 ] || why="$why: not resized"
verdict "digits are resized to the model's size" "$why"

# --------------------------------------------------------------------------------------------- fine-tuning

why=$($train --data-path "$work/folder" --output-dir "$work/frozen" --pretrained $golden/hf4 --freeze-backbone \
    --batch-size 6 --epochs 1 --quiet 2>&1 >"$work/a")
why=$why$(jq -s -r 'map(select(.event == "memory"))[0] | if .gradients_bytes * 20 < .parameters_bytes
    and .optimizer_bytes * 10 < .parameters_bytes then empty else "memory of the backbone: \(.)" end' \
    "$work/frozen/metrics.jsonl" 2>&1)
verdict "fine-tuning: a frozen backbone has no gradients" "$why"

# ---------------------------------------------------------------------------------------------- bad images

# One line that names the file: no_image NAME PATTERN FILE. It is tried as predict's argument and in a data set.
no_image() {
    name=$1 pattern=$2 why=
    rm -rf "$work/spoilt"
    cp -r "$work/folder" "$work/spoilt"
    cp "$3" "$work/spoilt/train/bee/2.JPEG"
    spoilt=$work/spoilt/train/bee/2.JPEG
    training="--data-path $work/spoilt --output-dir $work/spoilt.out $small --epochs 1"
    for command in "predict --checkpoint $golden/hf4 $spoilt" "$training" \
        "$training --nproc-per-node 2 --batch-size 3"; do
        rm -rf "$work/spoilt.out"
        # shellcheck disable=SC2086
        timeout 20 $train $command >"$work/stdout" 2>"$work/stderr"
        status=$?
        [ $status -eq 1 ] || why="$why: status $status"
        [ "$(grep -c '^train: error: ' "$work/stderr")" -eq 1 ] || why="$why: found no or several errors"
        grep -q "^train: error: $spoilt: .*$pattern" "$work/stderr" || why="$why: $(head -1 "$work/stderr")"
    done
    verdict "bad image: $name" "$why"
}
: >"$work/empty"
no_image "zero bytes" "found an empty file" "$work/empty"
head -c 300 $golden/1.png >"$work/half.png"
no_image "truncated PNG" "expected" "$work/half.png"
echo "this is no picture" >"$work/text.jpg"
no_image "a text file named .jpg" "expected" "$work/text.jpg"
{ # a BMP of 24 bits: header of 14 and 40 bytes, little-endian
    printf 'BM\100\0\0\0\0\0\0\0\066\0\0\0\050\0\0\0\140\352\0\0\140\352\0\0\01\0\030\0'
    head -c 34 /dev/zero
} >"$work/huge.bmp"
no_image "60,000 x 60,000" "60000 x 60000" "$work/huge.bmp"

# Line and status of what cannot begin: refused NAME PATTERN ARGUMENTS.
refused() {
    name=$1 pattern=$2 why=
    shift 2
    timeout 20 "$train" "$@" >"$work/stdout" 2>"$work/stderr" && why="status 0"
    [ "$(grep -c '^train: error: ' "$work/stderr")" -eq 1 ] || why="$why: found no or several errors"
    grep -q "^train: error: .*$pattern" "$work/stderr" || why="$why: $(head -1 "$work/stderr")"
    verdict "$name" "$why"
}
folder_of lonely
rm "$work"/lonely/val/bee/*
refused "an empty class" "lonely/val/bee: found no image" --data-path "$work/lonely"
rm -r "$work/lonely/val/bee"
refused "train and val with different classes" "found class cat in val/, expected bee" \
    --data-path "$work/lonely"
refused "more classes than --num-classes" "imagefolder has 3 classes, more than" --data-path "$work/folder" \
    --num-classes 2
mkdir "$work/other"
cp -r "$work/folder/val/bee" "$work/other/wasp"
refused "eval: a class that the model does not know" "found class wasp, which the model does not know" \
    eval --checkpoint "$work/learns" --data-path "$work/other"
refused "predict without a model" "predict: found no --checkpoint" predict $golden/0.png
refused "predict without images" "predict: found 0 images" predict --checkpoint $golden/hf4
refused "predict: a missing file" "nowhere.jpg: cannot be" predict --checkpoint $golden/hf4 nowhere.jpg

# ----------------------------------------------------------------------------------------------- sanitizers

export TSAN_OPTIONS=halt_on_error=1
for flavour in asan tsan; do
    name="$flavour: two ranks with two workers each"
    [ -x "$build/$flavour/train" ] || { skip "$name" "$build/$flavour/train is not built"; continue; }
    # shellcheck disable=SC2086
    "$build/$flavour/train" --data-path "$work/folder" --output-dir "$work/$flavour" $small --batch-size 2 \
        --nproc-per-node 2 --num-workers 2 --epochs 2 >"$work/a" 2>"$work/stderr"
    status=$?
    verdict "$name" "$([ $status -eq 0 ] && [ ! -s "$work/stderr" ] || head -3 "$work/stderr")"
done

# ----------------------------------------------------------------------------------------------- real data

if [ -d "${DATA_DIR:-/nowhere}/imagenette-mini" ]; then
    why=$($train --data-path "$DATA_DIR/imagenette-mini" --limit-val 60 --image-size 32 --patch-size 8 \
        --embed-dim 16 --depth 1 --num-heads 1 --max-steps 2 --nproc-per-node 2 --batch-size 50 \
        --output-dir "$work/real" --quiet 2>&1 >"$work/a")
    verdict "Imagenette: 200 JPEGs are drawn" "$why$(jq -s -r 'map(select(.event == "eval")) | if length == 1
        and .[0].images == 60 then empty else "found \(.)" end' "$work/real/metrics.jsonl" 2>&1)"
else
    skip "Imagenette: 200 JPEGs are drawn" "imagenette-mini under DATA_DIR is missing"
fi
exit $failed
