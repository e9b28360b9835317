#!/usr/bin/env bash
# The three calls without a GPU, with tiny sizes, the same code and within the same limits:
#
#     PYTHON=.venv-torch-2.11.0/bin/python bash benchmarks/gpu/rehearse.sh [FOLDER]
#
# Triton specialises, chooses and compiles for compute capability 9.0 by its real path, under a driver that launches
# nothing (no_launch.py); its times are those of the host and mean nothing. Networks run on the CPU.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-$(mktemp -d)}
status=0
for call in 1 2 3; do
  bash benchmarks/gpu/call.sh "$call" "$out/$call" --rehearse || status=1
  echo "$(wc -l <"$out/$call/rows.jsonl") rows in $out/$call/rows.jsonl"
done
exit $status
