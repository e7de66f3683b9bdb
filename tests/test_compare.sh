#!/bin/sh
# train compare: its table, Markdown and picture against what the runs themselves wrote.
# tests/test_compare.sh [BUILD]. Prints "ok", "not ok" or "skip" before the name of each case. Needs jq.
# (What compare refuses to begin stands in test_errors.sh.)
set -u
. tests/lib.sh
small='--embed-dim 16 --depth 2 --num-heads 2 --limit-train 100 --limit-val 50'

# compare NAME STRATEGIES OPTIONS: writes to $work/NAME; its stdout and stderr lie beside it.
compare() {
    directory=$work/$1 strategies=$2
    shift 2
    # shellcheck disable=SC2086
    "$train" compare --strategies "$strategies" --output-dir "$directory" $small "$@" \
        >"$directory.out" 2>"$directory.err" && return
    echo "status $? of compare $strategies $*: $(tail -1 "$directory.err")"
    return 1
}
# The cell of a strategy in compare.md: cell NAME TABLE ROW STRATEGY. Rows below another row are ROW/BELOW.
cell() {
    awk -F ' *[|] *' -v table="$2" -v row="$3" -v strategy="$4" '
        /^[|]:/ { next }
        !/^[|]/ { inside = 0; next }
        $2 == table { inside = 1; for (i = 3; i < NF; i++) if ($i == strategy) column = i }
        $2 ~ /^(formula|sent by a rank, MB|most by one rank|relative to .*)$/ { name = above "/" $2 }
        $2 !~ /^(formula|sent by a rank, MB|most by one rank|relative to .*)$/ { name = above = $2 }
        inside && column && name == row { print $column }' "$work/$1/compare.md"
}
# What metrics.jsonl of a run says, scaled and printed: said NAME STRATEGY FORMAT FILTER
said() { jq -s "$4" "$work/$1/$2/metrics.jsonl" | xargs printf "$3"; }
same() { [ "$2" = "$3" ] || echo "$1: found '$2', expected '$3'"; } # WHAT FOUND EXPECTED
fullest='[.[] | select(.event == "memory")] | max_by([.total_peak_bytes, -.rank])'
traffic='[.[] | select(.event == "communication")]'

# The cells of one strategy against its own metrics.jsonl.
cells() { # NAME STRATEGY
    memory="memory at rest, MB"
    for category in parameters gradients optimizer activations communication workspace; do
        bytes=$(said "$1" "$2" %.3f "$fullest.${category}_bytes / 1e6")
        same "$2 $category" "$(cell "$1" "$memory" $category "$2")" "$bytes"
        case $category in
        activations | workspace) formula=- ;;
        *) formula="= $bytes" ;;
        esac
        same "$2 formula of $category" "$(cell "$1" "$memory" $category/formula "$2")" "$formula"
    done
    same "$2 total" "$(cell "$1" "$memory" total "$2")" "$(said "$1" "$2" %.3f "$fullest
        | (.parameters_bytes + .gradients_bytes + .optimizer_bytes + .activations_bytes
            + .communication_bytes + .workspace_bytes) / 1e6")"
    same "$2 peak" "$(cell "$1" "$memory" "total, peak" "$2")" \
        "$(said "$1" "$2" %.3f "$fullest.total_peak_bytes / 1e6")"
    table="traffic of a step, elements"
    for op in all_reduce reduce_scatter all_gather broadcast reduce control; do
        of="$traffic | map(select(.op == \"$op\"))"
        if [ "$(said "$1" "$2" %d "$of | length")" -eq 0 ]; then
            found=$(cell "$1" "$table" $op "$2")
            same "$2 $op" "${found:--}" -
            continue
        fi
        elements=$(said "$1" "$2" %.0f "${of}[0].elements_per_step")
        same "$2 $op" "$(cell "$1" "$table" $op "$2")" "$elements"
        same "$2 formula of $op" "$(cell "$1" "$table" $op/formula "$2")" "= $elements"
        same "$2 sent by $op" "$(cell "$1" "$table" "$op/sent by a rank, MB" "$2")" \
            "$(said "$1" "$2" %.3f "$of | map(.wire_bytes_per_step) | add / length / 1e6")"
    done
    sent="$traffic | group_by(.rank) | map(map(.wire_bytes_per_step) | add)"
    same "$2 sent" "$(cell "$1" "$table" "total sent, MB" "$2")" \
        "$(said "$1" "$2" %.3f "$sent | add / length / 1e6")"
    same "$2 sent by one" "$(cell "$1" "$table" "total sent, MB/most by one rank" "$2")" \
        "$(said "$1" "$2" %.3f "$sent | max / 1e6")"
    same "$2 last loss" "$(cell "$1" numbers "last loss" "$2")" \
        "$(said "$1" "$2" %.6f '[.[] | select(.event == "step")][-1].train_loss')"
    same "$2 accuracy" "$(cell "$1" numbers "validation accuracy" "$2")" \
        "$(said "$1" "$2" %.4f '[.[] | select(.event == "eval")][-1].val_accuracy')"
    same "$2 time" "$(cell "$1" "time of a step, ms" median "$2")" "$(said "$1" "$2" %.2f \
        '[.[] | select(.event == "step").step_time_s] | sort | length as $n
            | 1000 * (.[($n - 1) / 2 | floor] + .[$n / 2 | floor]) / 2')"
}

