#!/usr/bin/env bash
# All that needs a GPU, in under nine minutes: correctness of the Triton kernels, each operation against PyTorch and
# its limit, whole networks beside ConvNeXt, peak memory. A short table comes last.
#
#     bash benchmarks/gpu.sh [FOLDER]
#
# PYTHON names the interpreter. Without an installed package the one beside this script is used.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu-results}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
"$python" -c 'import torch; assert torch.cuda.is_available(), "PyTorch finds no NVIDIA GPU"' || exit 2
status=0

part() { # NAME SECONDS COMMAND...: what it prints goes to a file, whether it worked to the summary
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$out/$name.txt" 2>&1
  local code=$?
  printf '%-28s %s  %4d s\n' "$name" "$([ $code = 0 ] && echo 'ok    ' || echo "failed ($code)")" $((SECONDS - began)) \
    >>"$out/summary.txt"
  [ $code = 0 ] || status=1
}

{ git describe --always --dirty 2>/dev/null; "$python" -c 'import torch, triton
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)'; } >"$out/summary.txt"
# compiling takes most of the tests' time, some 300 programs of half a second: several processes, where pytest has them
"$python" -c 'import xdist' 2>/dev/null && several=(--numprocesses 8) || several=()
part kernels-are-right 150 "$python" -m pytest -q -m gpu "${several[@]}" tests/test_triton.py
part operations-bf16 100 "$python" benchmarks/ops.py --device cuda --batch 128 --dtype bfloat16 --json "$out/ops.json"
convnext=(conv2former_t convnext_tiny --device cuda --batch-size 256 --dtype bfloat16 --mode eager --mode compile)
part inference 70 "$python" -m conv2former_cli benchmark "${convnext[@]}" --out "$out/inference"
part training-step 90 "$python" -m conv2former_cli benchmark "${convnext[@]}" --train --out "$out/train"
part training-step-reference 90 "$python" -m conv2former_cli benchmark conv2former_t "${convnext[@]:2}" --train \
  --ops reference --out "$out/train-reference"

cat "$out/summary.txt"
cat "$out/operations-bf16.txt"
tail -n 12 "$out/inference.txt" "$out/training-step.txt" "$out/training-step-reference.txt"
exit $status
