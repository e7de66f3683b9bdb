#!/bin/sh
# Ranks that disagree or leave early: each planted fault of mismatch.c is reported at once, as it should be.
#   tests/test_mismatch.sh BUILD        where BUILD/plain/mismatch is
set -u
mismatch=$1/plain/mismatch
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
any_failed=0
header='^  rank state    communicator   sequence operation           elements  unit$'

# row RANK STATE SEQUENCE OPERATION COUNT UNIT: a line of the table, as a pattern
row() { echo "^ +$1 $2 +world +$3 $4 +$5  $6\$"; }

# says PATTERN: it stands on stderr
says() { grep -Eq -- "$1" "$work/stderr"; }

# check NAME MESSAGE ROW...: the run fails with this message and a table with these rows; no ROW: no table
check() {
    name=$1 message=$2 why=
    shift 2
    timeout 10 "$mismatch" "$name" >"$work/stdout" 2>"$work/stderr"
    status=$?
    [ "$status" -eq 1 ] || why="exit status $status, expected 1"
    [ "$(grep -c '^train: error: ' "$work/stderr")" -eq 1 ] || why="not exactly one line begins train: error:"
    says "^train: error: $message\$" || why="no message like: $message"
    if [ $# -gt 0 ]; then lines=5; says "$header" || why="no table"; else lines=1; fi
    [ "$(wc -l <"$work/stderr")" -eq "$lines" ] || why="not $lines lines"
    for pattern; do says "$pattern" || why="no row like: $pattern"; done
    awk '$1 > 1 { exit 1 }' "$work/stdout" || why="reported after $(cat "$work/stdout")"
    report
}

# prints what became of $name: $why is empty where all is well
report() {
    if [ -z "$why" ]; then
        echo "ok mismatch $name"
    else
        echo "not ok mismatch $name: $why"
        sed 's/^/    /' "$work/stderr"
        any_failed=1
    fi
}

name=0 why=
timeout 10 "$mismatch" 0 >"$work/stdout" 2>"$work/stderr" || why="exit status $?, expected 0"
[ -s "$work/stderr" ] && why="stderr is not empty"
report

ranks='ranks [012] and [012] disagree on the'
check wrong_operation "$ranks operation of launch 1 of communicator world: .*" \
    "$(row 1 '[a-z]+' 1 reduce 48 embedding)" "$(row '[02]' '[a-z]+' 1 broadcast 48 embedding)"
check wrong_count "$ranks count of launch 0 of communicator world: .*" \
    "$(row 1 '[a-z]+' 0 all_reduce 176 'block 0')" "$(row '[02]' '[a-z]+' 0 all_reduce 192 'block 0')"
check wrong_type "$ranks type of launch 1 of communicator world: .*" \
    "$(row 1 '[a-z]+' 1 broadcast 48 embedding)"
check wrong_root "$ranks root of launch 1 of communicator world: .*" \
    "$(row 1 '[a-z]+' 1 broadcast 48 embedding)"
check wrong_unit "$ranks unit of launch 0 of communicator world: .*" \
    "$(row 1 '[a-z]+' 0 all_reduce 192 'block 1')" "$(row '[02]' '[a-z]+' 0 all_reduce 192 'block 0')"
check swapped_order "$ranks unit of launch 0 of communicator world: .*" \
    "$(row 1 '[a-z]+' 0 all_reduce 192 'block 0')" "$(row '[02]' '[a-z]+' 0 all_reduce 96 head)"
check other_group "$ranks number of calls of launch 0 of communicator world: .*" \
    "$(row 1 '[a-z]+' 0 all_reduce 96 head)"
check skips_one "$ranks operation of launch 1 of communicator world: .*" \
    "$(row 1 '[a-z]+' 1 control 8 step)" "$(row '[02]' '[a-z]+' 1 broadcast 48 embedding)"
check one_call_more "rank [02] left while rank 1 waits for it in barrier 3 \(epoch\)" \
    "$(row 1 '[a-z]+' 3 barrier 0 epoch)" "$(row '[02]' left 2 control 8 step)"
check returns_early 'rank 1 left while rank [02] waits for it in [a-z]+ [01] \((embedding|activation)\)' \
    "$(row 1 left 0 all_reduce 96 head)"
check fails 'rank 1: the images cannot be read'
check send_without_recv 'deadlock: .*' "$(row 0 waiting 1 broadcast 48 embedding)" \
    "$(row 1 waiting 0 send 64 activation)" "$(row 2 waiting 0 recv 64 activation)"
check send_of_other_count "$ranks count of launch 0 of communicator world: .*" \
    "$(row 1 '[a-z]+' 0 send 32 activation)" "$(row 2 '[a-z]+' 0 recv 64 activation)"
check other_bucket_size "$ranks unit of launch 0 of communicator world: .*" \
    "$(row 1 '[a-z]+' 0 all_reduce '[0-9]+' head)" "$(row '[02]' '[a-z]+' 0 all_reduce '[0-9]+' embedding)"
check fewer_micro_batches "$ranks operation of launch 1 of communicator world: .*" \
    "$(row 1 '[a-z]+' 1 control '[0-9]+' step)" "$(row '[02]' '[a-z]+' 1 all_reduce '[0-9]+' embedding)"
exit $any_failed
