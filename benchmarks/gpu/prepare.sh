#!/usr/bin/env bash
# Gathers in .gpu/ what a machine with a GPU lacks and cannot download: on a machine with a network, from the root of
# the repository,
#
#     bash benchmarks/gpu/prepare.sh
#
# Wheels for Python 3.12 on x86-64 Linux, without PyTorch and what it brings, a wheel of this project, whose version the
# rows then know (what runs is src/), and the commit: at most 60 MB.
# .gpu/ is ignored by git. Copy the repository with it, then run the three calls there (call.sh).
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
rm -rf .gpu
mkdir .gpu
platforms=()
for n in 28 27 24 17 12 5; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
# what such a machine was seen to lack, with what those need themselves; versions are those of the constraints
packages=(pydantic pydantic-core annotated-types typing-inspection typing-extensions annotated-doc timm typer
  faster-coco-eval pytest-xdist pytest-timeout execnet filelock)
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" --constraint constraints.txt --dest .gpu "${packages[@]}"
"$python" -m pip wheel --quiet --no-deps --wheel-dir .gpu .
git describe --always --dirty >.gpu/commit
size=$(du -sm .gpu | cut -f1)
ls -l .gpu
echo "$size MB in .gpu/"
[ "$size" -le 60 ] || { echo 'that is more than 60 MB: leave packages out in prepare.sh' >&2; exit 1; }