# Losses, norms and weights are equal, and compare says so: equal NAME STRATEGIES
equal() {
    first=${2%%,*}
    for strategy in $(echo "$2" | tr , ' '); do
        for kind in losses weights; do
            row="losses and norms" expected=equal
            [ $kind = weights ] && row="final weights"
            [ "$strategy" = "$first" ] && expected=reference
            same "$strategy $kind" "$(cell "$1" numbers "$row" "$strategy")" $expected
        done
        for which in "$first" "$strategy"; do
            jq 'select(.event == "step") | .train_loss, .grad_norm' "$work/$1/$which/metrics.jsonl" \
                >"$work/$which.steps"
        done
        cmp "$work/$first.steps" "$work/$strategy.steps" 2>&1
        last=$(cat "$work/$1/$strategy/checkpoints/latest")/model.safetensors
        cmp "$work/$1/$first/checkpoints/$last" "$work/$1/$strategy/checkpoints/$last" 2>&1
    done
    for file in .out /compare.md /compare.svg; do
        grep -q "all losses, gradient norms and final weights are equal, bit for bit" "$work/$1$file" ||
            echo "$1$file does not say that all is equal"
    done
}

all=dp,ddp,zero1,zero2,zero3
for case in "2 every" "3 every" "2 last"; do
    n=${case% *} run=all-$n-${case#* }
    why=$(compare "$run" $all --nproc-per-node "$n" --batch-size 6 --gradient-accumulation-steps 2 \
        --gradient-reduction "${case#* }" --epochs 2 --quiet) && why=$(equal "$run" $all)
    verdict "all strategies are equal: $n ranks, reduction ${case#* }" "$(echo "$why" | head -1)"
    for strategy in dp ddp zero1 zero2 zero3; do
        why=$(cells "$run" $strategy | head -1)
        verdict "the table says what the run wrote: $strategy, $n ranks, reduction ${case#* }" "$why"
    done
done
why=$(compare one single,ddp,zero3 --batch-size 8 --max-steps 5 --quiet --log-interval 100) &&
    why=$(equal one single,ddp,zero3)
verdict "strategies on one rank, few lines of metrics" "$(echo "$why" | head -1)"

# ------------------------------------------------------------------------------------------------- the files

run="all-2-every"
# Every line of a table has as many cells; the cells are those of the text.
markdown() {
    awk -F '|' '/^[|]/ { if (NF != 8) print "line " NR " has " NF - 2 " cells"; rows++ }
        /^[|]:/ { rules++ } END { if (rules != 4 || rows < 30) print rules " tables of " rows " lines" }' \
        "$work/$run/compare.md"
    grep '^|' "$work/$run/compare.md" | grep -v '^|:' | tr -d ' |' >"$work/cells.md"
    sed -n '5,/^Memory and/p' "$work/$run.out" | grep -v '^Memory and' | tr -d ' ' |
        sed '/^$/d' >"$work/cells.out"
    cmp "$work/cells.md" "$work/cells.out" 2>&1
    grep -qF '](compare.svg)' "$work/$run/compare.md" || echo "the picture is missing"
}
verdict "Markdown" "$(markdown | head -1)"
stands_alone() {
    sed -n 1p "$work/$run.out" | grep -v \
        "^ViT of 8x8 images, patch 2, dim 16, depth 2, heads 2, 10 classes: [0-9]* parameters$"
    batch="24 images = 6 batch size x 2 accumulation x 2 ranks"
    same "the second line" "$(sed -n 2p "$work/$run.out")" \
        "digits, fp32: 8 steps of $batch; gradient reduction every"
}
verdict "the table stands alone" "$(stands_alone | head -1)"

# What the bars stand for: STRATEGY PART MB, of memory, of memory without what all have alike, of traffic.
bars() {
    for strategy in dp ddp zero1 zero2 zero3; do
        jq -r -s --arg strategy $strategy "($fullest | to_entries[]
                | select((.key | test(\"_bytes\")) and (.key | test(\"peak\") | not) and .value > 0)
                | \"\(\$strategy) \(.key | sub(\"_bytes\"; \"\")) \(.value)\"),
            ($traffic | group_by(.op)[] | [.[0].op, (map(.wire_bytes_per_step) | add / length)]
                | select(.[1] > 0) | \"\(\$strategy) \(.[0]) \(.[1])\")" "$work/$run/$strategy/metrics.jsonl"
    done | awk '{ printf "%s %s %.6f\n", $1, $2, $3 / 1e6 }
        $2 ~ /param|grad|optim|comm/ { printf "%s %s %.6f\n", $1, $2, $3 / 1e6 }' | sort
}
# They are that long, to one scale in each of the four pictures.
picture() {
    sed -n 's/.*font-weight="bold".*/picture/p
        s/.* width="\([0-9.]*\)" .*<title>\(.*\) \(.*\): \(.*\) \(MB\|ms\)<.*/\2 \3 \4 \1 \5/p' \
        "$work/$run/compare.svg" >"$work/bars"
    grep ' MB$' "$work/bars" | cut -d ' ' -f 1-3 | sort >"$work/bars.found"
    bars >"$work/bars.expected"
    diff "$work/bars.expected" "$work/bars.found" | sed -n 's/^[<>]/bar: &/p'
    [ "$(wc -l <"$work/bars.found")" -gt 50 ] || echo "$(wc -l <"$work/bars.found") bars"
    awk '/^picture/ { pictures++; next }
        { width[NR] = $4; value[NR] = $3; of[NR] = pictures; if ($4 > longest[pictures]) {
            longest[pictures] = $4; scale[pictures] = $4 / $3 } }
        END { for (i = 1; i <= NR; i++) { d = width[i] - value[i] * scale[of[i]]
                  if (d * d > 0.01) print "a bar of " value[i] " is " width[i] " long" }
              if (pictures != 4) print pictures " pictures" }' "$work/bars"
}
verdict "the bars of the picture" "$(picture | head -1)"
if command -v xmllint >/dev/null; then
    verdict "the picture is XML" "$(xmllint --noout "$work/$run/compare.svg" 2>&1 | head -1)"
elif command -v python3 >/dev/null; then
    verdict "the picture is XML" "$(python3 -c 'import sys, xml.dom.minidom as x; x.parse(sys.argv[1])' \
        "$work/$run/compare.svg" 2>&1 | tail -1)"
else
    skip "the picture is XML" "neither xmllint nor python3 is there"
fi

# ------------------------------------------------------------------------------------------ runs and refusals

of_run() { # each is a run like any other
    same options "$(jq -c '.options | [.strategy, .["gradient-reduction"], .strategies]' \
        "$work/$run/zero3/config.json")" '["zero3","every",null]'
    "$train" --config "$work/$run/zero3/config.json" --output-dir "$work/again" >"$work/again.out" 2>&1 ||
        tail -1 "$work/again.out"
    cmp "$work/again/checkpoints/step-00000008/model.safetensors" \
        "$work/$run/ddp/checkpoints/step-00000008/model.safetensors" 2>&1
}
verdict "each run can be run again by its config.json" "$(of_run | head -1)"
same "stderr" "$(cat "$work/$run.err")" "" >"$work/why"
why=$(compare loud zero1,fsdp --nproc-per-node 2 --max-steps 2)
[ "$(grep '^strategy [12] of' "$work/loud.err" | tr '\n' ';')" = \
    "strategy 1 of 2: zero1;strategy 2 of 2: zero3;" ] ||
    why="$why: stderr does not say which strategy runs"
[ "$(grep -c '^results: ' "$work/loud.out")" -eq 1 ] || why="$why: stdout has the results of single runs"
[ -d "$work/loud/zero3" ] || why="$why: no folder zero3"
verdict "progress; fsdp is zero3; --quiet has none" "$why$(cat "$work/why")"

fails() { # NAME PATTERN DIRECTORY STRATEGIES
    name=$1 pattern=$2
    find "$work/$3" | sort >"$work/before"
    "$train" compare --strategies "$4" --output-dir "$work/$3" --quiet --max-steps 2 --nproc-per-node 2 \
        >"$work/stdout" 2>"$work/stderr"
    why="$(same status $? 1)$(cat "$work/stdout")"
    [ "$(wc -l <"$work/stderr")" -eq 1 ] || why="$why: stderr has $(wc -l <"$work/stderr") lines"
    grep -q "^train: error: $pattern" "$work/stderr" || why="$why: found $(cat "$work/stderr")"
    verdict "$name" "$why"
}
unchanged() {
    find "$work/$1" | sort | cmp - "$work/before" >/dev/null || bad "$name" "the directory has changed"
}
fails "a directory that holds a comparison" \
    ".*/loud: found compare.md, so it already holds a comparison" loud ddp
unchanged loud
fails "a directory that holds a run" \
    ".*/loud/zero1: found config.json, so it already holds a run" loud/zero1 ddp
unchanged loud/zero1
rm "$work/loud/compare.md"
fails "a strategy's directory that holds a run" ".*/loud/zero3: found config.json" loud ddp,zero3
unchanged loud
mkdir "$work/half"
: >"$work/half/zero1"
fails "one strategy fails" \
    "compare: strategy zero1: .*half/zero1: cannot be made a directory" half ddp,zero1,zero2
[ -e "$work/half/ddp/metrics.jsonl" ] || bad "one strategy fails" "the one before it left nothing"
[ -e "$work/half/zero2" ] && bad "one strategy fails" "the one after it has run"

exit $failed
