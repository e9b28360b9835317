#!/usr/bin/env bash
# One of three calls on a machine with a GPU, within its time:
#
#     bash benchmarks/gpu/call.sh 1 FOLDER    # correctness, 170 s: stop here where it is red
#     bash benchmarks/gpu/call.sh 2 FOLDER    # kernels, 250 s
#     bash benchmarks/gpu/call.sh 3 FOLDER    # networks, 280 s
#
# FOLDER gets one file, rows.jsonl, row by row. PYTHON names the interpreter; what prepare.sh has gathered in .gpu/ is
# used where it is there. A further --rehearse tries the same without a GPU.
set -uo pipefail
cd "$(dirname "$0")/../.."
call=${1:?name the call: 1, 2 or 3} out=${2:?name a folder for the rows}
shift 2
python=${PYTHON:-python3}
case $call in
  1) script=correctness limit=170 ;;
  2) script=kernels limit=250 ;;
  3) script=networks limit=280 ;;
  *) echo "there is no call $call: use 1, 2 or 3" >&2; exit 2 ;;
esac
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
if ls .gpu/*.whl >/dev/null 2>&1; then
  site=${TMPDIR:-/tmp}/conv2former-gpu
  if [ ! "$site" -nt .gpu/commit ]; then
    rm -rf "$site" "$site.new"
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site.new" .gpu/*.whl || exit 2
    mv "$site.new" "$site"
    touch "$site"
  fi
  export PYTHONPATH="$PYTHONPATH:$site"
fi
began=$SECONDS
timeout --signal=INT --kill-after=10 "$limit" \
  "$python" -u "benchmarks/gpu/$script.py" --out "$out" --until "$(($(date +%s) + limit - 8))" "$@"
code=$?
echo "call $call ended with status $code after $((SECONDS - began)) of $limit s"
exit $code
