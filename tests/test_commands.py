"""Every command that a document shows is run on small files, or says what it needs that a test machine lacks."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
from filelock import FileLock

from command import run_command
from conv2former.engine.train import train
from conv2former.recipes import load_recipe
from conv2former.tools.demo import server
from conv2former.tools.reproduce import jobs
from hub import TOKEN, Hub
from shown import (
    CLAIMS,
    HELP,
    ROOT,
    Shown,
    commands_in_the_text,
    copied,
    programs,
    shown_commands,
    write_files,
    write_own_recipes,
)

SHOWN = shown_commands()

# What marks may name. Whatever else a command wants, a test can have in small.
LACKING = (
    "GPU",
    "images with depth",
    "a network",
    "SLURM",
    "ImageNet",
    "COCO",
    "Hugging Face hub",
    "Chromium",
    "a server",
    "several processes",
    "a cross compiler",
)

# What is appended to make a command short: the first pattern found in it says what. The last of an option counts.
TRAINING = "--set schedule.epochs=1 --set schedule.warmup_epochs=0 --set data.workers=0"
CLASSIFIER = f"{TRAINING} --set data.input_size=32 --set optim.batch_size=4"
DENSE_T = f"{TRAINING} --set optim.batch_size=2 --set optim.global_batch=2"
DENSE = f"{DENSE_T} --model conv2former_test"
NARROW = "--set model.args.dims=[8,8,8,8] --set model.args.depths=[1,1,1,1]"
DETECTOR = "--set model.args.ls_init_value=0.1 --set detector.channels=16 --set detector.box_head_channels=32"
DETECTOR += " --set detector.max_detections=10"  # of a detector that has learned next to nothing: masks take time
APPENDED = (
    (
        r"train --recipe photos_from_nothing",
        f"{CLASSIFIER} {NARROW} --set optim.global_batch=4 --set claim.processes=1",
    ),
    (r"--recipe (imagenet1k_[tb]|imagenet22k_l|ade20k_upernet_l) --dry-run", NARROW),
    (r"--dry-run|--resume|smoke_", ""),
    (r"samples (segmentation|detection)", "--count 10"),
    (r"train --recipe quickstart", f"{TRAINING} --set model.drop_path_rate=0"),
    (r"train --recipe cifar", f"{CLASSIFIER} {NARROW}"),
    (r"train --recipe camvid", f"{TRAINING} {NARROW} --set data.crop_size=64 --set optim.batch_size=2"),
    (r"train --recipe \S+_detection .*weights/t", f"{DENSE_T} --set data.short_side=96 --set data.long_side=128"),
    (r"train --recipe \S+_segmentation .*weights/t", f"{DENSE_T} --set data.crop_size=64"),
    (r"train --recipe \S+_detection", f"{DENSE} {DETECTOR} --set data.short_side=96 --set data.long_side=128"),
    (r"train --recipe \S+_segmentation", f"{DENSE} --set data.crop_size=64 --set segmenter.channels=16"),
    (r"train --recipe finetune .*--weights WEIGHTS", f"{CLASSIFIER} --model conv2former_test"),
    (r"train --recipe finetune --model conv2former_atto", f"{CLASSIFIER} {NARROW}"),
    (r"train --recipe finetune", CLASSIFIER),
    (r"reproduce table6 --data", f"--row imagenet1k_t --seeds 1 {TRAINING} --set optim.batch_size=4"),
    (r"reproduce fig4a --data", f"{TRAINING} --set optim.batch_size=4"),
    (r"reproduce table9 --data", f"{TRAINING} --set data.crop_size=64 --set optim.batch_size=2"),
    (r"benchmark ", "--mode eager --size 32 --rounds 1"),
    (r"explain maps (?!.*--channels)", "--channels 0"),
    (r"explain field", "--images 1"),
    (r"export .*--images", "--count 2"),
    (r"openvino-int8", "--tolerance 1"),  # of a network that has learned next to nothing
    (r"demo ", "--port 0 --device cpu"),
    (r"benchmarks/ops.py", "--model conv2former_test --size 64 --batch 1 --rounds 2"),
    (r"benchmarks/triton_build.py", "--target 90 --kernel-size 7"),
    (r"pip install", "--dry-run --no-build-isolation"),
    (r"tensorboard ", "--port 0 --host 127.0.0.1"),
)
# Compile, calibrate, start a process for each model, take eight networks: in the slow tests, as are --help's examples.
LONG = r"aotinductor|triton_build|host_time|openvino-int8|conv2former benchmark|resnet50d"


def is_long(command: Shown) -> bool:
    return not command.needs and (command.document == HELP or bool(re.search(LONG, command.text)))


def shortened(command: Shown) -> str:
    extra = next((words for pattern, words in APPENDED if re.search(pattern, command.text)), "")
    return f"{command.text} {extra}".strip()


# -------------------------------------------------------------------------------------------------- the marks and words


def test_marks_name_what_machines_lack() -> None:
    marked = [command for command in SHOWN if command.needs]
    assert len(SHOWN) >= 150 and len(marked) < len(SHOWN) / 2
    for command in marked:
        assert any(word in command.needs for word in LACKING), command


def test_every_appended_word_is_of_use() -> None:
    unmarked = [command.text for command in SHOWN if not command.needs]
    for pattern, _ in APPENDED:
        assert any(re.search(pattern, text) for text in unmarked), pattern


def test_commands_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Marked or not, they name real commands with real options, and recipes that take the settings."""
    monkeypatch.chdir(tmp_path)
    write_own_recipes(tmp_path)
    known = programs()
    seen = set()
    for command in [*SHOWN, *commands_in_the_text()]:
        words = list(takewhile(lambda word: word not in ("||", "&&", "|"), command.words))
        if "-m conv2former " in f"{' '.join(words)} ":  # a script of somebody else
            continue
        starts = [i for i, word in enumerate(words) if word in ("conv2former", "conv2former_cli")]
        if not starts:
            continue
        words = words[starts[0] + 1 :]  # also where torchrun or srun start it
        if own := words[0] == "--import":  # a task of the reader's, see tests/test_own_task.py
            words = words[2:]
        name = next((name for name in known if tuple(words[: len(name)]) == name), None)
        assert name, command
        seen.add(name)
        given = known[name].make_context(" ".join(name), words[len(name) :], resilient_parsing=False).params
        assert given.get("model") is None or timm.is_model(given["model"]), command
        if words[0] == "train" and given["recipe"] != "RECIPE" and not own:  # any of them
            # a run that goes on has a recipe of its own
            recipe = load_recipe(given["recipe"] or "imagenet1k_t", overrides=given["set_"] or [])
            assert command.document != CLAIMS or given["recipe"] == recipe.name
    assert seen == set(known)


