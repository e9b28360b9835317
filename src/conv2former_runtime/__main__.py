"""``python -m conv2former_runtime FILE IMAGE...``: a line of JSON for each image, as ``conv2former predict``."""

from __future__ import annotations

import argparse
import os
import sys

import conv2former_runtime
from conv2former_runtime.errors import UserError, json_line


def main() -> int:
    """The exit status: 1 where an image cannot be read, 2 where nothing can be done."""
    parser = argparse.ArgumentParser(prog="python -m conv2former_runtime", description=__doc__)
    parser.add_argument("file", help="written by `conv2former export RUN --format runtime`")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--top-k", type=int, default=5, help="classes that are named (5)")
    parser.add_argument("--threads", type=int, help="that compute (all processors)")
    given = parser.parse_args()
    for name in ("top_k", "threads"):
        if (value := getattr(given, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    failed = 0
    try:
        model = conv2former_runtime.load(given.file, threads=given.threads)
        for image, row in zip(given.images, model.predict(given.images, top_k=given.top_k), strict=True):
            failed += not row["ok"]
            print(json_line(dict(file=image) | row), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"error: {error or 'there is not enough memory'}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads has enough; what is still to be written would fail at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if failed:
        print(f"{failed} of {len(given.images)} files could not be read", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
