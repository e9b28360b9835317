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
from typer.core import TyperCommand

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


class XAxis(StrEnum):
    """What learning curves are drawn over."""

    epoch = "epoch"
    step = "step"
    minutes = "minutes"


class Resume(StrEnum):
    """What to do with a run that is there."""

    yes = "yes"
    auto = "auto"


class BadImages(StrEnum):
    """What to do about an image that cannot be read."""

    error = "error"
    skip = "skip"


class Source(StrEnum):
    """How labelled images lie."""

    folder = "folder"
    tar = "tar"
    wds = "wds"
    hfds = "hfds"


class TrainCommand(TyperCommand):
    """Takes ``--resume`` alone for ``--resume yes``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts the value in where it was left out."""
        pairs = zip(args, [*args[1:], ""], strict=True)
        full = [f"{word}=yes" if word == "--resume" and value not in list(Resume) else word for word, value in pairs]
        return super().parse_args(ctx, full)


@app.command(cls=TrainCommand)
def train(
    recipe: Annotated[str | None, typer.Option(help="Recipe name, or a .yaml file of your own.")] = None,
    data: DataOption = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to make.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="Another timm model under the same recipe.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change the recipe; repeatable.")
    ] = None,
    resume: Annotated[
        Resume | None,
        typer.Option(metavar="[auto]", help="Continue the run in --out; 'auto' starts it where there is none."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="With --resume: go on with settings or images that differ from the run's.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    on_bad_image: Annotated[
        BadImages | None, typer.Option(help="Same as --set data.on_bad_image=...", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done; --out is then a picture (.png) or its folder.")
    ] = False,
) -> None:
    """Train a recipe on a folder of images: class folders, COCO's layout or pairs with label maps, as it says.

    Exit status: 0 when done, 75 when stopped by SIGTERM or SIGUSR1 with the state saved (run again with --resume),
    130 after Ctrl-C likewise, 1 on an error.

    Example: conv2former train --recipe cifar --data cifar10 --out runs/cifar --set schedule.epochs=10
    """
    from conv2former.errors import UserError
    from conv2former.recipes.schema import load_recipe

    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    # another model does not take the arguments that the recipe's own model needs; --set may give it some
    overrides = [*([f"model.name={model}", "model.args={}"] if model else []), *(set_ or [])]
    overrides += [f"data.on_bad_image={on_bad_image.value}"] if on_bad_image else []
    own = out / "recipe.yaml" if resume and out else None
    if overrides and recipe is None and own and own.exists():
        recipe = str(own)
    if overrides and recipe is None:
        raise UserError("--set and --model change a recipe: name it with --recipe")
    if force and not resume:
        raise UserError("--force goes with --resume")
    loaded = load_recipe(recipe, overrides=overrides) if recipe else None
    if dry_run:
        from conv2former.plan import plan

        if loaded is None or resume or overwrite:
            raise UserError("--dry-run plans a recipe: name it with --recipe, leave --resume and --overwrite out")
        print(plan(loaded, data=data, out=out))
        return
    if out is None:
        raise UserError("no run folder given: name one with --out DIR")

    from conv2former.train import Interrupted
    from conv2former.train import train as run_train

    try:
        going_on: Any = "auto" if resume == Resume.auto else bool(resume)
        evaluation = run_train(loaded, data=data, out=out, resume=going_on, overwrite=overwrite, force=force)
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
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per forward pass of a classifier (default: 64).")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 2,
    device: DeviceOption = "auto",
    source: Annotated[
        Source | None, typer.Option(help="Layout of a classifier's --data: class folders (the default), tar files, ...")
    ] = None,
    on_bad_image: Annotated[BadImages, typer.Option(help="'skip' leaves out what cannot be read.")] = BadImages.error,
    multi_scale: Annotated[
        bool, typer.Option("--multi-scale", help="Segmentation: six scales of each image, also mirrored.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="data.KEY=VALUE", help="How a detector's or segmenter's --data lies; repeatable."
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Count what a trained model gets right: accuracies of a classifier, COCO's 12 numbers, mIoU; draw pictures.

    Example: conv2former evaluate runs/cifar --data cifar10
    """
    from conv2former.evaluation import evaluate as run_evaluate

    evaluation, folder = run_evaluate(
        checkpoint,
        data=data,
        out=out,
        batch_size=batch_size,
        workers=workers,
        device=device,
        source=source.value if source else None,
        on_bad_image=on_bad_image.value,
        multi_scale=multi_scale,
        settings=tuple(set_ or []),
    )
    print(json.dumps(evaluation.to_json()) if json_ else _result_line(evaluation, "figures and pictures", folder))


@app.command()
def predict(
    checkpoint: CheckpointArgument,
    inputs: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    out: Annotated[Path | None, typer.Option(help="Folder for an annotated picture each.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Classes that a classifier names (default: 5).")] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least score of a detected object (default: 0.3).")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures that a classifier sees at once (default: 16).")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    device: DeviceOption = "auto",
) -> None:
    """Say what is on pictures, classes, objects or regions: one JSON line per file on standard output.

    Example: conv2former predict runs/cifar photo.jpg holiday/ --out annotated
    """
    from conv2former.prediction import run_predict

    options: dict[str, Any] = dict(batch_size=batch_size, workers=workers, device=device)
    options |= dict(top_k=top_k, threshold=threshold)
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
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, also of runs that still go on.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Picture to write, .png, .svg or .pdf (default: learning_curves.png in the run, comparison.png here "
            "for several).",
            show_default=False,
        ),
    ] = None,
    x: Annotated[
        XAxis, typer.Option("--x", help="What to draw over; minutes are those of training alone.")
    ] = XAxis.epoch,
) -> None:
    """Draw the learning curves of a run, or of several in one picture.

    Example: conv2former plot runs/cifar runs/other --out comparison.png
    """
    from conv2former.plots import plot_runs

    print(f"learning curves are in {plot_runs(runs, out=out, x=x.value)}")


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
def recipes(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    json_: JsonOption = False,
) -> None:
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
    columns = ["recipe", "model", "source", "paper", "measured"]
    if markdown:
        for row in (columns, ["---"] * len(columns), *cells):
            print(f"| {' | '.join(row)} |")
    else:
        _print_table(columns, cells, right=(3, 4))


@app.command()
def benchmark(
    models: Annotated[list[str], typer.Argument(help="Any timm models; they are compared with the first.")],
    mode: Annotated[
        list[str] | None,
        typer.Option(help="eager, compile, onnxruntime, openvino; repeatable (default: eager and compile)."),
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="Training steps instead of inference.")] = False,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16; repeatable (default: float32).", show_default=False)
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Images of a step; repeatable (default: 8).", show_default=False)
    ] = None,
    size: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Side of the image, pixels; repeatable (default: the first model's own)."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each configuration.")] = 10,
    threads: Annotated[
        int | None, typer.Option(min=1, help="On the CPU (default: as many as PyTorch takes).", show_default=False)
    ] = None,
    device: DeviceOption = "auto",
    ops: Annotated[str, typer.Option(help="What computes our operations: auto, reference, cpp, triton.")] = "auto",
    fuse: Annotated[
        bool | None, typer.Option("--fuse/--no-fuse", help="Re-parameterize for inference (default: yes).")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also show where the time of one step goes, by operation.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for rows, table and pictures.", show_default=False)] = None,
    json_: JsonOption = False,
) -> None:
    """Measure how fast models compute: images per second, memory, multiply-adds, side by side in turns.

    A configuration that fails is a row that says why; the exit status is 1 where none could be measured.

    Example: conv2former benchmark conv2former_t convnext_tiny --dtype bfloat16 --mode compile --mode openvino
    """
    from conv2former.benchmark import report
    from conv2former.benchmark.measure import benchmark as run_benchmark
    from conv2former.benchmark.options import BenchmarkOptions

    options = BenchmarkOptions(
        models=models,
        modes=mode or (),
        training=train,
        dtypes=dtype or ("float32",),
        batch_sizes=batch_size or (8,),
        image_sizes=size or (),
        rounds=rounds,
        threads=threads,
        device=device,
        ops=ops,
        fuse=fuse,
        profile=profile,
        out=out,
    )
    rows = run_benchmark(options)
    files = report.write(rows, out) if out else []
    if json_:
        print(json.dumps([row.to_json() for row in rows], indent=2))
        return
    print(report.conditions(rows))
    _print_table(report.columns(rows), [report.cells(row) for row in rows], right=report.RIGHT)
    if profile:
        print(f"\n{report.profiles(rows)}")
    if files:
        print(f"{', '.join(path.name for path in files)} are in {out}")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _result_line(evaluation: Any, what: str, folder: Path | None) -> str:
    return evaluation.line() + (f"; {what} are in {folder}" if folder else "")


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

        if "DataLoader worker (pid" in str(error):
            from conv2former.data.loading import KILLED_WORKER

            error = UserError(KILLED_WORKER)
        if type(error).__name__ == "OutOfMemoryError":
            error = UserError("out of GPU memory: lower --batch-size (of a classifier), or use --device cpu")
        if not isinstance(error, UserError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
