#!/bin/sh
# Bad input: each case must end at once with one line "train: error: ..." on stderr, nothing on stdout, status
# 1, or 2 for wrong usage, and with nothing lost. tests/test_errors.sh [BUILD]; where BUILD/asan/train exists,
# every case runs with that program too.
set -u
. tests/lib.sh
export ASAN_OPTIONS=allocator_may_return_null=1
programs=$train
if [ -x "$build/asan/train" ]; then programs="$train $build/asan/train"
else skip "errors under AddressSanitizer" "$build/asan/train is not built"; fi
out=$work/out

# What is wrong with one failure: wrong_failure STATUS PATTERN PROGRAM ARGUMENTS. The pattern (of grep -E)
# stands somewhere behind "train: error: ".
wrong_failure() {
    expected=$1 pattern=$2 err=$work/stderr
    shift 2
    timeout 20 "$@" >"$work/stdout" 2>"$err.all"
    status=$?
    grep -a -v 'WARNING: AddressSanitizer failed to allocate' "$err.all" >"$err"
    [ $status -eq "$expected" ] || echo "status $status, expected $expected: $(head -1 "$err")"
    [ "$(grep -a -c '^train: error: ' "$err")" -eq 1 ] || echo "found no or several errors: $(head -2 "$err")"
    # one line, or a line and a table, of which no line looks like another failure
    [ "$(wc -l <"$err")" -eq 1 ] ||
        { [ -n "${with_table:-}" ] && [ "$(grep -c '^train:' "$err")" -eq 1 ]; } ||
        echo "stderr has $(wc -l <"$err") lines: $(head -1 "$err")"
    grep -a -E -q -- "^train: error: .*$pattern" "$err" || echo "expected $pattern, found $(head -1 "$err")"
    [ -s "$work/stdout" ] && echo "stdout: $(head -1 "$work/stdout")"
}
# A case, with every program: fails NAME STATUS PATTERN ARGUMENTS.
fails() {
    name=$1 status_expected=$2 pattern_expected=$3
    shift 3
    why=
    for program in $programs; do
        [ -n "$why" ] ||
            why=$(wrong_failure "$status_expected" "$pattern_expected" "$program" "$@" | head -1)
    done
    verdict "$name" "$why"
}
usage() { name=$1 pattern=$2; shift 2; fails "usage: $name" 2 "$pattern" "$@"; }
# A run that must not begin, on one rank and on three: refused NAME PATTERN OPTIONS. There is no output
# directory afterwards.
refused() {
    name=$1 pattern=$2
    shift 2
    why=
    for program in $programs; do
        for n in 1 3; do
            [ -n "$why" ] || why=$(wrong_failure 1 "$pattern" "$program" --nproc-per-node $n \
                --output-dir "$out" --quiet "$@" | head -1)
            [ -e "$out" ] && why="${why:-an output directory was made}" && rm -rf "$out"
        done
    done
    verdict "$name" "$why"
}
# A run that begins and fails: breaks NAME PATTERN OPTIONS.
breaks() {
    name=$1 pattern=$2
    shift 2
    why=
    for program in $programs; do
        rm -rf "$out"
        [ -n "$why" ] ||
            why=$(wrong_failure 1 "$pattern" "$program" --output-dir "$out" --quiet "$@" | head -1)
    done
    rm -rf "$out"
    verdict "$name" "$why"
}

# A run that all cases must leave alone.
small='--embed-dim 16 --depth 2 --num-heads 2 --limit-train 100 --limit-val 50'
kept=$work/kept
# shellcheck disable=SC2086
$train $small --quiet --epochs 2 --output-dir "$kept" >/dev/null || bad "a good run" "status $?"
sums() { (cd "$kept" && find . -type f -exec cksum {} + | sort; find . | sort); }
before=$(sums)
model=$kept/checkpoints/$(cat "$kept/checkpoints/latest")

# ----------------------------------------------------------------------------------------- the command line

