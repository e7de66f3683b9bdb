#!/bin/sh
# Every command of the chapters of docs/, run again: what it prints must be what the chapter shows, but for
# times (numbers before "s", "ms" or "images/s", and shares and ratios of them). tests/test_docs.sh [BUILD]
set -u
. tests/lib.sh

without_times() {
    sed -E 's/ +[0-9.]+( (ms|s|images\/s))/ T\1/g; s/(wait|left) +[0-9:]+( %)?/\1 T/g; s/ +[0-9.]+ x$/ T x/'
}

for chapter in docs/[0-9]*.md; do
    commands=$(grep -c '^\$ ' "$chapter")
    scripts/docs.sh "$chapter" | without_times >"$work/new"
    without_times <"$chapter" >"$work/old"
    verdict "$chapter: $commands commands" "$(diff "$work/old" "$work/new" | head -5)"
done
