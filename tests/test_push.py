"""Model cards, and uploads to a stand-in of the hub from which timm loads the model again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml

from command import run_command
from conv2former.checkpoints import load_pretrained
from conv2former.engine.model_card import card
from conv2former.engine.run_dir import RunDir
from conv2former.errors import UserError
from conv2former.tools.explain.opening import open_explained
from conv2former.tools.push import push as push_here
from hub import TOKEN, Hub


def push(hub: Hub, home: Path, *arguments: object) -> subprocess.CompletedProcess:
    program = [sys.executable, "-m", "conv2former_cli", "push", *map(str, arguments)]
    places = dict(HF_ENDPOINT=hub.address, HF_HOME=str(home), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return subprocess.run(program, env=environment | places | dict(HF_TOKEN=TOKEN), capture_output=True, text=True)


@pytest.mark.slow
def test_a_run_goes_to_the_hub_and_comes_back(finished: Path, tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hub")
    answer = push(hub, tmp_path / "home", finished, "somebody/digits", "--message", "First")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(f"{hub.address}/somebody/digits/commit/") and hub.commits == ["First"]
    assert sorted(path.name for path in (hub.root / "somebody" / "digits").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    code = (
        "import timm, torch, conv2former\n"
        "model = timm.create_model('hf-hub:somebody/digits', pretrained=True).eval()\n"
        "torch.save(model(torch.linspace(-1, 1, 768).view(1, 3, 16, 16)), 'out.pt')"
    )
    places = dict(HF_ENDPOINT=hub.address, HF_HOME=str(tmp_path / "other_home"), HF_HUB_DISABLE_XET="1")
    loaded = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | places, capture_output=True)
    assert loaded.returncode == 0, loaded.stderr.decode()
    ours = load_pretrained(finished)(torch.linspace(-1, 1, 768).view(1, 3, 16, 16))
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), ours)


def test_refusals_end_in_one_line(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)  # which is read from the environment once
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert run_command(monkeypatch, "push", finished, "somebody/digits") == 1
    said = capfd.readouterr().err
    assert len(said.splitlines()) == 1 and "the hub does not let you write to somebody/digits" in said


@pytest.mark.slow
def test_a_hub_that_is_not_there(finished: Path, tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hub")
    hub.shutdown()
    hub.server_close()
    answer = push(hub, tmp_path / "home", finished, "somebody/digits")
    assert answer.returncode == 1 and "cannot be reached" in answer.stderr.splitlines()[-1]
    assert answer.stderr.count("error: ") == 1 and "Traceback" not in answer.stderr


@pytest.mark.parametrize(("repo", "message"), [("digits", "give OWNER/NAME"), ("somebody/di gits", "no name for a")])
def test_names_are_checked_first(repo: str, message: str, finished: Path) -> None:
    with pytest.raises(UserError, match=message):
        push_here(finished, repo)


def test_an_exported_file_is_no_model_to_push_or_explain(tmp_path: Path) -> None:
    for use in (lambda file: push_here(file, "somebody/digits"), open_explained):
        with pytest.raises(UserError, match=r"model.onnx is an exported file: give the run"):
            use(tmp_path / "model.onnx")


def test_a_card_tells_what_a_run_knows(finished: Path) -> None:
    text = (finished / "best" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    front = yaml.safe_load(head)
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert front["library_name"] == "timm" and front["pipeline_tag"] == "image-classification"
    metrics = front["model-index"][0]["results"][0]["metrics"]
    assert metrics[0] == dict(type="accuracy", name="top-1, %", value=round(evaluation["top1"], 2))
    assert f"| top-1, % | {evaluation['top1']:.2f} |" in body
    for words in ("## Intended use", "64 training and 16 validation", "digit-3", "quickstart", "## Licence", "hou2022"):
        assert words in body
    assert str(finished.parent) not in text, "no path of this machine"


def test_a_card_of_a_bare_model_says_what_is_not_known(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "best", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    text = card(config, None)
    assert "Not recorded." in text and "None recorded." in text and "model-index" not in text
    assert card(config, RunDir(finished)) == (finished / "best" / "README.md").read_text()