usage "unknown option" "unknown option --epoch, did you mean --epochs\?" --epoch 3
usage "unknown option of eval" "unknown option --checkpiont, did you mean --checkpoint\?" eval --checkpiont x
usage "unknown option with a value" "unknown option --bathc-size, did you mean --batch-size\?" --bathc-size=3
usage "one dash" "unknown option -epochs, did you mean --epochs\?" -epochs 3
usage "unknown switch" "unknown option --no-shufle, did you mean --no-shuffle\?" --no-shufle
usage "unknown command" "unknown command 'trian', did you mean train\?" trian
usage "unknown help" "unknown topic 'evla', did you mean help eval\?" help evla
usage "empty command" "unknown command ''" ""
usage "stray argument" "found the argument 'digits'" train digits
usage "missing value" "--epochs: found no value" --epochs
usage "missing value before an option" "--epochs: found no value" --epochs --quiet
usage "empty value" "--epochs: found ''" --epochs=
usage "no number" "--epochs: found 'many', expected a whole number" --epochs many
usage "zero" "--batch-size: found '0'" --batch-size 0
usage "negative" "--batch-size: found '-1'" --batch-size -1
usage "fraction" "--epochs: found '1.5'" --epochs 1.5
usage "too large a number" "--epochs: found '9{20}'" --epochs 99999999999999999999
usage "not a number" "--learning-rate: found 'nan'" --learning-rate nan
usage "infinity" "--learning-rate: found '1e999'" --learning-rate 1e999
usage "out of range" "--beta1: found '1', expected a number in \[0, 1\)" --beta1 1
usage "two numbers" "--mean: found '1,2'" --mean 1,2
usage "deviation of zero" "--std: found '0'" --std 0
usage "no extent" "--image-size: found '8x'" --image-size 8x
usage "unknown choice" "--optimizer: found 'adam', .*did you mean adamw" --optimizer adam
usage "a switch with a value" "--shuffle: found the value 'yes'" --shuffle=yes
usage "a negated option with a value" "--no-epochs" --no-epochs 3
usage "too many ranks" "--nproc-per-node: found '4097'" --nproc-per-node 4097
usage "bytes that are no text" "--data-path" --data-path "$(printf '\377')"
two_lines=$(printf 'a\ntrain: error: b')
usage "a value of two lines" "--optimizer: found 'a\?train: error: b'" --optimizer "$two_lines"
usage "eval without a model" "eval: found no --checkpoint" eval

for command in simulate plan; do
    usage "$command is of later" "$command is not built yet" $command
done
for option in trace "augmentation imagenet" \
    "mixup 0.2" "deepspeed-config x" "cluster p5"; do
    # shellcheck disable=SC2086
    usage "--$option is of later" "--${option%%[ =]*}.* is not built yet" --$option
done

if "$train" env --device cuda >"$work/stdout" 2>&1; then skip "usage: no GPU" "there is one"; else
    refused "no GPU" "(no CUDA device|CUDA driver is too old|not built with CUDA)" --device cuda --backend local
fi

refused "16 bits by OpenBLAS" "--matmul openblas: found --precision bf16, expected fp32" --matmul openblas \
    --precision bf16
refused "TF32 on a CPU" "--tf32: found --device cpu, expected --device cuda and --precision fp32" --tf32
refused "TF32 of bf16" "--tf32: found --precision bf16, expected" --tf32 --device cuda \
    --backend local --precision bf16
refused "offload on a CPU" "--offload optimizer: found --device cpu, .*expected cuda" --offload optimizer

refused "graphs on a CPU" "--cuda-graphs: found --device cpu, expected cuda" --cuda-graphs
refused "graphs with offload" "--cuda-graphs: found --offload optimizer, expected none" \
    --cuda-graphs --device cuda --backend local --offload optimizer
refused "graphs of ranks on one GPU" "--cuda-graphs: found --backend local with several ranks, expected one" \
    --cuda-graphs --device cuda --backend local --nproc-per-node 2

compared() { name=$1 pattern=$2; shift 2; usage "compare: $name" "$pattern" compare "$@"; }
compared "no strategies" "compare: found no --strategies, expected names such as ddp,zero3"
compared "an unknown strategy" \
    "--strategies: found 'zero4', expected names of single\|dp\|.*\|fsdp; did you mean zero1" \
    --strategies ddp,zero4
compared "a name behind a blank" "--strategies: found ' zero3', .*did you mean zero3" \
    --strategies 'ddp, zero3'
compared "a name of two lines" "--strategies: found 'a\?train: error: b'" --strategies "$two_lines"
for list in ,ddp ddp, ddp,,zero3 ,; do
    compared "an empty name: $list" "--strategies: found an empty name in '$list'" --strategies "$list"
done
compared "a strategy twice" "--strategies: found ddp twice, expected each strategy once" \
    --strategies ddp,zero1,ddp
compared "a strategy by two names" "--strategies: found zero3 twice \(fsdp is the same\), expected each" \
    --strategies zero3,fsdp
