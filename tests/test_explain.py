"""``conv2former explain``: what is drawn and measured agrees with plain arithmetic; mistakes end in one line."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from command import run_command
from conv2former import checkpoints
from conv2former.checkpoints.folder import save_dense
from conv2former.errors import UserError
from conv2former.models.ablations import WEIGHTINGS
from conv2former.tasks.classification.task import ClassificationTask
from conv2former.tasks.detection.model.detector import build_on_backbone
from conv2former.tasks.segmentation.upernet import build_upernet, resize
from conv2former.tools.explain import cams, field_report, kernels, maps, receptive_field, sheets, subjects
from conv2former.tools.explain.opening import Block, Explained, choose_blocks, open_explained
from scenes import scene, small_detector, small_segmenter

CLASSES = ["ground", "block", "disc"]
TASKS = ["classification", "segmentation", "detection"]
CPU = torch.device("cpu")
Fill = Callable[[nn.Module], nn.Module]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, fill: Fill) -> dict[str, Path]:
    """A model of each task with weights that look like trained ones, and a classifier that is no Conv2Former."""
    root = tmp_path_factory.mktemp("saved")
    for task, name in (("classification", "conv2former_test"), ("convnext", "test_convnext")):
        model = fill(timm.create_model(name, num_classes=len(CLASSES)))
        checkpoints.save_pretrained(model, root / task, label_names=CLASSES)
    segmenter, detector = small_segmenter(), small_detector()
    networks = {
        "segmentation": (segmenter, build_upernet(segmenter.model, segmenter.segmenter, num_classes=3)),  # type: ignore[attr-defined]
        "detection": (detector, build_on_backbone(detector.model, detector.detector, num_classes=3)),  # type: ignore[attr-defined]
    }
    for task, (recipe, network) in networks.items():
        args = recipe.model.args
        save_dense(root / task, recipe, state=fill(network).state_dict(), classes=CLASSES, model_args=args, note={})
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photographs of 128 x 96."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(3):
        scene(number)[0].save(folder / f"{number}.png")
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status of ``conv2former explain ARGUMENTS``, in this process."""
    return run_command(monkeypatch, "explain", *arguments)


def open_network(network: nn.Module) -> Explained:
    """A network as an explained classifier."""
    task = ClassificationTask.of(network)
    task.classes = CLASSES
    return Explained("some", task)


# modulation


@pytest.mark.parametrize("weighting", [None, *WEIGHTINGS])
def test_modulations_are_those_of_the_network(weighting: str | None, fill: Fill) -> None:
    """A is the convolution of GELU(W1 X); what the layer returns is the projection of what is drawn as A * V."""
    given = {} if weighting is None else dict(mod_layer=WEIGHTINGS[weighting])
    model = open_network(fill(timm.create_model("conv2former_test", **given)))
    blocks = choose_blocks(model, [3], [1, -1])
    assert [(block.stage, block.number) for block in blocks] == [(3, 1), (3, 2)]
    seen: dict[Any, Any] = {}
    for block in blocks:
        block.mod.register_forward_hook(lambda module, given, output: seen.update({module: (given[0], output)}))
    found = maps.modulations(model, torch.randn(1, 3, 64, 96), blocks)
    for own in found:
        mod = own.block.mod
        x, output = seen[mod]
        hidden = F.gelu(mod.w1(x)).permute(0, 3, 1, 2)
        a = F.conv2d(hidden, mod.dwconv.weight, mod.dwconv.bias, padding=2, groups=32)[0]
        assert own.a.shape == own.z.shape == (32, 4, 6)
        torch.testing.assert_close(own.a, a)
        torch.testing.assert_close(mod.proj(own.z.permute(1, 2, 0)), output[0], rtol=1e-4, atol=1e-5)
        if weighting in (None, "sum"):
            v = mod.w2(x)[0].permute(2, 0, 1)
            torch.testing.assert_close(own.z, a * v if weighting is None else a + v)
    assert not any(len(block.mod._forward_pre_hooks) for block in blocks)


