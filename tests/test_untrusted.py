"""Files of somebody else's: nothing in them leads elsewhere, fills the memory, or ends in a traceback."""

from __future__ import annotations

import copy
import io
import json
import re
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image

from command import run_command
from conv2former.checkpoints import load_pretrained, save_pretrained
from conv2former.checkpoints.weights import saved_weights
from conv2former.data.images import BadImage, decode
from conv2former.engine.progress import TrainingProgress
from conv2former.errors import UserError, in_markdown
from conv2former.files import MOST_BYTES, MOST_LINE, parse_json, parse_yaml, read_lines
from conv2former.recipes.load import load_recipe
from conv2former.tasks import load, task_class
from conv2former.tasks.classification.archives import ShardSource
from conv2former.tasks.classification.network import build_model
from conv2former.tasks.classification.sources import HfdsSource
from conv2former.tasks.detection.coco import CocoSource
from conv2former_cli.common import print_table
from conv2former_runtime.errors import say, tell
from scenes import small_detector, small_segmenter, write_coco

RED = "\x1b[31m\nerror: all is well"
DUMPER = getattr(yaml, "CDumper", yaml.Dumper)  # in C where there is one, which takes a tenth of the time
DEEP = json.loads("[" * 200 + "]" * 200)
ANYTHING: list[Any] = [
    *(None, 0, -1, True, 1e-300, 10**7, 10**30, float("nan"), float("inf"), "", "x", RED, "9" * 6000),
    *([], [[]], ["a"], [0, 0, 0], [1, 2, 3, 4], [10**5] * 3, [3, 10**5, 10**5], DEEP, {}, {"a": 1}, {"a": [{}]}),
]
# of values of one kind, a second is a slow test
SECOND = [-1, 1e-300, 10**7, float("inf"), "x", [[]], ["a"], [1, 2, 3, 4], {"a": 1}]
EACH = [
    pytest.param(value, id=repr(value)[:20], marks=pytest.mark.slow if value in SECOND else ()) for value in ANYTHING
]
# of the places for a value a third, every third one from another first one for each value; the rest are slow tests
PART = pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2))])
ELSEWHERE = dict(
    url="http://127.0.0.1:1/a.pth",
    file="/etc/passwd",
    hf_hub_id="somebody/something",
    hf_hub_filename="x",
    source="hf-hub",
    custom_load=True,
    state_dict={"a": 1},
    tag="x",
    origin_url="http://127.0.0.1:1",
)


def a_third(places: list[Any], value: Any, part: int) -> list[Any]:
    """The places of a part: all three are all of them. By default every place gets values of several kinds."""
    ours = [other for other in ANYTHING if other in SECOND] + [other for other in ANYTHING if other not in SECOND]
    first = next(number for number, other in enumerate(ours) if other is value)
    return places[(first + part) % 3 :: 3]


def one_line_or_fine(call: Callable[[], Any]) -> str:
    """The message of the UserError that a call may end in, which is one short printable line."""
    try:
        call()
    except UserError as error:
        message = str(error)
        assert message.isprintable() and len(message) <= 2100
        return message
    return ""


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = timm.create_model("conv2former_test", num_classes=3)
    return save_pretrained(model, tmp_path_factory.mktemp("saved") / "model", label_names=["a", "b", "c"])


@pytest.fixture
def config(classifier: Path) -> Any:
    """The content of a ``config.json``, which ``with_config`` replaces."""
    text = (classifier / "config.json").read_text()
    yield json.loads(text)
    (classifier / "config.json").write_text(text)


def use(folder: Path, config: Any) -> str:
    """What is wrong with a saved model whose ``config.json`` says something."""
    (folder / "config.json").write_text(json.dumps(config))

    def everything() -> None:
        saved_weights(str(folder))
        task = load(folder)
        task.predict([task.preprocess(Image.new("RGB", (50, 40)))])

    return one_line_or_fine(everything)


# ------------------------------------------------------------------------------------------------------ config.json