compared "one strategy beside the list" "compare: found --strategy, expected it with one strategy" \
    --strategies ddp,zero3 --strategy ddp
compared "a schedule" "compare: found --print-schedule" --strategies ddp,zero3 --print-schedule

# -------------------------------------------------------------------------------------- configuration files

config() { # NAME PATTERN TEXT
    printf '%s' "$3" >"$work/config.json"
    usage "config: $1" "config.json: $2" --config "$work/config.json" --output-dir "$out"
}
usage "config: missing" "$work/none: cannot be opened: No such file" --config "$work/none"
usage "config: a directory" "$work: cannot be read: Is a directory" --config "$work"
usage "config: a name of two lines" "a\?train: error: b: cannot be opened" --config "$two_lines"
config "empty" "found invalid or truncated JSON" ""
config "truncated" "found invalid or truncated JSON" '{"epochs": 3'
config "trailing text" "found invalid or truncated JSON" '{"epochs": 3} x'
config "an array" "found an array, expected an object of options" '[3]'
config "a number" "found a number, expected an object of options" '3'
config "unknown key" "unknown option .?epoch.?, did you mean epochs\?" '{"epoch": 3}'
config "underscores" "unknown option .?batch_size.?, did you mean batch-size\?" '{"batch_size": 3}'
config "a key twice" "found the key 'epochs' twice" '{"epochs": 3, "epochs": 4}'
config "a string for a number" "epochs: found" '{"epochs": "three"}'
config "an object for a number" "epochs: found an object" '{"epochs": {}}'
config "a fraction" "epochs: found" '{"epochs": 1.5}'
config "out of range" "epochs: found '0'" '{"epochs": 0}'
config "an unknown choice" "strategy: found 'dpp', .*did you mean (dp|ddp)" '{"strategy": "dpp"}'
config "a number for a switch" "quiet: found a number, expected true or false" '{"quiet": 1}'
config "two numbers of three" "mean: found" '{"mean": [1, 2]}'
config "of later" "trace is not built yet" '{"trace": true}'
config "a choice of later" "augmentation imagenet is not built yet" '{"augmentation": "imagenet"}'
config "another file" "found config, expected no further file" '{"config": "x"}'
config "bytes that are no text" "found bytes that are not UTF-8" "$(printf '{"model": "\377"}')"
config "unknown key of a run" "unknown option .?wings.?" '{"options": {"wings": 2}, "run": {}}'

# ------------------------------------------------------------------------------------------ impossible runs

refused "unknown model" "no model is named vit_tiny" --model vit_tiny
refused "heads that do not divide" "embed dim 64 is not a multiple of 5 heads" --num-heads 5
refused "a patch larger than the image" "patch size 9 is larger than the image, 8x8" --patch-size 9
refused "no hidden layer" "mlp ratio 0.001 of embed dim 64" --mlp-ratio 0.001
refused "too deep" "depth 5000, expected 1 to 4096" --depth 5000
refused "an image too large" "synthetic|image height" --dataset synthetic --image-size 9007199254740991
refused "an eps of one" "eps" --layer-norm-eps 1
refused "more classes in the data than in the model" \
    "digits has 10 classes, more than the model's 9" --num-classes 9
refused "a global batch larger than the data set" \
    "a global batch of 1439 x 1 x [13] .*larger than .*1438" --batch-size 1439
most=9007199254740991
refused "a global batch beyond all numbers" "a global batch of $most x $most x [13]" \
    --batch-size $most --gradient-accumulation-steps $most
refused "accumulation beyond the data set" "a global batch of 10 x 200 x [13]" \
    --batch-size 10 --gradient-accumulation-steps 200
refused "a limited data set" "larger than the data set, 5 images" --limit-train 5
fails "strategy single on three ranks" 1 "strategy single runs on one rank, found 3; choose another" \
    --strategy single --nproc-per-node 3 --output-dir "$out"
fails "compare with single on two ranks" 1 "strategy single runs on one rank, found 2; choose another" \
    compare --strategies ddp,single --nproc-per-node 2 --output-dir "$out" --quiet
with_table=yes
refused "more memory than there is" "out of memory" --embed-dim 131072 --depth 4000
with_table=

# ----------------------------------------------------------------------------------------------------- data

