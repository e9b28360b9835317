"""Writes the tables that commands make into the documents: ``make docs-tables``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# the paper's tables that were trained here at small scale
REPRODUCED = ("table6", "fig4a", "fig4b", "table9")


def command(*arguments: str) -> str:
    """What ``conv2former ARGUMENTS`` prints."""
    call = [sys.executable, "-m", "conv2former_cli", *arguments]
    return subprocess.run(call, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """The tables of models, recipes and rows into docs/results, the models without ablations into the README."""
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