def test_what_the_text_runs_exists() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    found = [command.words for command in commands_in_the_text()]
    for program, *words in found:
        if program == "make":
            assert words[0] in targets
        elif program != "conv2former" and words[:2] not in (["-m", "conv2former"], ["-m", "conv2former_runtime"]):
            files = [word for word in words if word.endswith(".py")]
            assert files and all((ROOT / file).exists() for file in files)
    assert {words[0] for words in found} == {"conv2former", "make", "python", "pytest"}


# ------------------------------------------------------------------------------------------------------------ for real


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory, worker_id: str, request: pytest.FixtureRequest) -> Path:
    """What the documents name, made by the first of several test processes; not to be changed.

    The commands for newcomers make their runs themselves: without the others there are none to be made here.
    """
    tests = [item for item in request.session.items if "run" in getattr(item, "fixturenames", ())]
    named = [item.callspec.params.get("document") for item in tests if item.path == Path(__file__)]
    folder = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    with FileLock(folder / "shown.lock"):
        if not (folder / "shown").exists():
            place = tmp_path_factory.mktemp("files")
            write_files(place, runs=not {*named} <= {*FIRST})
            (folder / "shown").symlink_to(place)  # not moved: runs know the paths of their images
    return (folder / "shown").resolve()


Run = Callable[[Shown], None]