no_file="cannot be read: No such file or directory"
refused "no data path" "$work/none: $no_file" --data-path "$work/none"
refused "a file as data path" "config.json: cannot be read: Not a directory" --data-path "$kept/config.json"
empty=$work/empty
mkdir "$empty"
refused "an empty data path" "$empty: found an empty directory, expected MNIST" --data-path "$empty"
refused "unknown data" "found [0-9]* entries, none of a known name, expected MNIST" --data-path "$model"
refused "MNIST without a path" "data set mnist: found no data path" --dataset mnist
refused "MNIST that is not there" "$empty: found no t10k-images-idx3-ubyte" \
    --dataset mnist --data-path "$empty"
refused "CIFAR-10 that is not there" "$empty: found no test_batch.bin" \
    --dataset cifar10 --data-path "$empty"
mkdir -p "$work/folder/train/cat" "$work/folder/val/cat"
refused "an ImageFolder without images" "folder/val/cat: found no image in this class" \
    --data-path "$work/folder"
name="an unreadable data path"
if [ "$(id -u)" = 0 ]; then
    skip "$name" "root may read everything"
else
    mkdir -m 000 "$work/locked"
    refused "$name" "locked: cannot be read: Permission denied" --data-path "$work/locked"
    chmod 700 "$work/locked"
fi

mnist_of mnist 24
cifar_of cifar
cp -r "$work/mnist" "$work/both" && cp "$work/cifar/test_batch.bin" "$work/both"
refused "two data sets in one folder" "both: found more than one data set" --data-path "$work/both"

# A copy of a good folder, of which $file is to be spoilt: spoil FOLDER FILE
spoil() { rm -rf "$work/bad"; cp -r "$work/$1" "$work/bad"; file=$work/bad/$2; }
put() { printf '%b' "$2" | dd of="$file" bs=1 seek="$1" conv=notrunc 2>/dev/null; } # OFFSET BYTES
cut_to() { head -c "$1" "$file" >"$work/a" && mv "$work/a" "$file"; } # BYTES
bad_data() { # NAME PATTERN
    refused "$1" "$file: $2" --data-path "$work/bad" --batch-size 2 --embed-dim 16 --patch-size 1
}
images=train-images-idx3-ubyte labels=train-labels-idx1-ubyte

spoil mnist $images; put 3 '\0001'
bad_data "IDX with the magic number of labels" "found magic number 0x00000801, expected 0x00000803"
spoil mnist t10k-labels-idx1-ubyte; put 0 '\0037\0213'
bad_data "IDX that begins like gzip" ".*expected a whole file, plain or gzip"
spoil mnist $images; put 7 '\0377'
bad_data "IDX with a count larger than the file" "found 360 bytes after the header, expected 255 x 5 x 3"
spoil mnist $images; put 4 '\0377\0377\0377\0377\0377\0377\0377\0377\0377\0377\0377\0377'
bad_data "IDX of 2^96 pixels" "found 360 bytes after the header"
spoil mnist $images; put 11 '\0000'
bad_data "IDX with a dimension of 0" "found 360 bytes after the header, expected 24 x 0 x 3"
spoil mnist $images; cut_to 100
bad_data "IDX cut short" "found 84 bytes after the header"
spoil mnist $images; cut_to 11
bad_data "IDX without its header" "found 11 bytes, expected an IDX header"
spoil mnist $images; : >"$file"
bad_data "an empty IDX file" "found 0 bytes"
spoil mnist $images; echo x >>"$file"
bad_data "IDX with more bytes" "found 362 bytes after the header"
spoil mnist $labels; put 20 '\0012'
bad_data "an MNIST label out of range" "label 12 \(counted from 0\): found 10, expected 0 to 9"
spoil mnist $labels; put 7 '\0027'; cut_to 31
bad_data "fewer labels than images" "found 23 labels, expected 24"
spoil mnist $labels; rm "$file"; file=$work/bad
bad_data "MNIST without its labels" "found no train-labels-idx1-ubyte"
spoil mnist t10k-images-idx3-ubyte; rm "$file"; file=$work/bad
bad_data "MNIST without validation images" "found no t10k-images-idx3-ubyte"
spoil mnist $images; gzip "$file"; file=$file.gz; cut_to 200
bad_data "gzip cut short" "unexpected end of file"
spoil mnist $images; gzip "$file"; file=$file.gz; put 60 '\0000\0377\0125\0252\0000\0377'
bad_data "gzip with wrong bytes" ".*expected a whole file, plain or gzip"
spoil mnist $images; rm "$file"; mkdir "$file"
bad_data "a directory for an IDX file" "Is a directory"
spoil mnist $images; put 11 '\0003\0000\0000\0000\0005'; file=mnist
bad_data "training and validation images of two sizes" "found 1 x 5 x 3 .*expected 1 x 3 x 5"

