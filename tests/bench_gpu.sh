#!/bin/sh
# ./train against PyTorch on a GPU: tests/bench_gpu.sh [options and configurations of bench_gpu.py]
# PYTORCH_VENV names a virtual environment with torch (and timm); without it, the machine's python3 is asked.
set -eu
python=python3
[ -z "${PYTORCH_VENV:-}" ] || python=$PYTORCH_VENV/bin/python
if ! why=$(./train env --device cuda 2>&1 >/dev/null); then
    echo "bench-gpu: $(echo "$why" | sed -n 's/^train: error: //p' | head -1)" >&2
    exit 1
fi
exec "$python" tests/bench_gpu.py "$@"