@pytest.fixture
def run(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Any:
    """Runs a command where its files are, and fails with it."""
    place = copied(files, tmp_path / "place")
    monkeypatch.chdir(place)
    monkeypatch.setenv("PATH", f"{sysconfig.get_path('scripts')}:{Path(sys.executable).parent}", prepend=":")
    hub = Hub(tmp_path / "hub")
    stand_ins(monkeypatch, hub)

    def run_one(command: Shown) -> None:
        capfd.readouterr()
        try:
            run_here(monkeypatch, place, shortened(command))
        except (Exception, SystemExit, pytest.fail.Exception) as error:
            pytest.fail(f"{command.document}: {shortened(command)}\n{error!r}\n{''.join(capfd.readouterr())}")

    yield run_one
    hub.shutdown()
    hub.server_close()
    shutil.rmtree(place)  # gigabytes


def stand_ins(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    """For what would not end, or goes to elsewhere, or was done before."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(server, "_serve", answer_once)
    monkeypatch.setattr("webbrowser.open", lambda url: None)

    def train_here(job: jobs.Job) -> int:
        train(job.recipe, data=job.data, out=job.run)
        return 0

    monkeypatch.setattr(jobs, "_train", train_here)


def answer_once(uvicorn: Any, config: Any, listening: Any, ready: Callable[[], None]) -> None:
    """A demo's page is asked for once, and the demo ends."""
    from starlette.testclient import TestClient

    ready()
    with TestClient(config.app, base_url="http://127.0.0.1") as client:
        assert "Conv2Former" in client.get("/").text


def run_here(monkeypatch: pytest.MonkeyPatch, place: Path, text: str) -> None:
    words = Shown("", text).words
    setting, _, value = words[0].partition("=")
    if value:  # of the environment, for this command
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(setting, value)
            run_here(patch, place, text.removeprefix(words[0]))
    elif words[0] == "conv2former":
        make_room(place, words[1:])
        assert run_command(monkeypatch, *words[1:]) == 0
    elif words[0] == "make":
        run_make(monkeypatch, place, words)
    elif words[0] == "tensorboard":
        serve(words)
    elif words[0] in ("python", "pip"):
        subprocess.run(["bash", "-c", text], check=True)
    else:
        pytest.fail(f"nothing says how `{words[0]}` is run: add it here, or mark the command with `# needs: ...`")


def make_room(place: Path, words: list[str]) -> None:
    """A reader who has such a run already names another folder."""
    made = None
    if words[0] == "train" and "--out" in words and not {"--resume", "--dry-run"} & set(words):
        made = words[words.index("--out") + 1]
    elif words[0] in ("convert", "samples"):
        made = words[2]
    if made:
        shutil.rmtree(place / made, ignore_errors=True)


def run_make(monkeypatch: pytest.MonkeyPatch, place: Path, words: list[str]) -> None:
    """Make says what it would do; what it would do with this package is done."""
    steps = subprocess.run([*words, "--dry-run"], check=True, capture_output=True, text=True).stdout.splitlines()
    ours = [line.split("/bin/", 1)[1] for line in steps if "/bin/conv2former" in line]
    if words[1] == "test":
        assert [line for line in steps if "-m pytest" in line] and not ours  # which is what runs this
    else:
        assert len(ours) >= 3
    for line in ours:
        run_here(monkeypatch, place, shortened(Shown("Makefile", line)))


def serve(words: list[str]) -> None:
    """Until it says where. It is killed, because it may not get over a closed pipe when it is asked to end."""
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    watchdog = threading.Timer(60, os.killpg, (process.pid, signal.SIGKILL))
    watchdog.start()
    try:
        assert process.stdout and any("http://" in line for line in process.stdout)
    finally:
        watchdog.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


QUICK = [command for command in SHOWN if not command.needs and not is_long(command)]
FIRST = ("README.md",)  # what a newcomer runs, docs/start.md's too; the others are slow tests
DOCUMENTS = [
    document if document in FIRST else pytest.param(document, marks=pytest.mark.slow)
    for document in sorted({command.document for command in QUICK})
]


def test_the_first_commands_are_also_in_the_readme() -> None:
    shown = {command.text for command in QUICK if command.document == "README.md"}
    assert {command.text for command in QUICK if command.document == "docs/start.md"} <= shown


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_run(document: str, run: Run) -> None:
    """In order, as a reader would."""
    for command in QUICK:
        if command.document == document:
            run(command)


@pytest.mark.slow
@pytest.mark.parametrize("command", filter(is_long, SHOWN), ids=lambda command: command.text)
def test_long_commands_run(command: Shown, run: Run) -> None:
    run(command)