spoil cifar data_batch_3.bin; cut_to 30729
bad_data "a short CIFAR-10 record" "record 9 \(counted from 0\): found 3072 bytes, expected 3073"
spoil cifar data_batch_1.bin; : >"$file"
bad_data "an empty CIFAR-10 file" "record 0 .*found 0 bytes"
spoil cifar test_batch.bin; put 6146 '\0012'
bad_data "a CIFAR-10 label out of range" "record 2 \(counted from 0\): found label 10, expected 0 to 9"
spoil cifar batches.meta.txt; echo camel >>"$file"
bad_data "eleven label names" "found 11 label names, expected 10"
spoil cifar test_batch.bin; rm "$file"; file=$work/bad
bad_data "CIFAR-10 without validation images" "found no test_batch.bin"
spoil cifar test_batch.bin; rm "$work"/bad/data_batch_*; file=$work/bad
bad_data "CIFAR-10 without training images" "found no data_batch"

# --------------------------------------------------------------------------------------------------- models

loads() { name=$1 pattern=$2; shift 2; refused "pretrained: $name" "$pattern" --pretrained "$@"; }
timm=tests/golden/timm_tiny
loads "missing" "$work/none: $no_file" "$work/none"
loads "an empty folder" "empty: found neither model.safetensors nor checkpoints/latest" "$empty"
loads "another patch size" "patch_embed.proj.weight: found shape .* 2, 2\], expected .* 1, 1\]" \
    "$model" --patch-size 1
loads "another depth" "found no tensor blocks.2" "$model" --depth 3
loads "less depth" "found tensor blocks.1.* which the model does not have" "$model" --depth 1
loads "fewer classes than the data" "digits has 10 classes, more than the model's 5" $timm --image-size 8 \
    --num-classes 5
loads "another model than the named one" "found a vit_tiny_patch16_224, expected a vit_base_patch16_224" \
    "$model" --model vit_base_patch16_224
loads "a bare file without the heads" "tell the number of heads, expected --num-heads" \
    "$model/model.safetensors"
loads "two models" "found both --checkpoint and --pretrained" "$model" --checkpoint "$model"
fails "eval: no such checkpoint" 1 "none: $no_file" eval --checkpoint "$work/none" --nproc-per-node 3
fails "eval: another number of classes" 1 "tensor head.weight: found shape \[10, 16\], expected \[12, 16\]" \
    eval --checkpoint "$model" --num-classes 12
fails "eval: fewer classes than the data" 1 "digits has 10 classes, more than the model's 5" \
    eval --checkpoint $timm --image-size 8
fails "eval: no head" 1 "hf_base/model.safetensors: found no tensor classifier.weight, expected a model" \
    eval --checkpoint tests/golden/pretrained/hf_base

