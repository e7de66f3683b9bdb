#!/bin/sh
# Fuzzes each parser for a number of seconds, from valid files on: tests/fuzz.sh SECONDS NAME...
# Each prints how many inputs it accepted and rejected; a finding ends the run with its input in build/fuzz/.
set -eu
seconds=$1
shift
status=0
for name in "$@"; do
    corpus=build/fuzz/corpus-$name
    mkdir -p "$corpus"
    build/fuzz/"$name" --make-corpus "$corpus" >/dev/null
    if build/fuzz/"$name" -max_total_time="$seconds" -max_len=20000 \
        -artifact_prefix=build/fuzz/finding-"$name"- "$corpus" >build/fuzz/"$name".log 2>&1; then
        echo "fuzz $name: $seconds s, no finding, $(grep -a accepted build/fuzz/"$name".log | tail -1)"
    else
        echo "fuzz $name: a finding, see build/fuzz/$name.log" >&2
        status=1
    fi
done
exit $status
