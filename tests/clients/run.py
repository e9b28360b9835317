"""Runs libraries that people put around timm models on a Conv2Former and on timm's ConvNeXt; writes docs/clients.md.

    python tests/clients/run.py
    python tests/clients/run.py --only opacus

Every library has a process of its own for each model, so that one that fails, hangs or changes PyTorch disturbs no
other. The command prints one line for each check, and fails where a check of the Conv2Former fails without a known
reason. With ``--only`` it runs the rows of one library and writes nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from rows import NOTES, ROWS, Row

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs/clients.md"
MODELS = OURS, THEIRS = "conv2former_atto", "convnext_atto"
TIMEOUT = 180  # seconds for one library and model
MARK = "CHECK "  # before what a process says about a check


def run_checks(checks: list[str], model: str) -> None:
    """What a process does: it says of each check why it failed, or nothing but its name."""
    import torch

    torch.set_num_threads(1)
    for check in checks:
        module, function = check.split(".")
        reason = ""
        try:
            getattr(importlib.import_module(module), function)(model)
        except Exception as error:
            traceback.print_exc()
            said = (str(error).strip().splitlines() or [""])[0]
            reason = said if said and isinstance(error, AssertionError) else f"{type(error).__name__}: {said}"
        print(f"{MARK}{json.dumps([check, reason[:200]])}", flush=True)


def outcomes(rows: list[Row], model: str) -> dict[Row, tuple[str, bool]]:
    """The cells of one library and model, and whether they are as they should be."""
    command = [sys.executable, str(HERE / "run.py"), "--model", model, "--checks", *(row.check for row in rows)]
    quiet = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", PYTHONWARNINGS="ignore")
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | quiet,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
        missing = f"its process ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
        output, errors = process.communicate()
        missing = f"it has not ended after {TIMEOUT} seconds"
    said = dict(json.loads(line.removeprefix(MARK)) for line in output.splitlines() if line.startswith(MARK))
    found = {row: judged(row, model, said.get(row.check, missing)) for row in rows}
    if not all(good for _, good in found.values()):
        print(errors, file=sys.stderr)
    return found


def judged(row: Row, model: str, why: str) -> tuple[str, bool]:
    """A cell of the table, and whether it is as it should be."""
    sign, reason = row.known.get(model, ("", ""))
    if why and sign and sign in why:
        cell, good = f"does not: {reason}", True
    else:
        cell, good = f"does not: {why}" if why else "works", not why and not sign
    note = " (rows.py says that it fails: take that out)" if sign and not why else ""
    print(f"{row.client:28} {row.check:40} {model:18} {cell}{note}", flush=True)
    return cell.replace("|", "\\|"), good


def page(cells: dict[tuple[Row, str], str]) -> str:
    """The document: the table, what to know, and the file that counts fused networks as it ran."""
    lines = [
        "# Libraries that work with it",
        "",
        "These libraries are often used with timm models. Each was run on a Conv2Former and on timm's ConvNeXt.",
        "*Works* means that the result was computed again without the library, and that both agree.",
        "",
        f"The checks ran on a CPU with Python {platform.python_version()} and PyTorch {version('torch')}.",
        "`make clients` runs them again in an environment of its own, and writes this page.",
        "",
        "| library | what was done | Conv2Former | ConvNeXt |",
        "|---|---|---|---|",
    ]
    for row in ROWS:
        name = f"{row.client} {version(row.distribution)}"
        lines.append(f"| {name} | {row.done} | {cells[row, OURS]} | {cells[row, THEIRS]} |")
    lines += ["", NOTES.strip(), "", "```python", (HERE / "fused_counts.py").read_text().rstrip(), "```", ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a library, or a part of its name")
    parser.add_argument("--checks", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.checks:
        run_checks(arguments.checks, arguments.model)
        return 0
    wanted = [row for row in ROWS if arguments.only.lower() in row.client.lower()]
    jobs = [([row for row in wanted if row.client == name], model) for name in clients(wanted) for model in MODELS]
    cells: dict[tuple[Row, str], tuple[str, bool]] = {}
    with ThreadPoolExecutor(2) as pool:
        for (_, model), found in zip(jobs, pool.map(lambda job: outcomes(*job), jobs), strict=True):
            cells |= {(row, model): cell for row, cell in found.items()}
    if not arguments.only:
        PAGE.write_text(page({key: cell for key, (cell, _) in cells.items()}))
    failed = [row.check for row in wanted if not cells[row, OURS][1]]
    print(f"{len(wanted)} rows; of Conv2Former {len(failed)} fail{': ' + ', '.join(failed) if failed else ''}")
    return int(bool(failed))


def clients(rows: list[Row]) -> list[str]:
    """The libraries in order, each once."""
    return list(dict.fromkeys(row.client for row in rows))


if __name__ == "__main__":
    sys.exit(main())
