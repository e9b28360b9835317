"""The command line. It parses, imports lazily and calls one function.

It stands beside the package and not in it, because importing the package registers models and therefore imports torch
and timm, which takes seconds: ``conv2former --help`` must not wait for that.
"""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="conv2former",
    help="Conv2Former: train, evaluate, predict, convert. Example: conv2former train --recipe quickstart --out runs/q",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DataOption = Annotated[Path | None, typer.Option(help="Folder of images.", show_default=False)]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
CheckpointArgument = Annotated[
    Path, typer.Argument(help="Run folder (its best weights), saved model folder, or its model.safetensors.")
]


class Normalisation(StrEnum):
    """Mean and standard deviation that a checkpoint expects."""

    imagenet = "imagenet"
    half = "half"


@app.command()
def train(
    recipe: Annotated[str | None, typer.Option(help="Recipe name, or a .yaml file of your own.")] = None,
    data: DataOption = None,
    out: Annotated[Path, typer.Option(help="Run folder to make.")] = ...,  # type: ignore[assignment]
    model: Annotated[str | None, typer.Option(help="Another timm model under the same recipe.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change the recipe; repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
) -> None:
    """Train a recipe on a folder of images (train/ and val/, one folder per class).

    Example: conv2former train --recipe cifar --data cifar10 --out runs/cifar --set schedule.epochs=10
    """
    from conv2former.errors import UserError
    from conv2former.recipes.schema import load_recipe

    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    # another model does not take the arguments that the recipe's own model needs; --set may give it some
    overrides = [*([f"model.name={model}", "model.args={}"] if model else []), *(set_ or [])]
    if overrides and recipe is None:
        raise UserError("--set and --model change a recipe: name it with --recipe")
    loaded = load_recipe(recipe, overrides=overrides) if recipe else None

    from conv2former.train import Interrupted
    from conv2former.train import train as run_train

    try:
        evaluation = run_train(loaded, data=data, out=out, resume=resume, overwrite=overwrite)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.code)
    if evaluation:
        print(_result_line(evaluation, "weights, metrics and pictures", out))


@app.command()
def evaluate(
    checkpoint: CheckpointArgument,
    data: DataOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the report (default: the run).")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 2,
    device: DeviceOption = "auto",
    json_: JsonOption = False,
) -> None:
    """Count top-1, top-5 and per-class accuracy; draw a confusion matrix and the worst mistakes.

    Example: conv2former evaluate runs/cifar --data cifar10
    """
    from conv2former.evaluate import evaluate as run_evaluate

    evaluation, folder = run_evaluate(
        checkpoint, data=data, out=out, batch_size=batch_size, workers=workers, device=device
    )
    print(json.dumps(evaluation.to_json()) if json_ else _result_line(evaluation, "figures and pictures", folder))


@app.command()
def predict(
    checkpoint: CheckpointArgument,
    inputs: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    out: Annotated[Path | None, typer.Option(help="Folder for an annotated picture each.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Classes to name.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    device: DeviceOption = "auto",
) -> None:
    """Name what is on pictures: one JSON line per file on standard output.

    Example: conv2former predict runs/cifar photo.jpg holiday/ --out annotated
    """
    from conv2former.predict import run_predict

    options: dict[str, Any] = dict(top_k=top_k, batch_size=batch_size, workers=workers, device=device)
    sys.exit(run_predict(checkpoint, inputs, out=out, **options))


@app.command()
def convert(
    src: Annotated[Path, typer.Argument(help="The authors' checkpoint (.pth.tar, .pth or .safetensors).")],
    dst: Annotated[Path, typer.Argument(help="Folder to make.")],
    model: Annotated[str, typer.Option(help="What it is, conv2former_t for example.")],
    normalisation: Annotated[
        Normalisation, typer.Option(help="Mean and std that the weights expect: ImageNet's, or 0.5.")
    ] = Normalisation.imagenet,
    ema: Annotated[bool, typer.Option(help="Prefer averaged weights where the file has both.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST.")] = False,
) -> None:
    """Turn the authors' checkpoint into a folder for timm's local-dir: without running code that is in it.

    Example: conv2former convert conv2former_t.pth.tar weights/t --model conv2former_t
    """
    from conv2former.checkpoints import convert as run_convert

    report = run_convert(src, dst, model=model, mean_std=normalisation.value, ema=ema, overwrite=overwrite)
    print(report)
    print(f"load it with timm.create_model('local-dir:{dst}', pretrained=True)")


@app.command()
def models(
    variants: Annotated[
        bool, typer.Option("--variants", help="Also the paper's other kernel and image sizes.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    json_: JsonOption = False,
) -> None:
    """List the models with parameters, multiply-adds and the paper's accuracy.

    Example: conv2former models --variants
    """
    from conv2former import zoo

    rows = zoo.rows(variants=variants)
    if json_:
        print(json.dumps([row.to_json() for row in rows], indent=2))
    elif markdown:
        print(zoo.to_markdown(rows))
    else:
        columns = ["model", "kernel", "image", "parameters", "MACs (G)", "paper top-1", "with 22k", "origin"]
        cells = [
            [
                row.name,
                str(row.kernel_size),
                str(row.image_size),
                f"{row.params:,}",
                f"{row.macs / 1e9:.3f}",
                _percent(row.paper_top1),
                _percent(row.paper_top1_22k),
                row.origin,
            ]
            for row in rows
        ]
        _print_table(columns, cells, right=range(1, 7))


@app.command()
def recipes(json_: JsonOption = False) -> None:
    """List the recipes that come with the package.

    Example: conv2former recipes --json
    """
    from conv2former.recipes.schema import load_recipe, recipe_names

    loaded = [load_recipe(name) for name in recipe_names()]
    if json_:
        print(json.dumps([recipe.model_dump(mode="json") for recipe in loaded], indent=2))
        return
    cells = [
        [
            recipe.name,
            recipe.model.name,
            recipe.claim.source,
            _percent(recipe.claim.paper),
            recipe.claim.measured if isinstance(recipe.claim.measured, str) else _percent(recipe.claim.measured),
        ]
        for recipe in loaded
    ]
    _print_table(["recipe", "model", "source", "paper top-1", "measured"], cells, right=(3, 4))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _result_line(evaluation: Any, what: str, folder: Path | None) -> str:
    counts = evaluation.counts
    line = (
        f"top-1 {counts['top1']:.2f}% ({counts['correct']} of {counts['images']} images), top-5 {counts['top5']:.2f}%"
    )
    return line + (f"; {what} are in {folder}" if folder else "")


def _print_table(columns: list[str], cells: list[list[str]], *, right: Any = ()) -> None:
    # not a rich table: a pipe or a narrow terminal must not cut the names
    widths = [max(len(row[i]) for row in [columns, *cells]) for i in range(len(columns))]
    for row in [columns, *cells]:
        parts = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(parts).rstrip())


def main() -> None:
    """Entry point: a user's mistake ends in one line and status 1, ours in a traceback."""
    try:
        app()
    except BrokenPipeError:
        # whoever reads our output has gone (`| head`); keep the interpreter from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, RuntimeError) as error:
        # the class is imported only where something went wrong, so that --help stays quick
        from conv2former.errors import UserError

        if type(error).__name__ == "OutOfMemoryError":
            error = UserError("out of GPU memory: lower --batch-size, or use --device cpu")
        if not isinstance(error, UserError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
