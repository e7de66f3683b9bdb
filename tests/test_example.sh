#!/bin/sh
# vit.h and dist.h in another program: example.c, built outside of this tree with nothing but the include path
# and vit_cpu.c. tests/test_example.sh; CC is the compiler.
set -u
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$PWD
failed=0

# build NAME COMPILER FLAGS-AND-SOURCES: no warning, and the program says how the loss fell.
build() {
    name=$1
    shift
    if ! (cd "$work" && "$@" -Wall -Wextra -Werror -I"$root" "$root/vit_cpu.c" -lm -lpthread -o program) \
        >"$work/log" 2>&1; then
        echo "not ok $name: $(head -1 "$work/log")"
    elif ! "$work/program" >"$work/log" 2>&1; then
        echo "not ok $name: it failed, $(tail -1 "$work/log")"
    elif ! grep -q '^loss [0-9.]* before, [0-9.]* after' "$work/log"; then
        echo "not ok $name: $(head -1 "$work/log")"
    else
        echo "ok $name"
        return
    fi
    failed=1
}

cp tests/example.c "$work/example.c"
cc=${CC:-cc}
build "example" "$cc" -O2 example.c
build "example as C11 for this machine, with OpenMP" "$cc" -std=gnu11 -O3 -march=native -fopenmp example.c
if command -v clang >/dev/null; then
    build "example with clang" clang -O2 example.c
else
    echo "skip example with clang: clang is not installed"
fi
# Another source of the program includes the headers too, but has not their implementation.
cat >"$work/second.c" <<'C'
#include "vit.h"
#include "dist.h"
const char *name_of_a_model(void) { return dist_strategy_named("ddp") ? vit_config_name(0) : NULL; }
C
sed 's/#define VIT_IMPLEMENTATION/&\n#define DIST_IMPLEMENTATION/; s/#include "vit.h"/&\n#include "dist.h"/' \
    "$work/example.c" >"$work/first.c"
build "headers in two sources of one program" "$cc" -O2 first.c second.c
exit $failed