# A spoilt copy of the model, in training and in evaluation: bad_model NAME PATTERN
bad_model() {
    loads "$1" "$2" "$work/bad"
    fails "eval: $1" 1 "$2" eval --checkpoint "$work/bad" --nproc-per-node 3
}
mkdir "$work/model" && cp "$model"/* "$work/model"
spoil_weights() { spoil model model.safetensors; }
header=$(od -A n -t u8 -N 8 "$model/model.safetensors" | tr -d ' ')
size=$(wc -c <"$model/model.safetensors")
st() { # JSON DATA: another file, of a header below 65536 bytes and data
    spoil_weights
    length=$(printf '\\0%03o\\0%03o' $((${#1} % 256)) $((${#1} / 256)))
    { printf '%b' "$length\\0000\\0000\\0000\\0000\\0000\\0000" && printf '%s%s' "$1" "$2"; } >"$file"
}
spoil_weights; : >"$file"
bad_model "an empty file" "found a file of 0 bytes, expected at least 8"
spoil_weights; put 0 '\0377\0377\0377\0377\0377\0377\0377\0177'
bad_model "a header longer than the file" "found a header of 9223372036854775807 bytes"
spoil_weights; cut_to 20000
bad_model "a file cut short" "found a file of 20000 bytes, expected"
spoil_weights; echo x >>"$file"
bad_model "bytes behind the tensors" "found a file of [0-9]* bytes, expected"
spoil_weights; put 8 x
bad_model "a header that is no object" "found a header that is not"
spoil_weights; put 9 '\0000'
bad_model "a 0 in the header" "found a control character at byte 1"
f32='"dtype":"F32","shape":[1],"data_offsets"'
st "{\"a\":{$f32:[0,4]},\"b\":{$f32:[2,6]}}" 123456
bad_model "tensors that overlap" "'b': found its data .*overlaps"
st "{\"a\":{$f32:[4,8]}}" 12345678
bad_model "a hole" "'a': .*there is a hole"
st "{\"a\":{$f32:[0,8]}}" 12345678
bad_model "offsets that do not fit the shape" "'a': found 8 bytes by data_offsets, expected 4"
st '{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}' 1234
bad_model "a shape of 2^64 elements" "'a': found a shape of 2\^64"
st '{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}' 1234
bad_model "an unknown type" "'a': found dtype 'F99'"
st "{\"a\":{$f32:[0,4]},\"a\":{$f32:[0,4]}}" 1234
bad_model "a tensor twice" "found the key 'a' twice"
st '{}' ''
bad_model "no tensors" "found no tensor"
st '{"a\ntrain: error: b":{"dtype":3}}' ''
bad_model "a name of two lines" "'a\?train: error: b'"
spoil_weights; put $((size - 4)) '\0000\0000\0300\0177'
bad_model "a weight that is NaN" "tensor [a-z_.0-9]*: found nan at element [0-9]*, expected finite weights"
spoil_weights; put $((8 + header)) '\0000\0000\0200\0377'
bad_model "a weight that is infinite" "tensor blocks.0.attn.proj.bias: found -inf at element 0"
spoil model config.json; echo '{"architecture": "resnet50"}' >"$file"
bad_model "another architecture" "found resnet50, expected a Vision Transformer"
spoil model config.json; : >"$file"
bad_model "an empty config.json" "invalid or truncated JSON"
spoil model config.json; sed 's/"token"/"avg"/' "$model/config.json" >"$file"
bad_model "another pooling" "global_pool: found avg"
spoil model config.json; sed '/"std"/s/\[.*\]/[0]/' "$model/config.json" >"$file"
bad_model "a deviation of zero" "std: found"

# Models of others. spoil copies from $work, so they lie there too.
cp -r tests/golden/pretrained/hf4 "$work/hf"
spoil hf config.json; sed 's/"hidden_size": 24/"hidden_size": 48/' "$work/hf/config.json" >"$file"
bad_model "a configuration that contradicts the tensors" \
    "bad/config.json: hidden_size: found 48, expected 24 by the tensors of .*bad/model.safetensors"
spoil hf config.json; sed 's/"gelu"/"relu"/' "$work/hf/config.json" >"$file"
bad_model "another activation" \
    "bad/config.json: hidden_act: found relu, expected gelu or gelu_pytorch_tanh or gelu_new"
spoil hf config.json; sed 's/"vit"/"swin"/' "$work/hf/config.json" >"$file"
bad_model "another model of Hugging Face" "bad/config.json: model_type: found swin, expected vit"
spoil hf preprocessor_config.json; echo '{' >"$file"
bad_model "a truncated preprocessor_config.json" "preprocessor_config.json: found invalid or truncated JSON"
spoil hf model.safetensors; sed 's/vit.layernorm.bias/vit.layernorm.bios/' "$work/hf/${file##*/}" >"$file"
loads "a tensor of another name" \
    "found no tensor vit.layernorm.bias, which .*, and tensor vit.layernorm.bios, which it has not" \
    "$work/bad" --dataset synthetic
spoil hf model.safetensors; mv "$file" "$work/bad/pytorch_model.bin"; file=$work/bad/pytorch_model.bin
bad_model "a pickle alone in a folder" \
    "bad/pytorch_model.bin: found a pickle file, .*; convert it with: python3 -c \"import torch; .*save_file"
spoil hf model.safetensors
printf 'PK\3\4\0\0\10\10%18s\20\0\0\0archive/data.pkl' '' >"$file"
bad_model "a pickle by its content" "bad/model.safetensors: found a pickle file, .*convert it with: python3"

