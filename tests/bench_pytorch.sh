#!/bin/sh
# ./train against PyTorch, interleaved: tests/bench_pytorch.sh [options and configurations of bench_pytorch.py]
# PYTORCH_VENV names a virtual environment with torch and timm; without it one is made in build/venv.
set -eu
venv=${PYTORCH_VENV:-build/venv}
if [ -z "${PYTORCH_VENV:-}" ] && ! "$venv/bin/python" -c "import timm" 2>/dev/null; then
    echo "installing the newest torch and timm in $venv"
    mkdir -p build
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet torch timm
fi
"$venv/bin/python" -c 'import timm, torch; print(f"torch {torch.__version__}, timm {timm.__version__}")'
exec "$venv/bin/python" tests/bench_pytorch.py "$@"
