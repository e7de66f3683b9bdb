#!/bin/sh
# Runs test programs and shell tests, shows what failed, and ends with "N passed, N failed, N skipped".
#   tests/run.sh PROGRAM... SCRIPT.sh...
# A program is a cmocka test (it prints [  PASSED  ] and so on); a script prints ok, not ok or skip before
# each name.
set -u
export OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=1000 # ranks are threads: they must not spin on busy cores
export UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1:allocator_may_return_null=1
log=$(mktemp)
trap 'rm -f "$log"' EXIT
passed=0 failed=0 skipped=0

# count WORD: the sum of the numbers in cmocka's closing lines "[  WORD  ] N test(s)".
count() {
    sed -n "s/^\[ *$1 *\] \([0-9][0-9]*\) test(s).*/\1/p" "$log" | awk '{ n += $1 } END { print n + 0 }'
}

for test in "$@"; do
    begin=$(date +%s)
    case $test in
    *.sh)
        sh "$test" build >"$log" 2>&1
        status=$?
        p=$(grep -c '^ok ' "$log"); f=$(grep -c '^not ok ' "$log"); s=$(grep -c '^skip ' "$log")
        ;;
    *)
        "$test" >"$log" 2>&1
        status=$?
        p=$(count PASSED); f=$(count FAILED); s=$(count SKIPPED)
        ;;
    esac
    # a program that ended badly without saying which test failed, or that ran nothing, has failed itself
    [ "$status" -ne 0 ] && [ "$f" -eq 0 ] && f=1
    [ $((p + f + s)) -eq 0 ] && f=1
    printf '%-28s %4d passed %3d failed %3d skipped  %3d s\n' "$test" "$p" "$f" "$s" $(($(date +%s) - begin))
    if [ "$f" -ne 0 ]; then sed 's/^/    /' "$log" | tail -60
    else grep -E '^skip |SKIPPED|skipped: ' "$log" | grep -v 'test(s)' | sed 's/^/    /'; fi
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
