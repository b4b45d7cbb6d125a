#!/usr/bin/env bash
# Build the CUDA operators, check them and time them, wherever an NVIDIA GPU and a toolkit are at hand: under 8 minutes, table last.
#   PYTHON=python3 bash benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
[ -x "$(command -v "$PYTHON")" ] || PYTHON=python3

if ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
  echo "no GPU that torch can use: nothing was measured" >&2
  exit 2
fi
arch=$("$PYTHON" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
MMCOMPRESS_BUILD=cuda TORCH_CUDA_ARCH_LIST="$arch" "$PYTHON" setup.py -q build_ext --inplace > build_cuda.log 2>&1 || { tail -n 40 build_cuda.log; exit 1; }
status=0
timeout 200 "$PYTHON" -m pytest -q tests/ops/test_ops_gpu.py || status=1  # what is right is timed all the same
PYTHONPATH="$PWD" timeout 150 "$PYTHON" benchmarks/ops_gpu.py || status=1
exit $status