to="--output-dir $work/exported"
# shellcheck disable=SC2086
{
usage "export without a model" "export: found no --checkpoint" export --format hf $to
usage "export without a format" "export: found no --format, expected timm or hf" export --checkpoint x $to
usage "export without a folder" "export: found no --output-dir" export --checkpoint x --format timm
usage "export to another format" "--format: found 'onnx'" export --checkpoint x --format onnx $to
fails "export: no such checkpoint" 1 "none: $no_file" export --checkpoint "$work/none" --format hf $to
fails "export: an eps that timm cannot say" 1 "timm's config.json cannot say a LayerNorm eps of 1e-12" \
    export --checkpoint "$work/hf" --format timm --quiet $to
}
fails "export: a folder that holds a model" 1 "hf: found model.safetensors, so it already holds a model" \
    export --checkpoint "$model" --format timm --output-dir "$work/hf"
fails "export: a folder that holds something else" 1 "cannot be renamed to $work/both: Directory not empty" \
    export --checkpoint "$model" --format hf --output-dir "$work/both"
fails "export: a folder below a file" 1 "config.json: cannot be made a directory" \
    export --checkpoint "$model" --format hf --output-dir "$kept/config.json/x"
spoil_weights; put $((size - 4)) '\0000\0000\0300\0177'
# shellcheck disable=SC2086
fails "export: a weight that is NaN" 1 "found nan at element" export --checkpoint "$work/bad" --format hf $to
left=$(cd "$work" && echo exported* both.*)
[ "$left" = "exported* both.*" ] && why= || why="found $left"
verdict "nothing is left of a failed export" "$why"

# ------------------------------------------------------------------------------- losses that are not finite

unit='(embedding|block [0-9]+|head)'
not_finite="the loss is not finite: on rank [012] the first unit with a NaN or an infinity is"
for world in "single 1" "ddp 3" "dp 3"; do
    for m in 1 2; do
        breaks "an infinite loss: ${world% *}, ${world#* } ranks, accumulation $m" \
            "step [2-9]: $not_finite $unit\$" --strategy "${world% *}" --nproc-per-node "${world#* }" \
            --learning-rate 1e30 --warmup-steps 0 --batch-size 4 --gradient-accumulation-steps $m \
            --embed-dim 16 --depth 2 --num-heads 2
    done
done
breaks "an infinite loss with sgd" "step [2-9]: $not_finite $unit" \
    --optimizer sgd --learning-rate 1e35 --embed-dim 16 --depth 2
breaks "a first loss that is not finite" "step 1: $not_finite embedding" --std 1e-39 --embed-dim 16
breaks "a loss beyond all sums" "step [2-9]: the loss is not finite or too large" \
    --learning-rate 1000 --warmup-steps 0
breaks "an infinite loss in evaluation" \
    "evaluation after step 1: the loss of image [0-9]* is .*: on rank [012] .*: $unit" \
    --learning-rate 1e38 --warmup-steps 0 --max-steps 1 --nproc-per-node 3 --embed-dim 16

# ------------------------------------------------------------------------------------ output and full disks

for trace in config.json metrics.jsonl checkpoints; do
    mkdir "$work/half" && cp -r "$kept/$trace" "$work/half"
    fails "an output directory with a $trace" 1 "half: found $trace, so it already holds a run" \
        --output-dir "$work/half"
    rm -r "$work/half"
done
fails "an output directory that holds a run" 1 "kept: found config.json, so it already holds a run" \
    --output-dir "$kept" --nproc-per-node 3
fails "the output directory of --config" 1 "kept: found config.json, so it already holds a run" \
    --config "$kept/config.json" --output-dir "$kept"
fails "an output directory below a file" 1 "config.json: cannot be made a directory" \
    --output-dir "$kept/config.json/x" --nproc-per-node 3 --quiet
fails "an output directory that is a file" 1 "config.json: cannot be made a directory" \
    --output-dir "$kept/config.json" --quiet
fails "an output directory in /proc" 1 "cannot be made a directory" --output-dir /proc/nowhere/x --quiet
fails "an output directory of two lines" 1 "a\?train: error: b: cannot be made a directory" \
    --output-dir "/proc/$two_lines" --quiet
