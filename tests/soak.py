"""Kills runs at random moments and shows that they end as runs that nobody touched, bit for bit: ``make soak``.

Each configuration trains once undisturbed; then again by ``conv2former train --resume auto``, which is killed with
SIGKILL (the whole process group) some time after it has begun, and started again by the same command, until it was
killed often enough and may finish. Everything that is random is on: MixUp, CutMix, erasing, drop path, the moving
average; checkpoints are written about three times a second, so that kills meet them and the evaluation too.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from conv2former.engine.run_dir import RunDir
from digits import write_digits
from runs import EVERYTHING, assert_same_run, command, signal_all, start

# readers per process, processes, forward passes per step
CONFIGURATIONS = [(0, 1, 1), (2, 1, 2), (0, 2, 1), (2, 2, 2)]


def settings(workers: int, processes: int, accumulate: int, epochs: int) -> list[str]:
    """The recipe's changes for one configuration: 16 images per step in all of them."""
    return [
        *EVERYTHING,
        f"data.workers={workers}",
        f"engine.devices={processes}",
        f"optim.batch_size={16 // processes // accumulate}",
        "optim.global_batch=16",
        f"schedule.epochs={epochs}",
        "engine.checkpoint_minutes=0.005",
    ]


def killed(arguments: list[str], out: Path, seconds: float) -> str | None:
    """Starts the command and kills it ``seconds`` after training has begun; says where, or None if it had ended."""
    process = start(arguments)
    assert process.stderr
    for line in process.stderr:
        if line.startswith("batch "):  # the last line before the first step
            break
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.001)
    if process.poll() is not None:
        return None
    signal_all(process, signal.SIGKILL)
    process.communicate()
    rows = RunDir(out).rows()
    half = " while a checkpoint was being written" * bool(list((out / "checkpoints").glob("*.partial")))
    half += " while weights were being exported" * bool(list(out.glob(".*.new")))
    return f"{seconds:.2f} s into the training, last row at step {rows[-1]['step'] if rows else 0}{half}"


def soak(kills: int, epochs: int, seed: int, folder: Path) -> int:
    """Runs all configurations; returns how often a run was killed.

    Raises:
        AssertionError: A run did not end as the undisturbed one.
    """
    data, total = write_digits(folder / "data"), 0
    chance = random.Random(seed)
    for configuration in CONFIGURATIONS:
        name = "{} readers, {} processes, {} passes".format(*configuration)
        whole, parts = (folder / f"{kind}-{'-'.join(map(str, configuration))}" for kind in ("whole", "parts"))
        changes = settings(*configuration, epochs)
        subprocess.run(command(data, whole, *changes), check=True, capture_output=True)
        arguments = command(data, parts, *changes, options=("--resume", "auto"))
        done = 0
        while done < kills:
            where = killed(arguments, parts, chance.uniform(0, 2.5))
            if where is None:
                print(f"{name}: finished before it could be killed again", flush=True)
                break
            done += 1
            print(f"{name}: killed {where}", flush=True)
        subprocess.run(arguments, check=True, capture_output=True)
        assert_same_run(whole, parts)
        total += done
        print(f"{name}: {done} kills, all weights and figures equal", flush=True)
    return total


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=6, help="per configuration, of which there are four")
    parser.add_argument("--epochs", type=int, default=60, help="of four steps each")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        total = soak(given.kills, given.epochs, given.seed, Path(folder))
    took = time.monotonic() - started
    print(f"{total} kills in {len(CONFIGURATIONS)} configurations, {took:.0f} s: every run ended equal")


if __name__ == "__main__":
    main()