def test_an_isotropic_network_has_blocks_too(fill: Fill) -> None:
    model = open_network(fill(timm.create_model("conv2former_is", dim=16, depth=3)))
    (block,) = choose_blocks(model, None, None)
    assert str(block) == "stage 1, block 3"
    assert maps.modulations(model, torch.randn(1, 3, 64, 64), [block])[0].a.shape == (16, 4, 4)


def test_blocks_are_counted_as_people_do() -> None:
    model = open_network(timm.create_model("conv2former_test"))

    def chosen(*given: Any) -> list[tuple[int, int]]:
        return [(block.stage, block.number) for block in choose_blocks(model, *given)]

    assert chosen(None, None) == [(1, 1), (2, 1), (3, 2), (4, 1)]
    assert chosen([3, 1, 3], [1]) == [(1, 1), (3, 1)]
    assert chosen([3], [2, -1, -2]) == [(3, 1), (3, 2)]
    for stages, blocks, message in (
        ([5], None, "use 1 to 4"),
        ([3], [0], "use 1 to 2"),
        (None, [2], "stage 1 of some"),
    ):
        with pytest.raises(UserError, match=message):
            choose_blocks(model, stages, blocks)


def test_all_channels_and_the_liveliest() -> None:
    a = torch.stack([torch.full((2, 2), 9.0), torch.tensor([[1.0, -1.0], [1.0, -1.0]]), torch.tensor([[0.0, 4.0]] * 2)])
    torch.testing.assert_close(maps.energy(a), torch.tensor([[82 / 3, 98 / 3]] * 2).sqrt())
    assert maps.liveliest(a, 2) == [2, 1] and len(maps.liveliest(a, 9)) == 3  # a large constant is not lively


def test_a_map_lies_over_its_place() -> None:
    """Pixels of the input keep their place; the padding at the right and below is cut off."""
    values = torch.zeros(4, 4)
    values[1, 2] = 1
    large = maps.enlarged(values, (64, 64), (50, 60))
    assert large.shape == (50, 60)
    assert [int(x) for x in np.unravel_index(large.argmax(), large.shape)] == [23, 39]
    assert large[16:32, 32:48].mean() > 0.5 and large[36:].max() < 0.4


def test_colours_over_a_picture() -> None:
    picture = np.full((4, 6, 3), 100, np.uint8)
    ramp = np.linspace(-1, 3, 24).reshape(4, 6)
    plain, signed = sheets.over(picture, ramp), sheets.over(picture, ramp, signed=True)
    assert plain.shape == picture.shape and plain.dtype == np.uint8
    assert plain[0, 0, 2] > plain[0, 0, 0] - 20 and plain[-1, -1, 0] > plain[-1, -1, 2]
    middle = signed.reshape(-1, 3)[np.abs(ramp).argmin()].astype(int)
    assert np.ptp(middle) < 20, "0 is the middle of the colours, without a hue"
    assert (sheets.over(picture, np.zeros((4, 6))) == sheets.over(picture, np.zeros((4, 6)))[0, 0]).all()


