#!/bin/sh
# A strategy is a page of code: at most 80 lines each, no identifier of a device, no comparison of names.
#   tests/test_strategies.sh
# The rule: to a strategy belong its row of the table, the hooks that it names, and every function that these
# call, directly or not, unless another strategy or common code uses it too: then it is common code. (zero1
# and zero2 have the same hooks: what they share counts for both.) All lines of a function count, the comment
# before it and blank lines within it included.
set -u
. tests/lib.sh
most=80

# uncommented FILE: the file without comments, line by line
uncommented() {
    awk '{ out = ""
        while (length($0)) {
            if (inside) {
                if (!(i = index($0, "*/"))) break
                $0 = substr($0, i + 2); inside = 0
            } else {
                if ((j = index($0, "//")) && (!(i = index($0, "/*")) || j < i)) $0 = substr($0, 1, j - 1)
                if (!(i = index($0, "/*"))) { out = out $0; break }
                out = out substr($0, 1, i - 1); $0 = substr($0, i + 2); inside = 1
            }
        }
        print out }' "$1"
}

# lines_of FILE: for each row of the table of strategies a line "NAME LINES FUNCTION..."
lines_of() {
    uncommented "$1" >"$work/code"
    awk '
    function words(text, list) { gsub(/[^A-Za-z0-9_]+/, " ", text); return split(text, list, " ") }
    function reach(f, who,    i, n, list) { # who uses f, and all that f calls
        if ((f, who) in used) return
        used[f, who] = 1
        n = words(body[f], list)
        for (i = 1; i <= n; i++) if (list[i] in lines) reach(list[i], who)
    }
    { getline code <"'"$work/code"'" }
    /^\/\* =+ implementation/ { implementation = 1; next }
    !implementation { next }
    /^static const dist_strategy / { table = 1; next }
    table && /^}/ { table = 0; next }
    table {
        if (code ~ /^ *{"/) { split(code, quoted, "\""); row = ++rows; name[row] = quoted[2] }
        if (row) row_lines[row]++
        row_text[row] = row_text[row] " " code
        next
    }
    !current && /^$/ { before = 0; next } # what stands before a blank line belongs to nothing
    !current && code ~ /^[a-z].*\(/ && code !~ /;$/ { # a function begins
        head = code; sub(/\(.*/, "", head); sub(/.*[ *]/, "", head)
        current = head; order[++functions] = head; lines[head] = before; before = 0
        if (code !~ /^static/) public[head] = 1
        code = substr(code, index(code, "("))
    }
    current { lines[current]++; body[current] = body[current] " " code }
    current && /}$/ && (/^}/ || /^[a-z]/) { current = ""; next }
    !current { before++ }
    END {
        for (r = 1; r <= rows; r++) {
            n = words(row_text[r], list)
            for (i = 1; i <= n; i++) {
                if (!(list[i] in lines)) continue
                reach(list[i], r)
                hooks[r] = hooks[r] " " list[i]
            }
        }
        for (f in public) reach(f, "common")
        for (r = 1; r <= rows; r++) {
            total = row_lines[r]; own = ""
            for (i = 1; i <= functions; i++) {
                f = order[i]
                mine = (f, r) in used && !((f, "common") in used)
                for (s = 1; s <= rows; s++) if ((f, s) in used && hooks[s] != hooks[r]) mine = 0
                if (mine) { total += lines[f]; own = own " " f }
            }
            print name[r], total own
        }
    }' "$1"
}

# too_long FILE: what is wrong with the lengths of its strategies
too_long() {
    lines_of "$1" >"$work/lines"
    for s in single dp ddp zero1 zero2 zero3; do
        grep -q "^$s [1-9]" "$work/lines" || echo "strategy $s not found in the table"
    done
    awk -v most=$most '$2 > most { print $1 " has " $2 " lines, expected at most " most }' "$work/lines"
}

# device_words FILE: identifiers of devices and conditional code in what strategies are made of
device_words() {
    uncommented "$1" >"$work/code"
    awk '{ getline code <"'"$work/code"'" }
    /^\/\* -+ what strategies are made of/ { strategies = 1; found = 1 }
    /^\/\* -+ the training loop/ { strategies = 0 }
    strategies && code ~ /^ *#/ && code !~ /^#(ifdef DIST_DEBUG|else|endif)$/ { print FNR ": " code }
    strategies && code ~ /device->name/ { print FNR ": device->name" }
    strategies {
        gsub(/[^A-Za-z0-9_]+/, " ", code)
        n = split(tolower(code), list, " ")
        for (i = 1; i <= n; i++)
            if (list[i] ~ /^(vit_(cpu|cuda|sim)|cuda|cublas|openblas|cblas|omp$|omp_|nccl|choice_device)/)
                print FNR ": " list[i]
    }
    END { if (!found) print "no section of what strategies are made of" }' "$1"
}

