"""The documents say what is true: tables, Python examples, settings, links (commands: ``test_commands.py``)."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path

import pytest

import conv2former_cli
from conv2former.engine.train import train
from conv2former.errors import UserError
from conv2former.models import zoo
from conv2former.recipes import load as recipe_schema
from conv2former.recipes import load_recipe, recipe_names
from conv2former.tools.reproduce import Request, reproduce
from digits import tiny_recipe, write_digits

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TABLES = runpy.run_path(str(ROOT / "docs/tables.py"))
MAX_CODE = 100  # characters of a line of code: what a page shows without wrapping
# words that DESIGN's readers had to read twice; all else is found by reading
BANNED = (
    "peer",
    "rival",
    "headline",
    "signs of life",
    "by heart",
    "goes with",
    "label map",
    "by chance",
    "shall",
    "mend",
)
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def table(counted: list[zoo.Row]) -> str:
    return zoo.to_markdown(counted)


def test_the_table_of_models_is_what_the_command_prints(table: str) -> None:
    assert (ROOT / "docs/results/models.md").read_text() == table + "\n", "run `make docs-tables`"


def test_the_table_of_recipes_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    conv2former_cli.recipes.recipes(markdown=True, json_=False)
    assert (ROOT / "docs/results/recipes.md").read_text() == capsys.readouterr().out, "run `make docs-tables`"


@pytest.mark.parametrize("name", TABLES["PAGES"])
def test_the_reference_is_what_the_package_says(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == TABLES["PAGES"][name](), "run `make docs-tables`"


def test_every_setting_and_option_says_what_it_means() -> None:
    for name in TABLES["PAGES"]:
        rows = [line for line in (ROOT / "docs" / name).read_text().splitlines() if line.startswith("| `")]
        assert len(rows) > 100 and not [row for row in rows if row.endswith("|  |")]


@pytest.mark.parametrize("name", TABLES["REPRODUCED"])
def test_the_tables_of_rows_are_what_the_command_writes(name: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs/results/rows.jsonl", tmp_path)
    _, files = reproduce(Request(name, out=tmp_path))
    for made in files:
        kept = ROOT / "docs/results" / made.name
        assert kept.exists() and (made.suffix == ".png" or kept.read_text() == made.read_text()), "`make docs-tables`"


def test_the_readmes_table_is_a_part_of_it(table: str) -> None:
    block = README.split("<!-- models:")[1].split("-->")[1].split("<!-- /models")[0].strip().splitlines()
    lines = table.splitlines()
    assert block[:2] == lines[:2] and set(block) <= set(lines)
    listed = {line.split("|")[1].strip() for line in block[2:]}
    assert {f"conv2former_{size}" for size in ("n", "t", "s", "b", "l", "is", "ib", "pico", "femto", "atto")} <= listed


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, as a reader would; with small images and a short recipe in place of real ones."""
    monkeypatch.chdir(tmp_path)
    write_digits(tmp_path / "photos", train=12)
    small = ["model.name=conv2former_test", "model.args={}", "data.input_size=32", "schedule.epochs=2"]
    train(tiny_recipe(*small), data=tmp_path / "photos", out=tmp_path / "runs" / "quickstart")
    original = recipe_schema.load_recipe

    def short(name: str, *, overrides: list[str]) -> recipe_schema.Recipe:
        cut = ["schedule.epochs=1", "schedule.warmup_epochs=0", "optim.batch_size=16", "data.input_size=32"]
        return original(name, overrides=[*overrides, *cut, "data.workers=0", "engine.accelerator=cpu"])

    monkeypatch.setattr("conv2former.recipes.load_recipe", short)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert [tuple(m.shape[1:]) for m in names["pyramid"]] == [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]
    assert names["logits"].shape == (1, 10) and names["model"].num_classes == 4
    assert names["recipe"].model.weights == "runs/quickstart"


def test_settings_in_the_text_exist() -> None:
    found = []
    for document in {*DOCUMENTS} - {ROOT / "docs/commands.md"}:
        text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
        found += re.findall(r"--set\s+([\w.]+=[^\s`]+)", text)
    assert len(found) >= 8
    recipes = ("imagenet1k_t", "cifar", "finetune_detection", "finetune_segmentation")
    for setting in {*found} - {"section.key=value", "SECTION.KEY=VALUE"}:
        assert any(takes(recipe, setting) for recipe in recipes), setting


def takes(recipe: str, setting: str) -> bool:
    try:
        return bool(load_recipe(recipe, overrides=[setting]))
    except UserError:
        return False


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


def test_the_paper_map_names_real_tests_and_models() -> None:
    text = (ROOT / "docs/paper_map.md").read_text()
    tests = set(re.findall(r"test_\w+\.py", text))
    assert tests and all((ROOT / "tests" / name).exists() for name in tests)
    recipes = {word for word in re.findall(r"`(\w+)`", text) if word.startswith(("imagenet", "coco", "ade20k"))}
    assert recipes <= set(recipe_names())


PROSE = [document for document in DOCUMENTS if document.name not in ("log.md", "CONTRIBUTING.md")]


@pytest.mark.parametrize("document", PROSE, ids=lambda path: path.name)
def test_pages_render_and_read_well(document: Path) -> None:
    """Lists stand apart from the paragraph before, no line of code is too long to be seen, no word is private."""
    before, code = "", False
    for number, line in enumerate(document.read_text().splitlines(), 1):
        where = f"{document.name}:{number}: {line}"
        if line.lstrip().startswith("```"):
            code = not code
        elif code:
            assert len(line) <= MAX_CODE, where
        else:
            item, above = re.match(r"\s*(?:[-*]|\d+\.) ", line), before.strip()
            assert not item or not above or re.match(r"\s*(?:[-*]|\d+\.) |\s{2,}", before), (
                f"an empty line is missing: {where}"
            )
            words = re.sub(r"`[^`]*`|\(http[^)]*\)", "", line).lower()
            assert not [word for word in BANNED if re.search(rf"\b{word}s?\b", words)], where
        before = line


def test_messages_of_troubleshooting_are_those_of_the_package() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    together = re.sub(r'"\s*f?"', "", sources)  # texts over several lines
    rows = (ROOT / "docs/troubleshooting.md").read_text().split("## By message")[1]
    found = re.findall(r"^\| `([^`]+)`", rows, re.M)
    assert len(found) > 15 and not [text for text in found if text not in together]
