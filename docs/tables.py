"""Writes the pages and tables that commands make into the documents: ``make docs-tables``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).parents[1]
# the paper's tables that were trained here at small scale
REPRODUCED = ("table6", "fig4a", "fig4b", "table9")


def command(*arguments: str) -> str:
    """What ``conv2former ARGUMENTS`` prints."""
    call = [sys.executable, "-m", "conv2former_cli", *arguments]
    return subprocess.run(call, check=True, capture_output=True, text=True).stdout


def commands_page() -> str:
    """Every command with its arguments and options."""
    import typer.main

    import conv2former_cli

    lines = ["# Commands", "", "All commands and their options, as `--help` behind a command shows them.", ""]
    lines += [
        "`--import MODULE` stands before the command: it imports a module of yours first, which may add a task.",
        "",
    ]
    for name, one in _leaves(typer.main.get_command(conv2former_cli.app)):
        text, _, example = (one.help or "").partition("Example: ")
        lines += [f"## {name}", "", *(" ".join(part.split()) + "\n" for part in text.strip().split("\n\n"))]
        lines += ["```bash", f"{example.strip()}", "```", ""] if example else []
        lines += ["| argument or option | default | meaning |", "|---|---|---|"]
        lines += [_option(given) for given in one.params if given.name != "help"]
        lines.append("")
    return "\n".join(lines)


def _leaves(group: Any, above: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, one in group.commands.items():
        found += _leaves(one, f"{above}{name} ") if hasattr(one, "commands") else [(f"{above}{name}", one)]
    return found


def _option(given: Any) -> str:
    """A row of an argument or option, from what typer keeps of its annotation."""
    kind = given.type_descriptor.annotation
    of = [one for one in (kind, *get_args(kind)) if get_origin(one) is Literal]
    choices = get_args(of[0]) if of else ()
    kind = next(iter(get_args(kind)), kind)
    if given.param_type_name == "argument":
        name = f"`{(given.metavar or given.name or '').upper()}`"
    else:
        word = given.metavar or {int: "NUMBER", float: "NUMBER", Path: "PATH"}.get(
            kind, "CHOICE" if choices else "TEXT"
        )
        value = "" if given.is_flag else f" {word}"
        name = ", ".join(f"`{switch}{value}`" for switch in [*given.opts, *given.secondary_opts])
    said = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
    default = given.default
    shown = "" if default in (None, False, [], ()) or callable(default) else f"`{default}`"
    return f"| {name} | {shown} | {_cell(given.help or '')}{said} |"


def settings_page() -> str:
    """Every setting of a recipe, by task and section."""
    from conv2former.config import Recipe
    from conv2former.tasks import TASKS, task_class

    lines = [*SETTINGS_HEAD]
    shared = {name for name in Recipe.model_fields if name != "data"}
    lines += [*_sections("All tasks", Recipe, shared)]
    for name in TASKS:
        config = task_class(name).config_class
        own = {field for field in config.model_fields if field not in shared}
        lines += _sections(name.capitalize(), config, own)
    return "\n".join(lines)


def _sections(title: str, config: Any, names: set[str]) -> list[str]:
    lines = [f"## {title}", ""]
    schema = config.model_json_schema()
    for name in sorted(config.model_fields, key=lambda name: name == "claim"):  # which is the last
        place = schema["properties"][name]
        reference = place.get("$ref") or next((one["$ref"] for one in place.get("allOf", [])), "")
        fields = schema["$defs"].get(reference.rpartition("/")[2], {}).get("properties", {})
        if name in names and fields:
            lines += [
                f"### {title.lower()}: `{name}`",
                "",
                "| setting | values | default | meaning |",
                "|---|---|---|---|",
            ]
            section = config.model_fields[name].annotation
            for key, field in fields.items():
                default = section.model_fields[key].get_default(call_default_factory=True)
                missing = section.model_fields[key].is_required()
                shown = "required" if missing else f"`{_plain(default)}`"
                lines.append(f"| `{name}.{key}` | {_values(field)} | {shown} | {_cell(field.get('description', ''))} |")
            lines.append("")
    return lines


def _plain(value: Any) -> str:
    if value == "":
        return "empty"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value) if isinstance(value, tuple) else value)


def _values(field: dict[str, Any]) -> str:
    """The type of a setting as the schema has it, in words."""
    if "enum" in field:
        return ", ".join(f"`{one}`" for one in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_values(one) for one in field["anyOf"]))
    words = dict(integer="whole number", number="number", string="text", boolean="true or false", object="mapping")
    kind = words.get(field.get("type", ""), dict(null="null", array="list").get(field.get("type", ""), "section"))
    low, high = (
        field.get(key, field.get(other))
        for key, other in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))
    )
    edge = [f"{'above' if 'exclusiveMinimum' in field else 'from'} {low}"] if low is not None else []
    edge += [f"{'below' if 'exclusiveMaximum' in field else 'to'} {high}"] if high is not None else []
    return " ".join([kind, *edge])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


SETTINGS_HEAD = """# Recipe settings

A recipe is a YAML file with the sections below. `--set SECTION.KEY=VALUE` changes one of them for a run. An unknown key
is an error. A default counts where neither the recipe nor its `base` says something else.

[Recipes](results/recipes.md) lists the recipes that come with the package.

""".splitlines()
PAGES = {"commands.md": commands_page, "settings.md": settings_page}


def main() -> None:
    """The tables of models, recipes and rows into docs/results, the models without ablations into the README."""
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page())
    table = command("models", "--variants", "--markdown")
    (ROOT / "docs/results/models.md").write_text(table)
    (ROOT / "docs/results/recipes.md").write_text(command("recipes", "--markdown"))
    for name in REPRODUCED:  # from rows.jsonl there
        command("reproduce", name, "--out", str(ROOT / "docs/results"))
    registered = command("models", "--markdown").splitlines()
    rows = "\n".join(line for line in registered if "ablation" not in line and "conv2former_test" not in line)
    readme = ROOT / "README.md"
    text = re.sub(
        r"(<!-- models:.*?-->\n).*?(<!-- /models -->)", rf"\g<1>{rows}\n\g<2>", readme.read_text(), flags=re.S
    )
    readme.write_text(text)


if __name__ == "__main__":
    main()