# name_comparisons FILE: what decides by the name of a strategy
name_comparisons() {
    uncommented "$1" | tr '\n' ' ' | sed 's/[;{}]/&\
/g' >"$work/statements"
    names='single|dp|ddp|zero[0-9]|fsdp'
    grep -Eo "(str[a-z]*cmp|memcmp|strstr) *\([^;]*\"($names)\"" "$work/statements"
    choice='CHOICE_STRATEGY_[A-Z0-9]+'
    grep -Eo "([=!<>]=|[^-]>|<|case) *$choice|$choice *([=!]=|[<>])" "$work/statements"
    grep -Eo "[=!]= *&?(single|dp|ddp|zero[0-9]?)_[a-z_]+" "$work/statements"
}

# planted NAME CHECK PATTERN SED-SCRIPT [FILE]: in a copy with this change the check finds the pattern
planted() {
    file=${5:-dist.h}
    sed "$4" "$file" >"$work/bad_$file"
    why=
    if cmp -s "$file" "$work/bad_$file"; then why="the change found no place"
    elif ! $2 "$work/bad_$file" | grep -q -- "$3"; then why="it was not noticed"; fi
    verdict "$1" "$why"
}

too_long dist.h >"$work/why"
while read -r name lines functions; do
    why=$(grep "strategy $name \|^$name has" "$work/why")
    verdict "$name is $lines lines:${functions:+ $functions}" "$why"
done <"$work/lines"
verdict "every strategy is in the table" "$(grep 'not found' "$work/why" | tr '\n' ' ')"
verdict "no identifier of a device in the strategies" "$(device_words dist.h | tr '\n' ' ')"
why=
for file in *.c *.h io/*.h data/*.h; do
    found=$(name_comparisons "$file")
    [ -z "$found" ] || why="$why$file: $found "
done
verdict "no comparison of strategy names" "$why"

# The checks themselves, on bad copies.
long=$(awk 'BEGIN { for (i = 0; i < 81; i++) printf "%s    d->slots += 0;", i ? "\\\n" : "" }')
helper="static void helper(dist *d) {\\
$long\\
}\\
"
planted "a long hook is noticed" too_long '^zero3 has' "/^static void zero3_free/a\\
$long"
planted "a long helper is noticed" too_long '^zero3 has' "/^static void zero3_step/i\\
$helper
/^static void zero3_step/a\\
    helper(d);"
planted "a long hook of both zero1 and zero2 is noticed" too_long '^zero1 has' "/^static void zero_step/a\\
$long"
sed "/^static int ddp_open/i\\
$helper
/^static void zero3_step/a\\
    helper(d);
/^static void ddp_step/a\\
    helper(d);" dist.h >"$work/common.h"
why=$(too_long "$work/common.h")
[ "$(grep -c '^    helper(d);' "$work/common.h")" -eq 2 ] || why="the change found no place"
verdict "a helper of two strategies is common code" "$why"
planted "a missing strategy is noticed" too_long 'zero2 not found' 's/{"zero2", NULL/{"zero9", NULL/'
planted "a device is noticed" device_words vit_cpu '/^static void zero_step/a\
    vit_cpu.fill(NULL, (rt_block){0}, 0);'
planted "conditional code is noticed" device_words HAVE_CUDA '/^static void zero_step/a\
#ifdef HAVE_CUDA'
planted "a compared name is noticed" name_comparisons zero3 '/^static void dist__update/a\
    if (!strcmp(d->strategy->name,\
                "zero3")) return;'
planted "a compared hook is noticed" name_comparisons zero3_step '/^static void dist__update/a\
    if (d->strategy->step == zero3_step) return;'
planted "a compared choice is noticed" name_comparisons CHOICE_STRATEGY_ZERO3 '/^int main(/a\
    if (argc == CHOICE_STRATEGY_ZERO3) return 1;' train.c
exit "$failed"
