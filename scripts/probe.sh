#!/bin/sh
# Finds out, by compiling and linking, what this machine has: scripts/probe.sh CC CFLAGS OUTPUT.mk
# Writes make variables to OUTPUT.mk and prints a table.
set -u
cc=$1 flags=$2 output=$3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# try HEADER FLAGS: can a program that includes the header be linked?
try() {
    printf '#include <stdio.h>\n#include <%s>\nint main(void) { return 0; }\n' "$1" >"$work/t.c"
    $cc $flags "$work/t.c" -o "$work/t" $2 2>/dev/null
}

row() { printf '  %-14s %-10s %s\n' "$1" "$2" "$3"; }

: >"$output"
missing=""
echo "what this machine has:"
if try omp.h -fopenmp; then row OpenMP found "threads inside a rank"; echo "OPENMP := -fopenmp" >>"$output"
else row OpenMP "not found" "one thread a rank"; fi
if try cjson/cJSON.h -lcjson; then row cJSON found "configuration files"; else row cJSON "NOT FOUND" "required: libcjson-dev"; missing=1; fi
if try zlib.h -lz; then row zlib found "MNIST in gzip"; else row zlib "NOT FOUND" "required: zlib1g-dev"; missing=1; fi
blas=""
for candidate in "-lopenblas" "-I/usr/include/openblas -lopenblas"; do
    [ -z "$blas" ] && try cblas.h "$candidate" && blas=$candidate
done
if [ -n "$blas" ]; then
    row OpenBLAS found "a second matrix product (--matmul openblas)"
    echo "BLAS_CFLAGS := -DHAVE_OPENBLAS ${blas% *}" | sed 's/ -lopenblas$//' >>"$output"
    echo "BLAS_LIBS := -lopenblas" >>"$output"
else row OpenBLAS "not found" "--matmul own only"; fi
cuda=${CUDA_HOME:-/usr/local/cuda}
if [ -x "$cuda/bin/nvcc" ] || command -v nvcc >/dev/null; then row CUDA found "nothing yet: --device cuda is not built yet"
else row CUDA "not found" "--device cuda is not built yet"; fi
if try nccl.h "-I$cuda/include -L$cuda/lib64 -lnccl"; then row NCCL found "nothing yet: --backend nccl is not built yet"
else row NCCL "not found" "--backend nccl is not built yet"; fi
if command -v mpicc >/dev/null; then row MPI found "nothing yet: --backend mpi is not built yet"
else row MPI "not found" "--backend mpi is not built yet"; fi
[ -z "$missing" ] || { echo "required libraries are missing; scripts/install.sh build installs them" >&2; rm -f "$output"; exit 1; }
