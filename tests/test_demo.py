"""The demo without a browser: which models, what is answered, what is let through, how it ends."""

from __future__ import annotations

import html
import io
import json
import math
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import conv2former_cli
from browser import demo
from command import run_command
from conv2former.data.images import decode
from conv2former.data.rle import encode_mask
from conv2former.errors import UserError
from conv2former.tasks import load
from conv2former.tasks.base import Line
from conv2former.tasks.classification.task import ClassificationTask
from conv2former.tasks.detection.task import DetectionTask
from conv2former.tools.demo.about import in_python, readable
from conv2former.tools.demo.agreement import Agreement, agreement, total
from conv2former.tools.demo.models import KEPT, Models
from conv2former.tools.demo.options import Options
from conv2former.tools.demo.server import listen
from digits import one_picture
from scenes import scene

pytest.importorskip("gradio", reason="needs gradio: pip install 'conv2former[demo]'")
from starlette.testclient import TestClient

from conv2former.tools.demo import models as models_module
from conv2former.tools.demo import page as page_module
from conv2former.tools.demo.page import MOST_IMAGES, OUR_FAULT, UNUSABLE, Answers
from pages import LIMITS, META, UPLOAD_BYTES, answers_of, gated, inputs

DIGITS = "digit-0, digit-1, digit-2, digit-3"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Image.Image:
    return decode(one_picture(tmp_path_factory.mktemp("one") / "digit.png", 3))


def upload(path: Path, name: str = "digit.png") -> dict[str, str]:
    """What the page sends for an upload."""
    return dict(path=str(path), orig_name=name)


def text(page: str) -> str:
    """The words of HTML without its tags."""
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


# ---------------------------------------------------------------------------------------------------------- models


def test_a_folder_stands_for_the_runs_in_it(finished: Path, tmp_path: Path) -> None:
    for place in ("a/first", "a/second", "b/first"):
        shutil.copytree(finished / "best", tmp_path / place / "best")
    (tmp_path / "a" / "notes").mkdir()
    models = Models([str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "a" / "first"), "conv2former_test"])
    assert models.names == ["first", "second", "b/first", "conv2former_test"]
    assert Models([str(tmp_path / "a/first/best")]).names == ["first/best"]
    assert Models([str(tmp_path / "a/first/best/model.safetensors")]).names == ["best/model.safetensors"]


def test_few_models_stay_in_memory(finished: Path, tmp_path: Path) -> None:
    for number in range(KEPT + 1):
        shutil.copytree(finished / "best", tmp_path / f"m{number}")
    models = Models([str(tmp_path)], device="cpu")
    first = models.get("m0")
    for number in range(1, KEPT):
        models.get(f"m{number}")
    assert models.get("m0") is first
    models.get(f"m{KEPT}")
    assert models.get("m0") is first, "the one unused for longest goes"
    with pytest.raises(UserError, match="choose one of the list"):
        models.get(str(finished))


def test_a_classifier_says_what_predict_says(finished: Path, picture: Image.Image) -> None:
    model = Models([str(finished)], device="cpu").get("finished")
    look = model.look(picture, Options(maps=True))
    task = load(finished)
    (found,) = task.predict([task.preprocess(picture)])
    assert [(line.label, line.value) for line in look.lines] == [
        (row["label"], pytest.approx(row["probability"])) for row in found.fields["top"]
    ]
    assert look.milliseconds > 0 and look.image is picture
    assert [name.split("\n")[0] for name, _ in look.maps] == [str(block) for block in model.blocks] and look.maps
    assert [title.split(",")[0] for title, _ in look.maps[0][1]] == ["A", "A", "A * V"]
    assert model.look(picture, Options()).maps == [] and model.look(picture, Options()).fields == found.fields
    assert len(model.look(picture, Options(top_k=2)).lines) == 2