@pytest.mark.parametrize("task", TASKS)
def test_maps_of_any_task(
    task: str,
    saved: dict[str, Path],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture = photos / "0.png"
    assert run(monkeypatch, "maps", saved[task], picture, "--out", tmp_path, "--stage", 2, "--stage", 3) == 0
    (row,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert row == dict(file=str(picture), ok=True, sheet=str(tmp_path / "0.maps.png"), blocks=[[2, 1], [3, 2]])
    assert min(Image.open(row["sheet"]).size) > 200


def test_files_of_one_name_and_a_bad_one(
    saved: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    given = [photos / "0.png", photos / "0.png", tmp_path / "bad.png", "--out", tmp_path / "out", "--stage", 4]
    assert run(monkeypatch, "maps", saved["classification"], *given, "--channels", 0) == 1
    output = capsys.readouterr()
    rows = [json.loads(line) for line in output.out.splitlines()]
    assert [row["ok"] for row in rows] == [True, True, False] and "text" in rows[2]["error"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.maps.png"]
    assert output.err.splitlines()[-1] == "1 of 3 files have no sheet"


# class activation


def weighted(activation: torch.Tensor, score: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Grad-CAM (Selvaraju et al., Eqs. 1 and 2) from 0 to 1, at the size of the picture."""
    (gradient,) = torch.autograd.grad(score, activation)
    values = (gradient.mean(dim=(2, 3), keepdim=True) * activation).sum(dim=1, keepdim=True).relu()
    large = F.interpolate(values, size=size, mode="bilinear", align_corners=False)[0, 0].detach()
    large = large - large.min()
    return (large / large.max()).numpy()


@pytest.mark.parametrize("name", ["classification", "convnext"])
def test_grad_cam_of_a_classifier(name: str, saved: dict[str, Path], photos: Path) -> None:
    model = open_explained(saved[name], device="cpu")
    picture = Image.open(photos / "1.png")
    view, values, index, labels = cams.ActivationMaps(model, method=None, target="disc", stage=2).compute(picture)
    assert index == 2 and labels is None and values.shape == view.shape[:2]
    image = model.task.inputs(model.task.preprocess(picture).pixels)
    kept = []
    handle = model.task.model.stages[1].register_forward_hook(lambda module, given, output: kept.append(output))
    logits = model.task.model(image)
    handle.remove()
    expected = weighted(kept[0], logits[0, 2], view.shape[:2])
    assert expected.std() > 0.05
    np.testing.assert_allclose(values, expected, atol=2e-3)
    found = cams.ActivationMaps(model, method="layercam", target=None, stage=None).compute(picture)[2]
    assert found == int(logits.argmax()), "the class that the model finds is the default"


def test_grad_cam_of_a_segmenter_is_of_the_pixels_found(saved: dict[str, Path], photos: Path) -> None:
    model = open_explained(saved["segmentation"], device="cpu")
    picture = Image.open(photos / "1.png")
    explainer = cams.ActivationMaps(model, method="gradcam", target=None, stage=3)
    view, values, index, labels = explainer.compute(picture)
    image = model.task.inputs(model.task.preprocess(picture).pixels)
    assert view.shape == (72, 96, 3) and image.shape == (1, 3, 96, 96)
    kept = []
    handle = model.task.backbone.stages[2].register_forward_hook(lambda module, given, output: kept.append(output))
    logits = resize(model.task.model(image), image)[0, :, :72]
    handle.remove()
    assert labels is not None and index == np.bincount(labels.ravel()).argmax()
    np.testing.assert_array_equal(labels, logits.argmax(dim=0).numpy())
    expected = weighted(kept[0], logits[index][torch.from_numpy(labels) == index].sum(), (96, 96))[:72]
    np.testing.assert_allclose(values, expected, atol=2e-3)
    with torch.no_grad():
        model.task.model.classifier[1].bias[1] = -1e4
    explainer.target = 1
    with pytest.raises(sheets.NotShown, match="no pixel of it is found to be 'block'"):
        explainer.compute(picture)


@pytest.mark.parametrize("method", sorted(cams.METHODS))
def test_every_method(method: str, saved: dict[str, Path], photos: Path) -> None:
    model = open_explained(saved["classification"], device="cpu")
    fields, _ = cams.ActivationMaps(model, method=method, target=None, stage=3).sheet(Image.open(photos / "2.png"))
    assert fields["method"] == method and (fields["label"] is None) == (method == "eigencam")


@pytest.mark.parametrize(
    ("name", "given", "size"),
    [
        ("test_vit", {}, 160),
        ("test_resnet", {}, 160),
        ("conv2former_is", dict(dim=16, depth=4), 64),
        ("swin_tiny_patch4_window7_224", dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)), 224),
    ],
)
def test_maps_of_every_layout(name: str, given: dict[str, Any], size: int, fill: Fill) -> None:
    """NCHW, NHWC and tokens: a layer's output becomes a map whose positions are those of the picture."""
    model = open_network(fill(timm.create_model(name, **given)))
    layer, as_map = cams.target_layer(model, None)
    kept = []
    layer.register_forward_hook(lambda module, x, output: kept.append(as_map(output)))
    picture = torch.zeros(1, 3, size, size)
    with torch.no_grad():
        model.task.model(picture)
        picture[:, :, : size // 4, : size // 4] = 1
        model.task.model(picture)
    side = size // model.task.backbone.feature_info[-1]["reduction"]
    assert kept[0].shape == (1, model.task.backbone.num_features, side, side)
    changed = (kept[1] - kept[0]).abs().sum(dim=1)[0]
    assert changed[: side // 2, : side // 2].mean() > 1.5 * changed[side // 2 :, side // 2 :].mean()


def test_a_detector_gets_eigencam(
    saved: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(monkeypatch, "cam", saved["detection"], photos / "0.png", "--out", tmp_path, "--stage", 2) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["method"] == "eigencam" and row["index"] is None and Path(row["sheet"]).name == "0.cam.png"


def test_eigencam_refuses_a_map_that_would_fill_the_memory(
    saved: dict[str, Path], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cams, "MOST_POSITIONS", 100)
    model = open_explained(saved["detection"], device="cpu")
    with pytest.raises(UserError, match="not 768: give a later --stage"):
        cams.ActivationMaps(model, method=None, target=None, stage=1).compute(Image.open(photos / "0.png"))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"pip install grad-cam"):
        cams.library()


# receptive fields


def test_the_side_of_a_square() -> None:
    scores = np.zeros((9, 9))
    scores[4, 4] = 1
    assert receptive_field.side_length(scores, 0.99) == 1
    scores[2:7, 2:7] = 1  # 25 pixels: 1, 9, 25 in the squares
    assert [receptive_field.side_length(scores, share) for share in (0.03, 9 / 25 - 1e-9, 9 / 25, 0.99)] == [1, 3, 5, 5]
    scores[:] = 0
    scores[0, 3] = 1
    assert receptive_field.side_length(scores, 0.5) == 9, "the whole picture where no square around the centre holds it"


def test_scores_are_relu_of_gradients_of_relu() -> None:
    """A linear network, whose gradient is its taps: a square of the size of its kernel, negative taps left out."""
    conv = nn.Conv2d(3, 2, 5, padding=2, bias=False)
    with torch.no_grad():
        conv.weight.fill_(-1)
        conv.weight[0] = 0.5
        conv.weight[0, :, 0] = -0.5
    (scores,) = receptive_field.contributions(lambda x: [conv(x)], torch.ones(1, 3, 11, 11))
    expected = np.zeros((11, 11))
    expected[4:8, 3:8] = 3 * 0.5  # channel 1 is negative, so it counts nothing; row 3 has negative taps
    np.testing.assert_allclose(scores, expected)
    assert receptive_field.side_length(scores, 0.99) == 5


def reference_field(model: nn.Module, images: list[torch.Tensor], stage: int) -> np.ndarray:
    """RepLKNet's script in a few lines, for the map of one stage."""
    total = 0
    for image in images:
        image = image.clone().requires_grad_()
        x = model.forward_intermediates(image, intermediates_only=True)[stage]  # type: ignore[operator]
        F.relu(x[:, :, x.shape[2] // 2, x.shape[3] // 2]).sum().backward()
        total = total + F.relu(image.grad).sum((0, 1))  # type: ignore[operator,arg-type]
    return (total / len(images)).numpy()  # type: ignore[operator,attr-defined]


def test_a_field_is_that_of_the_published_script(saved: dict[str, Path], photos: Path) -> None:
    subject = subjects.open_subject(str(saved["classification"]), size=64, device=CPU)
    pictures = sorted(photos.iterdir())
    scores = receptive_field.field(subject, pictures, 64)
    mean, std = (torch.tensor(values)[:, None, None] for values in (subject.mean, subject.std))
    images = []
    for path in pictures:
        pixels = np.array(Image.open(path).resize((64, 64), Image.Resampling.BICUBIC))
        images.append(((torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std)[None])
    model = checkpoints.load_pretrained(saved["classification"])
    for stage in range(4):
        np.testing.assert_allclose(scores[stage], reference_field(model, images, stage), rtol=2e-3, atol=1e-4)


def test_images_are_spread_and_counted(photos: Path, tmp_path: Path) -> None:
    assert [path.name for path in receptive_field.choose_images(photos, 2)] == ["0.png", "2.png"]
    with pytest.raises(UserError, match=r"holds 3 images, 50 are to be averaged over: .* --images 3"):
        receptive_field.choose_images(photos, 50)
    with pytest.raises(UserError, match="no such folder"):
        receptive_field.choose_images(tmp_path / "none", 1)
    with pytest.raises(UserError, match="no images in"):
        receptive_field.choose_images(tmp_path, 1)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("conv2former_test", {}, ([0, 1, 2, 3], [4, 8, 16, 32])),
        ("conv2former_is", {}, ([3, 8, 12, 17], [16] * 4)),
        ("test_resnet", {}, ([1, 2, 3, 4], [4, 8, 16, 32])),
        ("test_vit", {}, ([0, 2, 3, 5], [16] * 4)),
        ("swin_tiny_patch4_window7_224", {}, ([0, 1, 2, 3], [4, 8, 16, 32])),
    ],
)
def test_which_maps_are_stages(
    name: str, given: dict[str, Any], expected: Any, on_meta: Callable[..., nn.Module]
) -> None:
    assert subjects.stage_indices(name, on_meta(name, **given)) == expected


def test_names_with_arguments(photos: Path) -> None:
    """The kernel widens the field of the first stage; untrained weights are the same every time, and noted."""
    rows = {}
    for name in ("conv2former_test:ls_init_value=1,kernel_size=5", "conv2former_test:kernel_size=15,ls_init_value=1"):
        pair = [
            receptive_field.measure(subjects.open_subject(name, size=96, device=CPU), [photos / "0.png"], 96)
            for _ in range(2)
        ]
        np.testing.assert_array_equal(pair[0][1], pair[1][1])
        rows[name] = pair[0][0]
    small, large = rows.values()
    assert [row.stride for row in large] == [4, 8, 16, 32] and {row.weights for row in large} == {"untrained"}
    assert large[0].scores["50"] <= large[0].scores["99"] and large[0].scores["99"] > small[0].scores["99"] + 20
    assert small[0].notes == ("untrained: random weights", "over 1 images alone, the measure takes 50 or more")


@pytest.mark.parametrize(
    ("name", "note"),
    [("conv2former_test", "ls_init_value=1 does not"), ("test_resnet", "zero_init_last=false does not")],
)
def test_blocks_without_effect_are_noted(name: str, note: str) -> None:
    notes = subjects.open_subject(name, size=64, device=CPU).notes
    assert len(notes) == 2 and note in notes[1]
    other = dict(conv2former_test=":ls_init_value=1", test_resnet=":zero_init_last=false")[name]
    assert len(subjects.open_subject(name + other, size=64, device=CPU).notes) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("conv2former_tt", "did you mean 'conv2former_t"),
        ("conv2former_test:kernel_size", "is not of the form"),
        ("conv2former_test:kernel_size=[", "is not of the form"),
        ("conv2former_test:kernel_size=4", "use an odd number"),
        ("conv2former_test:kernels=5", "cannot be built: .*kernels"),
        ("nowhere/at/all", "neither a model of timm's nor a checkpoint"),
    ],
)
def test_a_wrong_name_is_found_before_anything_is_measured(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        subjects.check_name(name, size=64)
    assert "\n" not in str(error.value)


def test_fields_of_models_and_checkpoints(
    saved: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    names = ["test_vit", *(saved[task] for task in TASKS), "test_vit"]
    given = ["--data", photos, "--out", tmp_path / "out", "--images", 2, "--size", 64]
    assert run(monkeypatch, "field", *names, *given, "--json") == 0
    output = capsys.readouterr()
    rows = json.loads(output.out)
    assert [row["model"] for row in rows] == [str(name) for name in names[:4] for _ in range(4)]
    assert {row["weights"] for row in rows[:4]} == {"untrained"} and {row["weights"] for row in rows[4:]} == {"trained"}
    assert all(0 < row["scores"]["50"] <= row["scores"]["99"] <= 64 for row in rows)
    assert "(4 of 4)" in output.err
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert sorted(files) == [f"receptive_fields.{ending}" for ending in ("jsonl", "md", "png")]
    lines = files["receptive_fields.jsonl"].read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    table = files["receptive_fields.md"].read_text()
    first = rows[0]["scores"]
    assert f"| test_vit | untrained | 16 16 16 16 | scores | {first['50']} / {first['99']} |" in table
    assert "All: over 2 images alone" in table and "test_vit: untrained: random weights." in table


def test_what_is_measured_stays_where_a_later_network_fails(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Weights that cannot be downloaded are noticed when it is their turn."""
    build = timm.create_model

    def offline(name: str, **given: Any) -> nn.Module:
        if given.get("pretrained"):
            raise OSError("no such\nhost")
        return build(name, **given)

    monkeypatch.setattr(timm, "create_model", offline)
    given = ["--data", photos, "--out", tmp_path, "--images", 1, "--size", 64]
    assert run(monkeypatch, "field", "conv2former_test:ls_init_value=1", "test_vit:pretrained=true", *given) == 1
    output = capsys.readouterr()
    message = "error: test_vit:pretrained=true cannot be built: no such host"
    assert output.out == "" and output.err.splitlines()[-1] == message
    rows = [json.loads(line) for line in (tmp_path / "receptive_fields.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == [1, 2, 3, 4] and (tmp_path / "receptive_fields.md").exists()


def test_the_table_on_standard_output(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    given = ["--data", photos, "--out", tmp_path, "--images", 1, "--size", 64]
    assert run(monkeypatch, "field", "conv2former_test:ls_init_value=1", "test_vit", *given) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(index for index, line in enumerate(lines) if line.startswith("model "))
    assert "mean of 1 images at 64 px" in lines[0] and "All: untrained" in lines[1]
    assert [line.split()[0] for line in lines[head + 1 : -1]] == ["conv2former_test:ls_init_value=1"] * 2 + [
        "test_vit"
    ] * 2


def test_tables_of_networks_with_fewer_stages() -> None:
    side = {"50": 3, "99": 7}
    rows = [
        receptive_field.FieldRow(name, "trained", stage, 4, 64, 50, side, side)
        for name, count in (("a", 2), ("b", 1))
        for stage in range(1, count + 1)
    ]
    assert field_report.cells(rows)[2] == ["b", "trained", "4", "scores", "3 / 7", ""]
    assert {len(line) for line in [field_report.columns(rows), *field_report.cells(rows)]} == {6}


def test_long_names_are_broken_behind_punctuation() -> None:
    assert field_report.broken("resnet50d") == "resnet50d"
    long = "swin_tiny_patch4_window7_224:depths=[1,1],img_size=64"
    lines = field_report.broken(long).splitlines()
    assert "".join(lines) == long and max(map(len, lines)) <= 22 and lines[0] == "swin_tiny_patch4_"


# kernels


def test_kernels_side_by_side() -> None:
    taps = np.arange(5 * 9, dtype=float).reshape(5, 3, 3)
    grid = kernels.tiled(taps)
    assert grid.shape == (2 * 4 + 1, 3 * 4 + 1)
    np.testing.assert_array_equal(grid[1:4, 5:8], taps[1])
    np.testing.assert_array_equal(grid[5:8, 1:4], taps[3])
    assert np.isnan(grid[::4]).all() and np.isnan(grid[5:8, 9:12]).all()
    assert np.isfinite(grid).sum() == taps.size


def test_the_largest_kernels_come_first() -> None:
    mod = timm.create_model("conv2former_test").stages[0].blocks[0].mod
    with torch.no_grad():
        mod.dwconv.weight[:] = torch.arange(16.0)[:, None, None, None]
    shown = kernels.kernel_sheet(Block(1, 1, mod)).axes[0].images[0].get_array()
    assert shown is not None and [shown[3, column] for column in (3, 9, 15)] == [15, 14, 13]


@pytest.mark.parametrize("task", TASKS)
def test_sheets_of_kernels(
    task: str, saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    given = ["--out", tmp_path, "--stage", 3, "--block", 1, "--block", -1]
    assert run(monkeypatch, "kernels", saved[task], *given) == 0
    names = ["kernels.stage3.block1.png", "kernels.stage3.block2.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert capsys.readouterr().out == f"{', '.join(names)} are in {tmp_path}\n"


# the command line

MAPS = ["maps", "{classification}", "{photos}", "--out", "{new}"]
CAM = ["cam", "{segmentation}", "{photos}", "--out", "{new}"]
FIELD = ["field", "conv2former_test", "--data", "{photos}", "--out", "{new}", "--size", "64"]
BAD = [
    ([*MAPS, "--stage", "7"], "has no stage 7: use 1 to 4"),
    ([*MAPS, "--block", "3"], "has no block 3"),
    ([*MAPS, "--device", "cuda:99"], "use --device cpu"),
    (["maps", "{convnext}", "{photos}", "--out", "{new}"], "holds a ConvNeXt, whose blocks have no modulation"),
    (["maps", "{classification}", "{empty}", "--out", "{new}"], "no images in"),
    (["maps", "{new}", "{photos}", "--out", "{new}"], "does not exist"),
    (["maps", "{classification}", "{photos}", "--out", "{file}"], "cannot write {file}"),
    ([*CAM, "--method", "gradcan"], "use one of gradcam"),
    ([*CAM, "--class", "disk"], "knows no class 'disk'; did you mean 'disc'?"),
    ([*CAM, "--class", "3"], "knows no class '3': it knows ground, block, disc"),
    ([*CAM, "--stage", "7"], "has no stage 7: use 1 to 4"),
    ([*CAM, "--method", "eigencam", "--class", "disc"], "leave --class out, or take gradcam"),
    (
        ["cam", "{detection}", "{photos}", "--out", "{new}", "--method", "gradcam"],
        "which a detection model does not have",
    ),
    (["cam", "{detection}", "{photos}", "--out", "{new}", "--class", "disc"], "eigencam knows no classes"),
    (FIELD, "say --images 3"),
    ([*FIELD, "conv2former_tt"], "did you mean 'conv2former_t"),
    ([*FIELD[:2], "--data", "{new}", "--out", "{new}"], "no such folder"),
    ([*FIELD[:4], "--out", "{file}", "--size", "64", "--images", "1"], "cannot write to --out {file}"),
    ([*FIELD, "swin_tiny_patch4_window7_224", "--images", "1", "--device", "cuda:99"], "use --device cpu"),
    (["kernels", "{convnext}", "--out", "{new}"], "give a Conv2Former"),
    (["kernels", "{classification}", "--out", "{new}", "--stage", "5"], "has no stage 5"),
    (["kernels", "{classification}", "--out", "{file}"], "cannot write {file}"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_a_mistake_is_one_line_and_a_status(
    arguments: list[str],
    message: str,
    saved: dict[str, Path],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("hello")
    places = saved | {name: tmp_path / name for name in ("new", "file", "empty")} | dict(photos=photos)
    status = run(monkeypatch, *(argument.format(**places) for argument in arguments))
    output = capsys.readouterr()
    assert status == 1 and output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert message.format(**places) in output.err
    assert not places["new"].exists()


def test_a_picture_that_does_not_show_the_class(
    saved: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It is a line without a sheet, and the others go on."""
    compute = cams.ActivationMaps.compute

    def second(self: Any, picture: Image.Image) -> Any:
        if (np.asarray(picture) == np.asarray(Image.open(photos / "1.png"))).all():
            raise sheets.NotShown("no pixel of it is found to be 'disc'")
        return compute(self, picture)

    monkeypatch.setattr(cams.ActivationMaps, "compute", second)
    assert run(monkeypatch, "cam", saved["classification"], photos, "--out", tmp_path, "--class", "disc") == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["ok"] for row in rows] == [True, False, True] and rows[1]["error"].endswith("'disc'")
    assert rows[0]["label"] == "disc" and rows[0]["index"] == 2


@pytest.mark.parametrize("command", ["maps", "cam", "field", "kernels"])
def test_every_command_shows_an_example(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, command, "--help") == 0
    assert f"Example: conv2former explain {command}" in " ".join(capsys.readouterr().out.split())