@pytest.mark.parametrize(
    "name",
    [
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable"),
        *("exportable", "no_jit", "model_name", "features_only", "out_indices", "feature_cls", "pruned", "device"),
        *("pretrained_strict", "pretrained_filter_fn", "pretrained_model_args", "kwargs_filter", "model_cfg"),
    ],
)
def test_model_args_are_those_of_a_network(classifier: Path, config: Any, name: str) -> None:
    config["model_args"] = {name: "/etc/passwd"}
    message = use(classifier, config)
    assert f"cannot hold {name}" in message and "root:" not in message
    section = load_recipe("quickstart").model
    given = section.model_copy(update=dict(args={name: "/etc/passwd"}))
    assert f"cannot hold {name}" in one_line_or_fine(lambda: build_model(given, classes=["a", "b"]))
    for small in (small_detector, small_segmenter):
        recipe = small()
        own = recipe.model.model_copy(update=dict(args={name: True}))
        build = task_class(recipe.task).build
        assert f"cannot hold {name}" in one_line_or_fine(lambda b=build, r=recipe, s=own: b(r, ["a"], section=s))


def test_a_configuration_leads_nowhere(classifier: Path, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_pretrained(classifier).state_dict()

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError(f"connects to {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for key, value in ELSEWHERE.items():
        changed = copy.deepcopy(config)
        changed["pretrained_cfg"][key] = changed[key] = value
        assert use(classifier, changed) == "", key
        model = load_pretrained(classifier)
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
        assert value not in [*model.pretrained_cfg.values(), *saved_weights(str(classifier)).cfg.values()]


@PART
@pytest.mark.parametrize("value", EACH)
def test_any_value_in_a_configuration_is_used_or_refused(classifier: Path, config: Any, value: Any, part: int) -> None:
    inner = config["pretrained_cfg"]
    keys = [*inner, "label_names", "label_offset", "test_input_size", "label_descriptions", "pool_size"]
    args = ("dims", "depths", "kernel_size", "mod_layer", "act_layer", "in_chans", "global_pool", "num_classes")
    changes = [{key: value} for key in [*config, "task", "model_args", "recipe", "labels"]]
    changes += [dict(pretrained_cfg=inner | {key: value}) for key in keys]
    changes += [dict(model_args={key: value}) for key in args]
    for change in a_third(changes, value, part):
        use(classifier, config | change)


def test_what_makes_no_sense_is_refused(classifier: Path, config: Any) -> None:
    inner = config["pretrained_cfg"]
    for change, words in (
        (dict(label_names=["one"]), "1 label names for 3 classes"),
        (dict(pretrained_cfg=inner | dict(std=[0, 0, 0])), "std"),
        (dict(pretrained_cfg=inner | dict(input_size=[3, 10**5, 10**5])), "input_size"),
        (dict(pretrained_cfg=inner | dict(crop_pct=0.05, input_size=[3, 4000, 4000])), "80,000 pixels"),
        (dict(pretrained_cfg=inner | dict(mean=[0.5, 0.5], std=[0.5, 0.5])), "RGB"),
        (dict(pretrained_cfg=inner | dict(interpolation="none")), "interpolation"),
        (dict(model_args=dict(global_pool="")), "one number for each class"),
        (dict(model_args={"a": list(range(20_000))}), "more than 10,000 values"),
    ):
        assert words in use(classifier, config | change), change
    for text in ("[" * 100_000, '{"a":' * 100_000, '{"a": 1' + "0" * 6000 + "}", '{"a": NaN}', '{"a": 1e999}'):
        (classifier / "config.json").write_text(text)
        assert "is not JSON" in one_line_or_fine(lambda: load(classifier)), text[:20]
    (classifier / "config.json").write_text('{"a": "' + "x" * MOST_BYTES + '"}')
    assert "more than" in one_line_or_fine(lambda: load(classifier))


@pytest.mark.parametrize(
    ("architecture", "args"),
    [
        ("conv2former_t", dict(depths=[10**7, 3, 3, 3])),
        pytest.param("conv2former_t", dict(depths=[10**6, 3, 3, 3]), marks=pytest.mark.slow),
        ("conv2former_t", dict(dims=[10**6] * 4)),
        pytest.param("conv2former_t", dict(num_classes=10**6, head_hidden_size=10**6), marks=pytest.mark.slow),
        ("vit_tiny_patch16_224", dict(img_size=10**6)),
        pytest.param("resnet18", dict(layers=[10**6, 1, 1, 1]), marks=pytest.mark.slow),
        ("swin_tiny_patch4_window7_224", dict(img_size=10**6)),
    ],
)
def test_a_network_is_bounded_before_it_is_built(
    classifier: Path, config: Any, architecture: str, args: dict[str, Any]
) -> None:
    message = use(classifier, config | dict(architecture=architecture, model_args=args))
    assert "no network has" in message or "network of more than" in message
    args.pop("num_classes", None)
    section = load_recipe("quickstart").model.model_copy(update=dict(name=architecture, args=args, drop_path_rate=0.0))
    message = one_line_or_fine(lambda: build_model(section, classes=[str(n) for n in range(5000)]))
    assert "no network has" in message or "network of more than" in message


@pytest.mark.slow
@pytest.mark.parametrize("small", [small_segmenter, small_detector])
def test_any_value_in_a_saved_recipe_is_used_or_refused(small: Any, tmp_path: Path) -> None:
    recipe = small()
    task = task_class(recipe.task).build(recipe, ["a", "b"])
    task.save(tmp_path / "model", state=task.model.state_dict(), note={})
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    own = config["recipe"]
    for value in ANYTHING:
        for key in ("recipe", "pretrained_cfg", "label_names", "architecture"):
            use(tmp_path / "model", config | {key: value})
        for section in {"data", "model", "segmenter", "detector"} & own.keys():
            use(tmp_path / "model", config | dict(recipe=own | {section: value}))
    for section, key, value in (
        ("model", "args", {"pretrained_cfg_overlay": {"file": "/etc/passwd"}}),
        ("model", "args", {"depths": [10**6, 1, 1, 1]}),
        ("data", "short_side", 10**5),
        ("data", "std", [0, 0, 0]),
        *([("segmenter", "channels", 10**9), ("segmenter", "pool_scales", [10**6])] if "segmenter" in own else []),
        *([("detector", "channels", 10**9), ("detector", "rois", 10**9)] if "detector" in own else []),
    ):
        assert use(tmp_path / "model", config | dict(recipe=own | {section: own[section] | {key: value}})), (key, value)


# ------------------------------------------------------------------------------------------------------------ texts


LAUGHS = "x0: &x0 [lol, lol]\n" + "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]\n" for n in range(1, 10))
MERGED = "a0: &a0 {k: v}\n" + "".join(f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    "text",
    [
        *(LAUGHS, MERGED, "a: &a [*a]", "a: &a {b: *a}", "[" * 700, "a: " + "9" * 6000, "a: 0x" + "f" * 5000),
        *("a: !!timestamp x", "a: !!binary '#'", "a: !!int b", "a: !!bool b", "a: !!set {b, c}", "? [a]\n: b", "a: \0"),
        *("a: !!python/name:os.system", "a: .inf", "a: .nan", "a: 1e999", "{<<: 3}", "--- 1\n--- 2", "x" * (1 << 19)),
    ],
    ids=lambda text: repr(text)[:20],
)
def test_yaml_is_read_within_limits(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        parse_yaml(text)
    (tmp_path / "mine.yaml").write_text(text)
    assert "mine.yaml" in one_line_or_fine(lambda: load_recipe(str(tmp_path / "mine.yaml")))
    name = yaml.safe_dump(load_recipe("quickstart").raw())
    (tmp_path / "mine.yaml").write_text(f"{name}\nextra:\n  " + text.replace("\n", "\n  "))
    assert "mine.yaml" in one_line_or_fine(lambda: load_recipe(str(tmp_path / "mine.yaml")))


def test_yaml_says_what_it_said() -> None:
    assert parse_yaml("a: 1e-6\nb: &b [1, 2]\nc: *b\nd: 2001-01-01") == dict(a=1e-6, b=[1, 2], c=[1, 2], d="2001-01-01")
    assert parse_yaml("") is None and parse_yaml("{0: background, 255: crack}") == {0: "background", 255: "crack"}


@PART
@pytest.mark.parametrize("value", EACH[:-1])
def test_any_value_in_a_recipe_is_used_or_refused(value: Any, part: int, tmp_path: Path) -> None:
    raw = load_recipe("quickstart").raw()
    changes = [{section: value} for section in raw]
    for section, content in raw.items():
        changes += [{section: content | {key: value}} for key in (content if isinstance(content, dict) else ())]
    for change in a_third(changes, value, part):
        (tmp_path / "mine.yaml").write_text(yaml.dump(raw | change, Dumper=DUMPER))
        one_line_or_fine(lambda: load_recipe(str(tmp_path / "mine.yaml")).to_yaml())


def test_json_is_read_within_limits(tmp_path: Path) -> None:
    for text in (
        "[" * 100_000,
        "[" * 40 + "]" * 40,
        "1" + "0" * 6000,
        "NaN",
        "-Infinity",
        "1e999",
        "[0" + ",0" * 10**6,
    ):
        with pytest.raises(ValueError):
            parse_json(text)
    log = tmp_path / "metrics.jsonl"
    rows = ['{"kind": "step", "loss": NaN}', "[" * 100_000, '{"a": 1' + "0" * 6000 + "}", "\xff", '{"a": "']
    log.write_text("\n".join(rows) + "x" * (3 * MOST_LINE) + '"}\n{"kind": "epoch"}\n')
    assert [row["kind"] for row in read_lines(log)] == ["step", "epoch"]


# ------------------------------------------------------------------------------------------------------------- data


def shard(folder: Path, **files: bytes) -> Path:
    """A webdataset shard with an image and files beside it."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "png")
    with tarfile.open(folder / "a.tar", "w") as tar:
        for ending, content in dict(png=image.getvalue(), **files).items():
            member = tarfile.TarInfo(f"one.{ending}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder


def test_any_class_in_a_shard_is_used_or_refused(tmp_path: Path) -> None:
    for content in (
        b"[" * 100_000,
        b"9" * 6000,
        b'{"label": 1' + b"0" * 6000 + b"}",
        b"x" * (9 << 20),
        b"\xff",
        b"a" * 2000,
    ):
        assert "has no class" in one_line_or_fine(lambda c=content: ShardSource(shard(tmp_path, json=c)))
    for content in (b"9" * 2000, b"x" * (9 << 20)):
        assert "has no class" in one_line_or_fine(lambda c=content: ShardSource(shard(tmp_path, cls=c)))
    for value in ANYTHING:
        text = json.dumps(dict(label=value)).encode()
        one_line_or_fine(lambda t=text: ShardSource(shard(tmp_path, json=t)).load(0))
    shard(tmp_path, cls=b"0")
    for names in (b"x" * 5000, b"\xff\xfe", b"a\na", b"a\n" * (5 << 20)):
        (tmp_path / "classes.txt").write_bytes(names)
        assert "classes.txt" in one_line_or_fine(lambda: ShardSource(tmp_path))


def test_any_value_in_annotations_is_used_or_refused(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco")
    file = root / "annotations" / "instances_train2017.json"
    good = json.loads(file.read_text())
    for value in [*ANYTHING, 10**4000, "9" * 30, {"counts": [1, 10**12], "size": [10**6, 10**6]}, "/etc/passwd"]:
        for table in ("images", "annotations", "categories"):
            for key in good[table][0]:
                changed = copy.deepcopy(good)
                changed[table][0][key] = value
                file.write_text(json.dumps(changed))
                one_line_or_fine(lambda: CocoSource(root / "train2017", file).objects_of(0))


@pytest.mark.parametrize("name", ["/etc/passwd", "../../outside.png", "{}/outside.png"])
def test_annotations_name_images_below_their_folder_alone(name: str, tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco")
    Image.new("RGB", (128, 96)).save(tmp_path / "outside.png")
    file = root / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["images"][0]["file_name"] = name.format(tmp_path)
    file.write_text(json.dumps(content))
    assert "are not in" in one_line_or_fine(lambda: CocoSource(root / "train2017", file))


@pytest.mark.parametrize("path", ["/etc/passwd", "../../secret.png", "{}/secret.png", "{}/data/../secret.png", "\0"])
def test_rows_name_files_below_their_dataset_alone(path: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "own.png")
    rows = [dict(path=name, bytes=None) for name in (path.format(tmp_path), "own.png", f"{tmp_path}/data/own.png")]
    table = datasets.Dataset.from_dict(dict(image=rows, label=[0, 1, 1]))
    table.to_parquet(tmp_path / "data" / "train.parquet")
    source = HfdsSource(tmp_path / "data", "train")
    message = one_line_or_fine(lambda: source.load(0))
    assert "outside of the dataset" in message or ("\0" in path and message)
    assert source.load(1).size == source.load(2).size == (8, 8)


@pytest.mark.parametrize(
    "text", ["root:x:0:0:root", "password=hunter2", "P6 hunter2 1 1", "P3\n# a\nhunter2", "<svg>hunter2"]
)
def test_what_is_no_image_is_not_quoted(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text(text)
    for content in (tmp_path / "a.png", text.encode()):
        with pytest.raises(BadImage) as error:
            decode(content, name="a.png")
        assert not {"root", "password", "hunter2"} & set(
            re.findall(r"\w+", str(error.value).replace(str(tmp_path), ""))
        )


# ------------------------------------------------------------------------------------------------------------ names

EVIL = "\x1b[2J\x9b31m\u202e\rx\nerror: all is well <script>alert(1)</script> | [here](http://127.0.0.1) `code` *b* _i_"
RAW = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def test_a_name_in_markdown_is_shown_as_it_is() -> None:
    html = (
        pytest.importorskip("markdown_it")
        .MarkdownIt()
        .enable(["table", "strikethrough"])
        .render(f"Of {in_markdown(EVIL)} here")
    )
    assert "<script" not in html and "<a " not in html and "<code" not in html and "<em" not in html
    assert html.count("<p>") == 1 and "conv2former_t" in in_markdown("conv2former_t")


def test_lines_stay_lines(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"skipping {EVIL}")
    tell(EVIL, "second")
    print_table(["a", EVIL], [[EVIL, "b"]])
    progress = TrainingProgress(2, 1, global_batch=1, start=0)
    progress.say([EVIL, EVIL])
    progress.live = True
    progress.say(EVIL)
    output = capsys.readouterr()
    assert not RAW.search(output.out + output.err) and "\nerror:" not in output.out + output.err
    assert output.out.count("\n") == 4


@pytest.fixture(scope="module")
def evil_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders whose names are not to be trusted."""
    root = tmp_path_factory.mktemp("evil")
    for name in (EVIL.replace("/", ":"), "plain"):
        (root / name).mkdir()
        for number in range(6):
            Image.effect_noise((32, 32), 20 + number).convert("RGB").save(root / name / f"{number}{EVIL[:12]}.png")
    (root / "plain" / f"bad{EVIL[:20]}.png").write_text("hunter2")
    return root


@pytest.mark.slow
def test_names_of_classes_and_files_reach_no_terminal_and_no_card(
    evil_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(dict(base="quickstart", name=EVIL, data=dict(source="folder", val_fraction=0.3))))
    options = ["--data", evil_images, "--set", "data.on_bad_image=skip", "--set", "schedule.epochs=1"]
    options += ["--set", "optim.batch_size=2", "--set", "schedule.warmup_epochs=0"]
    for arguments in (
        ["train", "--recipe", recipe, *options, "--dry-run", "--verbose"],
        ["train", "--recipe", recipe, *options, "--out", out],
        ["evaluate", out, "--on-bad-image", "skip"],
        ["evaluate", out, "--data", evil_images],
        ["predict", out, evil_images],
        ["predict", out, evil_images / EVIL[:10]],
        ["explain", "maps", out, evil_images / "plain", "--out", tmp_path / "maps"],
        ["export", out, "--format", "torch", "--out", tmp_path / "exported"],
        ["train", "--recipe", recipe, "--data", tmp_path / EVIL[:10], "--out", tmp_path / "other"],
        ["train", "--recipe", EVIL],
        ["train", "--recipe", "quickstart", "--set", f"model.args.x={EVIL}", "--out", tmp_path / "other"],
        ["plot", out, tmp_path / EVIL[:10]],
        ["demo", EVIL],
        ["benchmark", EVIL],
    ):
        run_command(monkeypatch, *arguments)
        output = capfd.readouterr()
        for text in (output.out, output.err):
            assert not RAW.search(text), (arguments[0], RAW.search(text), text)
            assert "\nerror: all is well" not in text and "Traceback" not in text, (arguments[0], text)
    text = (out / "best" / "README.md").read_text() + (tmp_path / "exported" / "README.md").read_text()
    assert (
        not RAW.search(text)
        and "<script" not in text
        and "](http" not in text.replace("\\]", "")
        and "\nerror" not in text
    )