def test_maps_are_computed_once(finished: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Models([str(finished)], device="cpu").get("finished")
    shown = Options(cam=True, maps=True)
    first = model.look(picture, shown)
    assert first.cam and first.maps
    monkeypatch.setattr(models_module, "map_panels", None)
    monkeypatch.setattr(models_module, "ActivationMaps", None)
    again = model.look(picture, replace(shown, opacity=0.1))
    assert again.cam is first.cam and again.maps is first.maps
    assert model.look(picture, Options()).maps == []


def test_objects_and_regions_have_the_colours_of_the_picture(detector: Path, segmenter: Path, tmp_path: Path) -> None:
    shutil.copytree(detector, tmp_path / "runs" / "detector")
    shutil.copytree(segmenter, tmp_path / "runs" / "segmenter")
    models = Models([str(tmp_path / "runs")], device="cpu")
    photograph = scene(5)[0]
    for name in ("detector", "segmenter"):
        model = models.get(name)
        look = model.look(photograph, Options(threshold=0.05, maps=True))
        assert look.image.size == photograph.size and look.image.tobytes() != photograph.tobytes()
        assert look.lines and all(line.colour for line in look.lines)
        assert [line.value for line in look.lines] == sorted((line.value for line in look.lines), reverse=True)
        assert len(look.maps) == 4 and look.milliseconds > 0


def test_random_weights_and_other_networks_say_so(picture: Image.Image) -> None:
    models = Models(["conv2former_test", "test_resnet", "conv2former_test:kernel_size=5"], device="cpu")
    assert models.get("conv2former_test:kernel_size=5").blocks[0].mod.dwconv.kernel_size == (5, 5)
    assert models.get("conv2former_test").about.random
    look = models.get("test_resnet").look(picture, Options(maps=True))
    assert look.maps == [] and "ResNet has no modulation" in look.no_maps
    again = Models(["conv2former_test"], device="cpu").get("conv2former_test").look(picture, Options())
    assert again.lines == models.get("conv2former_test").look(picture, Options()).lines, "the same for every start"


def test_a_run_says_what_it_is_and_keeps_examples(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "samples").mkdir()
    one_picture(run / "samples" / "a.png")
    (run / "samples" / "b.png").write_bytes(b"no image")
    (run / "samples" / "c.png").symlink_to(one_picture(tmp_path / "elsewhere.png"))
    (run / "samples" / "d.txt").write_text("no image")
    found = Models([str(run)], device="cpu").get("run").about
    assert [name for name, _ in found.examples] == ["a.png"] and not found.random
    task, network, classes, data, metrics = found.facts
    assert (task, network, classes) == ("Classification", "conv2former_test", f"4 classes: {DIGITS}")
    assert re.fullmatch(r"trained on 64 images of digits\d*", data), data
    assert re.fullmatch(r"top-1 [\d.]+%, top-5 100.0% on 16 validation images", metrics), metrics
    (run / "run.json").write_text("{")
    assert Models([str(run)], device="cpu").get("run").about.facts == [task, network, classes]


def test_a_saved_model_says_what_its_card_says(finished: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    shutil.copytree(finished / "best", saved)
    facts = Models([str(saved)], device="cpu").get("saved").about.facts
    assert facts[3].startswith("trained on digits") and facts[4].startswith("top-1 ")
    for text in ("", "---\n---\n", "---\nmodel-index: [1]\n---\n", "---\n{\n---\n", "---\nmodel-index: {}\n---\n"):
        (saved / "README.md").write_text(text)
        assert len(Models([str(saved)], device="cpu").get("saved").about.facts) == 3


def test_imagenet_ids_are_words() -> None:
    assert [readable(label) for label in ("n01440764", "n00004475", "n99999999", "cat")] == [
        *("tench", "organism", "n99999999", "cat")
    ]


def test_what_a_request_says_of_options_is_made_to_fit() -> None:
    assert Options.read(3, 0.5, 0.25, ["masks"], True, 1) == Options(3, 0.5, 0.25, frozenset({"masks"}), True, True)
    assert Options.read(1e9, -1, 7, ["x", [], {}], 0, "") == Options(10, 0.05, 1, frozenset())
    assert Options.read(math.nan, "x", None, "boxes", [], {}) == Options.read(True, {}, [], 7, None, 0) == Options()
    assert (Options.threshold, Options.top_k) == (DetectionTask.threshold, ClassificationTask.top_k)


def test_agreement_counts() -> None:
    def line(label: str, box: list[float] | None = None, mask: list[list[int]] | None = None) -> Line:
        return Line(label, 0.5, box=box, mask=mask and encode_mask(np.array(mask)))

    car, bus = line("car", [0, 0, 10, 10]), line("bus", [0, 0, 10, 10])
    near, far = line("car", [1, 0, 10, 10]), line("car", [20, 20, 30, 30])
    assert agreement("objects", [car, near, bus], [near, far]) == Agreement("objects", 1, 4)
    assert agreement("objects", [car, near], [near, car]) == Agreement("objects", 2, 2)
    assert agreement("objects", [], [far]) == Agreement("objects", 0, 1)
    assert str(agreement("objects", [], [])) == "Neither model finds an object."
    first = [line("a", mask=[[1, 1, 0, 0]]), line("b", mask=[[0, 0, 1, 1]])]
    second = [line("b", mask=[[0, 1, 1, 1]]), line("c", mask=[[1, 0, 0, 0]])]
    assert str(agreement("pixels", first, second)) == "Same class: 50.0% of the pixels."
    both = [agreement("classes", [car], [other]) for other in (near, bus)]
    assert str(both[0]) == "The two models name the same top class." and str(total(both)).startswith(
        "Same top class: 1 of 2"
    )


@pytest.mark.parametrize("source", ["conv2former_test:num_classes=4,kernel_size=5", "run"])
def test_the_lines_of_python_do_the_same(
    source: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished / "best", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    one_picture(Path("photo.jpg"))
    model = Models([source], device="cpu").get(source)
    look = model.look(decode(Path("photo.jpg").read_bytes()), Options(top_k=2))
    exec(in_python(source, model.source, model.task, dict(top_k=2)), {})
    said = capsys.readouterr().out
    assert all(f"{line.value:.3f}"[:-1] in said for line in look.lines), said


# --------------------------------------------------------------------------------------------------------- answers


@pytest.fixture
def answers(finished: Path, tmp_path: Path) -> Answers:
    return answers_of(finished, tmp_path / "uploads")


def test_good_pictures_are_answered_beside_bad_ones(answers: Answers, tmp_path: Path) -> None:
    good = one_picture(answers.folder / "good.png")
    large = answers.folder / "large.png"
    large.write_bytes(good.read_bytes() + bytes(LIMITS["file_bytes"]))
    Image.new("1", (2000, 2000)).save(answers.folder / "bomb.png")
    (answers.folder / "text.png").write_text("hello <b>you</b>")
    (answers.folder / "damaged.png").write_bytes(good.read_bytes()[:60])
    outside = one_picture(tmp_path / "outside.png")
    (answers.folder / "link.png").symlink_to(outside)
    lost = [outside, answers.folder / "../outside.png", answers.folder / "link.png", answers.folder / "gone.png"]
    lost += [Path("/etc/passwd"), Path("\0"), answers.folder, Path("http://127.0.0.1:1/a.png")]
    files = [upload(answers.folder / f"{name}.png", name) for name in ("large", "bomb", "text", "damaged")]
    files += [upload(path, "lost") for path in lost] + [dict(path=7), dict(), upload(good, '<img src=x onerror="a()">')]
    found = answers(*inputs(files, maps=True)).answers
    cards = found.split("<article")[1:]
    sentences = [text(card.split("<p")[1].split(">", 1)[1]).strip() for card in cards[:-1]]
    assert sentences[0] == "Its 0.1 MB are more than the limit of 0.1 MB."
    assert "4,000,000" in sentences[1].replace("2000 x 2000", "4,000,000") and "limit of 1,000,000" in sentences[1]
    assert sentences[2] == "It is no image but text."
    assert "damaged or unusual PNG" in sentences[3]
    assert sentences[4:] == ["It is not here any more: choose it again."] * (len(lost) + 2)
    assert "ms in the network" in cards[-1] and "<img src=x" not in found and "<b>you" not in found
    assert str(tmp_path) not in found


def test_too_many_pictures_and_models_that_are_not_offered(answers: Answers, finished: Path) -> None:
    good = upload(one_picture(answers.folder / "good.png"))
    found = answers(*inputs([good] * (MOST_IMAGES + 1), second="finished")).answers
    assert found.count("<article") == found.count("ms in the network") == MOST_IMAGES
    assert f"the first {MOST_IMAGES} are shown" in found
    assert UNUSABLE in answers([good], good, str(finished / ".."), None).answers
    assert "answers appear here" in answers(None, None, ["x"], {}, 3, "x", math.nan, {}, [], 1).answers


def test_a_damaged_model_spoils_no_other(
    answers: Answers, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished / "best", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"x")
    answers.models = Models([str(finished), str(tmp_path / "broken")], device="cpu")
    found = answers([upload(one_picture(answers.folder / "good.png"))], None, "finished", "broken").answers
    assert found.count("ms in the network") == 1 and UNUSABLE in found and str(tmp_path) not in found
    assert str(tmp_path / "broken") in capsys.readouterr().err


def test_a_bug_is_a_sentence_on_the_page_and_a_traceback_in_the_terminal(
    answers: Answers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("secret detail")

    good = upload(one_picture(answers.folder / "good.png"))
    monkeypatch.setattr("conv2former.tools.demo.models.Model.look", fail)
    found = answers([good], None, "finished", "").answers
    assert OUR_FAULT in found and "secret" not in found and "secret detail" in capsys.readouterr().err
    monkeypatch.setattr(page_module, "decode", fail)
    found = answers([good], None, "finished", "").answers
    assert OUR_FAULT in found and "secret" not in found and "Traceback" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ gate


@pytest.fixture
def client(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """The page behind its gate, in this process, which cannot connect to anywhere."""
    monkeypatch.setattr(page_module, "SWEEP_SECONDS", 1)
    monkeypatch.setattr(page_module, "KEPT_SECONDS", 1)

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError(f"connects to {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    gate = gated(finished, tmp_path / "uploads", monkeypatch)
    with TestClient(gate, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


def sent(client: TestClient, name: str, content: bytes) -> str:
    """The path of an upload on the server."""
    answer = client.post("/gradio_api/upload", files=dict(files=(name, io.BytesIO(content))))
    assert answer.status_code == 200, answer.text
    return answer.json()[0]


def test_no_file_is_served_but_uploads(client: TestClient, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    for path in (
        *("/etc/passwd", "%2Fetc%2Fpasswd", "..%2f..%2f..%2fetc/passwd", "/proc/self/environ", "http://127.0.0.1/", ""),
        *(finished / "best" / "config.json", finished / "run.json", tmp_path / "uploads" / ".." / "secret.png"),
        *(f"{tmp_path}/uploads/..%2Fsecret.png", tmp_path / "secret.png", Path(conv2former_cli.__file__), "%00"),
    ):
        answer = client.get(f"/gradio_api/file={path}")
        assert answer.status_code == 404 and answer.text.startswith("There is no such"), path
    for path in ("/static/../../blocks.py", "/assets/%2e%2e/%2e%2e/package.json", "/assets/..%2f..%2fpackage.json"):
        assert client.get(path).status_code == 404, path
    script = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    path = sent(client, "../../<b>drawing.svg", script)
    # at once: Gradio's sweep takes uploads of more than a second here
    assert not (tmp_path / "drawing.svg").exists() and len(list((tmp_path / "uploads").rglob("*.svg"))) == 1
    answer = client.get("/gradio_api/file=" + path)
    assert answer.content == script and "sandbox" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_nothing_passes_that_the_page_does_not_need(client: TestClient) -> None:
    for path in (
        *("docs", "openapi.json", "monitoring", "login", "gradio_api/info", "gradio_api/runs", "gradio_api/vibe-code"),
        *("gradio_api/proxy=http://127.0.0.1/", "gradio_api/openapi.json", "gradio_api/deep_link", "custom_component"),
        *("gradio_api/dev/reload", "gradio_api/stream/x", "gradio_api/mcp", "gradio_api/run-history/buckets"),
    ):
        assert client.get(f"/{path}").status_code == 404, path
    for path in ("run/predict", "api/predict", "call/look", "vibe-edit", "process_recording", "component_server"):
        assert client.post(f"/gradio_api/{path}", json={}).status_code == 404, path
    assert client.put("/gradio_api/upload", content=b"").status_code == 404
    assert client.get("/", headers=dict(host="evil.example")).status_code == 421
    assert client.get("/", headers=dict(host="[")).status_code == 421
    assert client.get("/", headers=dict(host="localhost:7860")).status_code == 200
    foreign = dict(origin="http://evil.example")
    assert client.post("/gradio_api/queue/join", json={}, headers=foreign).status_code == 403
    assert client.post("/gradio_api/queue/join", json={}, headers=dict(origin="null")).status_code == 403


def test_large_requests_are_turned_away(client: TestClient, tmp_path: Path) -> None:
    limit = UPLOAD_BYTES
    answer = client.post("/gradio_api/upload", files=dict(files=("a.png", io.BytesIO(bytes(limit + 1)))))
    assert answer.status_code == 413 and answer.text == (
        f"This is more than the {limit / 1e6:g} MB that are taken at once: choose fewer or smaller."
    )
    assert client.post("/gradio_api/queue/join", content=bytes(2 << 20)).status_code == 413
    assert client.post("/gradio_api/upload", content=iter([b"no", b"length"])).status_code == 411
    assert not list((tmp_path / "uploads").rglob("*.png"))


def test_broken_requests_get_no_traceback(client: TestClient) -> None:
    for content in (b"", b"{", b"[]", b'{"data": 1, "fn_index": 99, "session_hash": "x"}', b'{"fn_index": 0}'):
        for path in ("upload", "queue/join", "cancel", "reset"):
            kind = "multipart/form-data" if path == "upload" else "application/json"
            answer = client.post(f"/gradio_api/{path}", content=content, headers={"content-type": kind})
            assert "Traceback" not in answer.text and 'File "' not in answer.text, (path, content)


def look(client: TestClient, *data: Any) -> str:
    """The HTML of the answers for what the page's components hold."""
    answers, *_ = parts(client, *data)
    return answers


def parts(client: TestClient, *data: Any, action: int = 1) -> list[str]:
    """The HTML that the page gets; ``action`` 0 is that of another model."""
    body = dict(data=data, fn_index=action, session_hash="abc", trigger_id=None, event_data=None)
    assert client.post("/gradio_api/queue/join", json=body).status_code == 200
    for line in client.get("/gradio_api/queue/data", params=dict(session_hash="abc")).text.splitlines():
        message = json.loads(line.removeprefix("data: ")) if line else {}
        if message.get("msg") == "process_completed":
            return message["output"]["data"]
    raise AssertionError("no answer")


def test_a_request_names_no_file_that_was_not_uploaded(client: TestClient, tmp_path: Path) -> None:
    outside = one_picture(tmp_path / "outside.png")
    for path in (str(outside), "/etc/passwd", "https://example.org/a.png", "\0", "../outside.png"):
        body = dict(data=inputs([dict(path=path) | META]), fn_index=0, session_hash="abc")
        answer = client.post("/gradio_api/queue/join", json=body)
        assert (answer.status_code, answer.text) == (400, "The request names a file that was not uploaded."), path
    assert client.post("/gradio_api/queue/join", content=b"[" * 100_000).status_code == 400
    assert not [file for file in (tmp_path / "uploads").rglob("*") if file.is_file()]
    gone = dict(path=str(tmp_path / "uploads" / "gone.png")) | META
    assert "It is not here any more" in look(client, *inputs([gone]))
    path = sent(client, "digit.png", outside.read_bytes())
    given = inputs([upload(Path(path)) | META])
    assert "ms in the network" in look(client, *given)
    # what the models are and their examples, which are large, come with another model alone
    assert len(parts(client, *given)) == 3 and len(parts(client, *given, action=0)) == 5


def test_uploads_are_deleted_after_a_while(client: TestClient, tmp_path: Path) -> None:
    path = Path(sent(client, "digit.png", one_picture(tmp_path / "outside.png").read_bytes()))
    assert path.is_file()
    deadline = time.monotonic() + 20
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not path.exists()


def test_the_page_names_no_address_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    loaded = re.findall(r"<(?:link|script|img|iframe)[^>]*?(?:href|src)=\"?([^\" >]+)", page.text)
    assert loaded and not [address for address in loaded if "//" in address]
    assert not re.findall(r"@import|url\(\W?(?!data:)\w+:", client.get("/theme.css").text)


# ---------------------------------------------------------------------------------------------------------- server


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status of ``conv2former demo ARGUMENTS``, in this process."""
    return run_command(monkeypatch, "demo", *arguments)


def test_mistakes_are_one_line(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(finished / "best", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"x")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, words in (
            ([tmp_path / "new"], "neither a model of timm's nor a checkpoint"),
            (["conv2former_tt"], "did you mean 'conv2former_t"),
            ([tmp_path / "empty"], "has no config.json"),
            ([tmp_path / "broken"], "cannot be read"),
            ([finished, "--device", "cuda:99"], "use --device cpu"),
            ([finished, "--port", port], "give another --port"),
            ([finished, "--host", "no-such-host.invalid"], "leave --host out"),
            ([finished, "--host", "192.0.2.1"], "give another --port or --host"),
        ):
            free = [] if "--port" in arguments else ["--port", 0]
            assert command(monkeypatch, *arguments, *free) == 1
            output = capsys.readouterr()
            assert output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1, output.err
            assert words in output.err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert command(monkeypatch, finished) == 1
    assert "pip install gradio" in capsys.readouterr().err
    assert command(monkeypatch, finished, "--share") == 2


def test_it_listens_on_this_computer_alone() -> None:
    with listen("127.0.0.1", 0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"


@pytest.mark.slow
def test_ctrl_c_ends_it_cleanly(finished: Path) -> None:
    """SIGTERM: see ``test_demo_browser``."""
    with demo(finished) as running:
        with socket.create_connection(("127.0.0.1", int(running.url.split(":")[2].strip("/")))):  # one that stays open
            assert running.stop(signal.SIGINT) == 0
        assert running.errors.read_text() == ""
