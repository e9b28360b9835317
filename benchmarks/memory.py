"""Whether memory stays flat: 10,000 predictions, 2,000 training steps with readers, a demo under load.

A figure is the memory that a command and all that it has started hold by themselves (unique set size) after a tenth,
half and all of the work. ``python benchmarks/memory.py predict train demo --minutes 60``
"""

from __future__ import annotations

import argparse
import json
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from conv2former.engine.train import train
from conv2former.recipes import load_recipe

WORDS = [sys.executable, "-m", "conv2former_cli"]
CLIENTS = 8  # of the demo, at a time
STEPS = 1438 // 16  # of an epoch of the digits


def family(pid: int) -> Iterator[int]:
    """A process and all that it has started."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from family(int(child))


def megabytes(pid: int) -> float:
    """What a process and all that it has started hold by themselves."""
    total = 0
    for member in family(pid):
        try:
            rows = (Path("/proc") / str(member) / "smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        total += sum(int(row.split()[1]) for row in rows if row.startswith("Private_"))
    return total / 1024


def watched(process: subprocess.Popen, *, seconds: float = 1e9) -> list[float]:
    """The memory of a command each second until its end, or for some time."""
    found, began = [], time.monotonic()
    while process.poll() is None and time.monotonic() - began < seconds:
        try:
            found.append(megabytes(process.pid))
        except OSError:
            break
        time.sleep(1)
    return found


def report(what: str, found: list[float]) -> None:
    """A row; the median of a twentieth of the work stands for each moment, as the last second is not typical."""
    width = max(len(found) // 20, 1)
    moments = {"a tenth": 0.1, "half": 0.5, "all": 0.95}
    values = {name: sorted(found[int(at * len(found)) :][:width])[width // 2] for name, at in moments.items()}
    row = dict(what=what, samples=len(found)) | {f"MB after {name}": round(value) for name, value in values.items()}
    print(json.dumps(row), flush=True)


def model(folder: Path) -> Path:
    """A run of the quick start, short."""
    out = folder / "run"
    train(load_recipe("quickstart", overrides=["schedule.epochs=1", "schedule.warmup_epochs=0"]), data=None, out=out)
    return out


def predict(run: Path, folder: Path, count: int) -> None:
    """Many files, which are links to a few."""
    samples = sorted((run / "samples").iterdir())
    (images := folder / "images").mkdir()
    for number in range(count):
        (images / f"{number:06d}.png").symlink_to(samples[number % len(samples)].resolve())
    words = [*WORDS, "predict", str(run), str(images)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    report(f"predict, {count:,} images", watched(process))
    assert process.returncode == 0


def steps(folder: Path, count: int) -> None:
    """Training with two readers; evaluations and checkpoints belong to it."""
    words = [*WORDS, "train", "--recipe", "quickstart", "--out", str(folder / "long"), "--set=data.workers=2"]
    words += [f"--set=schedule.epochs={-(-count // STEPS)}", "--set=optim.batch_size=16"]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    report(f"train, {count:,} steps, 2 readers", watched(process))
    assert process.returncode == 0


def demo(run: Path, minutes: float) -> None:
    """Clients that upload an image and ask for an answer, again and again."""
    import httpx

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([*WORDS, "demo", str(run), "--port", str(port)], stdout=subprocess.DEVNULL)
    image, ended, answers = next((run / "samples").iterdir()).read_bytes(), threading.Event(), [0]

    def visit(session: str) -> None:
        """What the page does: an upload, a question, the answer as it comes."""
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/gradio_api", timeout=60, trust_env=False) as client:
            path = client.post("/upload", files=dict(files=("a.png", image))).json()[0]
            files = [dict(path=path, orig_name="a.png", meta=dict(_type="gradio.FileData"))]
            controls = [5, 0.3, 0.55, ["boxes", "masks", "labels"], False, False]  # as they are at first
            question = dict(data=[files, None, run.name, "", *controls], fn_index=0, session_hash=session)
            client.post("/queue/join", json=question).raise_for_status()
            with client.stream("GET", "/queue/data", params=dict(session_hash=session)) as stream:
                answers[0] += any("process_completed" in line for line in stream.iter_lines())

    def ask() -> None:
        while not ended.is_set():
            try:
                visit(secrets.token_hex(8))
            except (httpx.HTTPError, ValueError):  # the server is not there yet, or not any more
                time.sleep(1)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    while not answers[0]:
        time.sleep(1)
    found = watched(process, seconds=60 * minutes)
    ended.set()
    process.terminate()
    report(f"demo, {minutes:g} minutes, {CLIENTS} clients, {answers[0]:,} answers", found)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=["predict", "train", "demo"])
    parser.add_argument("--minutes", type=float, default=60)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = model(folder)
        if "predict" in given.parts:
            predict(run, folder, 10_000)
        if "train" in given.parts:
            steps(folder, 2_000)
        if "demo" in given.parts:
            demo(run, given.minutes)


if __name__ == "__main__":
    main()
