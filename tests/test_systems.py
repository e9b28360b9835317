"""What works where Linux's own modules, or packages, are not: hidden here, in processes of their own."""

from __future__ import annotations

import math
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from conv2former.__main__ import main
from conv2former.engine import machine
from conv2former.engine.logging import peak_memory_gb
from conv2former.engine.run_dir import RunDir
from conv2former.errors import UserError
from conv2former.version import __version__
from scenes import write_coco

HIDE = """
import os, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("getuid", "geteuid", "fork", "pread", "sched_getaffinity"):
    if hasattr(os, name):
        delattr(os, name)
"""

NETWORKS = """
import sys, torch, timm, conv2former, conv2former.engine.predict
from conv2former.tasks import TASKS, task_class
[task_class(name) for name in TASKS]
print(*{name.partition(".")[0] for name in sys.modules})
import conv2former.engine.train
model = timm.create_model("conv2former_test", num_classes=5)
x = torch.randn(2, 3, 64, 64)
model(x).sum().backward()
model.eval()
expected = model(x)
assert (model.fuse()(x) - expected).abs().max() < 1e-4
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HIDE + code, *arguments], capture_output=True, text=True, timeout=200
    )


def test_networks_need_none_of_them() -> None:
    """Trained and fused; one line says why it is plain PyTorch.

    What predicts loads nothing of training: Lightning, torchmetrics with SciPy, and matplotlib load for longer than
    PyTorch.
    """
    answer = run(NETWORKS)
    assert answer.returncode == 0, answer.stderr
    assert not {"lightning", "torchmetrics", "scipy", "matplotlib"} & {*answer.stdout.split()}
    assert answer.stderr.strip().splitlines() == [
        "operations on cpu are computed by plain PyTorch, because the C++ kernels are made for Linux and macOS"
    ]


WITHOUT_COCO = """
import sys
sys.modules["faster_coco_eval"] = sys.modules["sklearn"] = None
import conv2former_cli
sys.argv = ["conv2former", *sys.argv[1:]]
conv2former_cli.main()
"""


@pytest.mark.slow
def test_a_classifier_needs_no_packages_of_other_tasks(tmp_path: Path) -> None:
    """The quick start trains without them; a detector says in one line what to install."""

    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", WITHOUT_COCO, *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, timeout=200)

    settings = [f"--set={setting}" for setting in ("schedule.epochs=1", "schedule.warmup_epochs=0", "data.workers=0")]
    trained = command("train", "--recipe=quickstart", "--out", tmp_path / "run", *settings)
    assert trained.returncode == 0 and "top-1" in trained.stdout, trained.stderr
    refused = command(
        "train", "--recipe=smoke_detection", "--data", write_coco(tmp_path / "coco"), "--out", tmp_path / "no"
    )
    assert refused.returncode == 1
    assert refused.stderr == ("error: COCO's masks and metrics need faster-coco-eval: pip install faster-coco-eval\n")


def test_training_says_in_one_line_that_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(
        UserError, match=r"^training needs Linux or macOS: on Windows use the Windows Subsystem for Linux$"
    ):
        RunDir(tmp_path).lock()
    monkeypatch.setitem(sys.modules, "resource", None)
    assert math.isnan(peak_memory_gb(torch.device("cpu")))


SCRIPT = """
import sys, timm, beside
assert __name__ == "__main__" and sys.argv[1:] == ["--model", "conv2former_test"]
print(beside.WORD, sum(p.numel() for p in timm.create_model(sys.argv[2]).parameters()))
"""


def test_scripts_of_others_know_the_models(tmp_path: Path) -> None:
    """``python -m conv2former SCRIPT.py``, for timm's own."""
    (tmp_path / "beside.py").write_text("WORD = 'parameters'")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "conv2former", str(script), "--model", "conv2former_test"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert answer.returncode == 0 and answer.stdout.startswith("parameters 1"), answer.stderr


@pytest.mark.slow
def test_scripts_of_others_started_without_us_do_not(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("WORD = 'parameters'")
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "train.py", "--model", "conv2former_test"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert answer.returncode == 1 and "conv2former_test" in answer.stderr


def test_a_script_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["conv2former", "no.py"])
    with pytest.raises(SystemExit, match=r"no.py does not exist: give the path of a Python script"):
        main()


def test_anything_else_is_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["conv2former", "models", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "models" in capsys.readouterr().out


WITHOUT_PYDANTIC = "import sys; sys.modules['pydantic'] = None; "


def test_a_package_that_is_missing_is_named() -> None:
    code = WITHOUT_PYDANTIC + "import conv2former_cli; sys.argv = ['conv2former', 'recipes']; conv2former_cli.main()"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert answer.returncode == 1
    assert answer.stderr == "error: pydantic is not installed, and conv2former needs it: pip install pydantic\n"


def test_kernels_are_tested_without_pydantic() -> None:
    """A machine with a GPU may have PyTorch and timm, and no network to install more."""
    test = Path(__file__).parent / "test_triton.py"
    code = "import conv2former.tools.benchmark.worker, conv2former.tools.doctor, conv2former.models.zoo; "
    code += f"import pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', 'test_takes', {str(test)!r}]))"
    answer = subprocess.run([sys.executable, "-c", WITHOUT_PYDANTIC + code], capture_output=True, text=True)
    assert answer.returncode == 0 and "1 passed" in answer.stdout, answer.stdout + answer.stderr


def test_a_folder_on_the_path_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(machine, "version", none)
    versions = machine.machine_facts()["versions"]
    assert versions["conv2former"] == __version__ and versions["lightning"] == "not installed"