deep=$work/deep # of 4080 bytes, so that files below it have names beyond 4095
while [ ${#deep} -lt 3900 ]; do deep=$deep/$(printf 'x%.0s' $(seq 150)); done
fails "an output directory with too long a name" 1 "found too long a path|found a path of" --embed-dim 16 \
    --max-steps 1 --quiet --output-dir "$deep/$(printf 'x%.0s' $(seq $((4079 - ${#deep}))))"
rm -rf "$work/deep"
name="an output directory in a locked one"
if [ "$(id -u)" = 0 ]; then
    skip "$name" "root may write everywhere"
else
    mkdir -m 555 "$work/closed"
    fails "$name" 1 "closed/x: cannot be made a directory: Permission denied" \
        --output-dir "$work/closed/x" --nproc-per-node 3 --quiet
fi

# A run that may write no file larger than so many blocks of 512 bytes, as if the disk were full then:
# limited NAME BLOCKS PATTERN OPTIONS. The output directory of the last program stays.
limited() {
    name=$1 blocks=$2 pattern=$3
    shift 3
    why=
    for program in $programs; do
        rm -rf "$out"
        [ -n "$why" ] || why=$(trap '' XFSZ && ulimit -f "$blocks" &&
            wrong_failure 1 "$pattern" "$program" --output-dir "$out" --quiet "$@" | head -1)
    done
    left=$(find "$work" -path "$out/*.tmp" | head -1)
    [ -z "$left" ] || why="$why: left $left"
    verdict "$name" "$why"
}
too_large="no room for [0-9]* bytes: File too large"
for n in 1 2 3; do
    # shellcheck disable=SC2086
    limited "no room for a checkpoint, $n ranks" 8 "step-00000001.tmp/model.safetensors: $too_large" \
        $small --max-steps 1 --nproc-per-node $n
    find "$out/checkpoints" -name '*step*' | grep -q . && bad "no room: $n ranks" "a part is left"
done
# shellcheck disable=SC2086
limited "no room for metrics.jsonl" 8 \
    "metrics.jsonl: cannot write [0-9]* bytes at offset 4096: File too large" \
    $small --batch-size 1 --nproc-per-node 3
limited "no room for config.json" 1 "config.json.tmp: cannot write" --embed-dim 16 --max-steps 1

disk=$work/disk # a small one, where root may mount one
disk_fills_up() { # training goes on, as there is an older checkpoint; but the last one must be written
    # shellcheck disable=SC2086
    $train $small --quiet --output-dir "$disk/run" --nproc-per-node 2 --batch-size 16 --max-steps 9 \
        >"$work/stdout" 2>"$work/disk.err" && echo "status 0, though the last checkpoint cannot be written"
    full=".*safetensors: no room for [0-9]* bytes: No space left"
    warnings=$(grep -c "^train: warning: $full" "$work/disk.err")
    errors=$(grep -c "^train: error: $full" "$work/disk.err")
    [ "$warnings$errors" = 11 ] && [ "$(wc -l <"$work/disk.err")" -eq 2 ] ||
        echo "expected a warning and an error, found $(head -1 "$work/disk.err")"
    jq -s 'map(select(.event == "step")) | length == 9' "$disk/run/metrics.jsonl" | grep -q true ||
        echo "steps are missing from metrics.jsonl"
    found=$(cd "$disk/run/checkpoints" && echo *)
    [ "$found" = "best latest step-00000003" ] || echo "found $found"
    $train eval --checkpoint "$disk/run" --limit-val 9 >/dev/null 2>&1 || echo "the first cannot be read"
}
name="a disk that fills up between two checkpoints"
mkdir "$disk"
if mount -t tmpfs -o size=176k tmpfs "$disk" 2>/dev/null; then
    trap 'umount "$disk"; rm -rf "$work"' EXIT
    verdict "$name" "$(disk_fills_up | head -1)"
    umount "$disk"
    trap 'rm -rf "$work"' EXIT
else
    skip "$name" "no small file system may be mounted here"
fi

full() { # NAME ARGUMENTS: with a stdout that is full
    name="stdout is full: $1"
    shift
    [ -w /dev/full ] || { skip "$name" "there is no /dev/full"; return; }
    why=
    for program in $programs; do
        "$program" "$@" >/dev/full 2>"$work/stderr"
        status=$?
        echo "train: error: stdout: cannot be written: No space left on device" | cmp -s - "$work/stderr" &&
            [ $status -eq 1 ] || why="status $status: $(head -1 "$work/stderr")"
        rm -rf "$out"
    done
    verdict "$name" "$why"
}
full help help
full "help of models" help model
full env env --nproc-per-node 2
full eval eval --checkpoint "$model" --limit-val 9
# shellcheck disable=SC2086
full train $small --max-steps 1 --quiet --output-dir "$out"

[ "$(sums)" = "$before" ] && why= || why="its files have changed"
verdict "an existing run is as it was" "$why"
exit $failed
