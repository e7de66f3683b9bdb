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

# need NAME HEADER FLAGS USE PACKAGE: a row for what the program cannot do without
missing=""
need() {
    if try "$2" "$3"; then row "$1" found "$4"
    else
        row "$1" "NOT FOUND" "required: $5"
        missing=1
    fi
}

: >"$output"
echo "what this machine has:"
if try omp.h -fopenmp; then
    row OpenMP found "threads inside a rank"
    echo "OPENMP := -fopenmp" >>"$output"
else
    row OpenMP "not found" "one thread a rank"
fi
need cJSON cjson/cJSON.h -lcjson "configuration files" libcjson-dev
need zlib zlib.h -lz "MNIST in gzip" zlib1g-dev
need stb_image stb/stb_image.h "" "PNG images" libstb-dev
if try jpeglib.h -ljpeg; then
    row libjpeg-turbo found "JPEG images"
    printf 'JPEG_CFLAGS := -DHAVE_JPEG\nJPEG_LIBS := -ljpeg\n' >>"$output"
else
    row libjpeg-turbo "not found" "JPEG images by stb_image: slower, and not quite Pillow's pixels"
fi
if try cblas.h -lopenblas; then
    row OpenBLAS found "a second matrix product (--matmul openblas)"
    printf 'BLAS_CFLAGS := -DHAVE_OPENBLAS\nBLAS_LIBS := -lopenblas\n' >>"$output"
else
    row OpenBLAS "not found" "--matmul own only"
fi
cuda=${CUDA_HOME:-/usr/local/cuda}
nvcc=$cuda/bin/nvcc
if [ ! -x "$nvcc" ] && command -v nvcc >/dev/null; then
    nvcc=$(command -v nvcc)
    cuda=${nvcc%/bin/nvcc}
fi
libs="-L$cuda/lib64 -Wl,-rpath,$cuda/lib64 -lcudart -ldl -lstdc++"
if [ -x "$nvcc" ] && try cublasLt.h "-I$cuda/include $libs -lcublasLt"; then
    row CUDA found "--device cuda"
    printf 'NVCC := %s\nCUDA_CFLAGS := -DHAVE_CUDA\nCUDA_LIBS := %s\n' "$nvcc" "$libs" >>"$output"
else
    row CUDA "not found" "no --device cuda: it needs nvcc and cuBLASLt"
fi
if [ -x "$nvcc" ] && try nccl.h "-I$cuda/include $libs -lnccl"; then
    row NCCL found "--backend nccl"
    printf 'NCCL_CFLAGS := -DHAVE_NCCL -I%s\nNCCL_LIBS := -L%s -lnccl\n' "$cuda/include" "$cuda/lib64" >>"$output"
else
    row NCCL "not found" "no --backend nccl"
fi
mpi=$(mpicc -show 2>/dev/null | cut -d ' ' -f 2- || true) # of any MPI: what its compiler adds
if [ -n "$mpi" ] && try mpi.h "$mpi"; then
    row MPI found "--backend mpi"
    printf 'MPI_CFLAGS := -DHAVE_MPI %s\nMPI_LIBS := %s\n' \
        "$(echo "$mpi" | tr ' ' '\n' | grep '^-[ID]' | tr '\n' ' ')" \
        "$(echo "$mpi" | tr ' ' '\n' | grep -v '^-[ID]' | tr '\n' ' ')" >>"$output"
else
    row MPI "not found" "no --backend mpi: it needs mpicc"
fi

if [ -n "$missing" ]; then
    echo "required libraries are missing; scripts/install.sh build installs them" >&2
    rm -f "$output"
    exit 1
fi
