"""``conv2former train``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Option

from conv2former_cli.common import BadImages, DataOption, app, result_line, say, tell
from conv2former_cli.habits import TrainCommand

FIRST = (
    "For your own images in one folder per class: conv2former train --recipe finetune --model "
    "convnext_nano.in12k_ft_in1k --pretrained --data DIR --out RUN"
)


@app.command(cls=TrainCommand)
def train(
    recipe: Annotated[str | None, Option(help="Recipe name, or a .yaml file of your own.")] = None,
    data: DataOption = None,
    out: Annotated[Path | None, Option(help="Run folder to make.")] = None,
    model: Annotated[str | None, Option(help="Another timm model under the same recipe.")] = None,
    weights: Annotated[
        str | None, Option(help="Start from a run, a saved model's folder, or hf-hub:OWNER/NAME.")
    ] = None,
    pretrained: Annotated[
        bool, Option("--pretrained", help="Start from the weights that timm publishes for the --model NAME.TAG.")
    ] = False,
    from_scratch: Annotated[
        bool, Option("--from-scratch", help="Start from random weights, also where the recipe asks for others.")
    ] = False,
    probe_only: Annotated[
        bool, Option("--probe-only", help="Fit the new classifier to the features of the weights, and stop there.")
    ] = False,
    set_: Annotated[
        list[str] | None, Option("--set", metavar="SECTION.KEY=VALUE", help="Change the recipe; repeatable.")
    ] = None,
    resume: Annotated[
        Literal["yes", "auto"] | None,
        Option(metavar="[auto]", help="Continue the run in --out; 'auto' starts it where there is none."),
    ] = None,
    force: Annotated[bool, Option("--force", help="With --resume: allow other settings or images.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the run in --out.")] = False,
    on_bad_image: Annotated[BadImages | None, Option(help="Same as --set data.on_bad_image=...")] = None,
    dry_run: Annotated[
        bool,
        Option(
            "--dry-run", help="Print what would be done, and write nothing; --out FILE.png draws the learning rate."
        ),
    ] = False,
    verbose: Annotated[bool, Option("--verbose", help="With --dry-run: the recipe and all numbers.")] = False,
) -> None:
    """Train a recipe on a folder of images: class folders, COCO's layout or images with masks, as it says.

    Settings may stand without --set where their name is clear: --epochs 20 --lr 1e-4 -b 32 --input-size 384.

    Exit status: 0 when done, 75 when stopped by SIGTERM, SIGUSR1 or SIGHUP with the state saved (run again with
    --resume), 130 after Ctrl-C likewise, 1 on an error.

    Example: conv2former train --recipe cifar --data cifar10 --out runs/cifar --set schedule.epochs=10
    """
    from conv2former.errors import UserError

    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if force and not resume:
        raise UserError("--force can only be used together with --resume")
    if (weights is not None) + pretrained + from_scratch > 1:
        raise UserError("--weights, --pretrained and --from-scratch exclude each other")
    if model and from_scratch:
        model = model.partition(".")[0]  # a tag names weights
    overrides = [f"model.weights={json.dumps(weights)}"] if weights is not None else []
    overrides += ["model.weights=timm"] * pretrained
    overrides += ["model.weights=null", "model.needs_weights=false"] * from_scratch
    overrides += ["model.fit_head=only"] * probe_only
    overrides += set_ or []
    overrides += [f"data.on_bad_image={on_bad_image}"] if on_bad_image else []
    given: Any = dict(out=out, resume=bool(resume), dry_run=dry_run)
    loaded = _recipe(recipe, _named(model) + overrides, **given)
    if weights is not None and recipe and not model and not any("model.name=" in one for one in set_ or []):
        model = _model_of(weights, loaded)
        loaded = _recipe(recipe, _named(model) + overrides, **given) if model else loaded
    if model and recipe:
        _say_left_out(recipe, loaded)
    if dry_run:
        from conv2former.engine.dry_run import dry_run as describe

        if loaded is None or resume or overwrite:
            raise UserError("--dry-run plans a recipe: name it with --recipe, leave --resume and --overwrite out")
        tell(*describe(loaded, data=data, out=out, verbose=verbose).split("\n"))
        return
    if out is None:
        raise UserError("no run folder given: name one with --out DIR")
    going_on: Any = "auto" if resume == "auto" else bool(resume)
    _train(loaded, out, data=data, resume=going_on, overwrite=overwrite, force=force)


def _recipe(name: str | None, overrides: list[str], *, out: Path | None, resume: bool, dry_run: bool) -> Any:
    """The recipe with its overrides; None where the run in ``out`` continues with its own."""
    from conv2former.errors import UserError
    from conv2former.recipes.load import load_recipe

    own = out / "recipe.yaml" if out and (out / "recipe.yaml").exists() else None
    if name is None and overrides and resume and own:
        name = str(own)
    if name is not None:
        return load_recipe(name, overrides=overrides)
    if not resume and own:
        raise UserError(f"{out} holds a run: continue it with --resume, or name a --recipe and add --overwrite")
    if not resume and not dry_run:
        raise UserError(f"no recipe is named: `conv2former recipes` lists them. {FIRST}")
    if overrides:
        raise UserError("--set and --model change a recipe: name it with --recipe")
    return None


def _named(model: str | None) -> list[str]:
    """Another model does not take the arguments that the recipe's own model needs; --set may give it some."""
    return [f"model.name={model}", "model.args={}"] if model else []


def _model_of(weights: str, base: Any) -> str | None:
    """The model that weights are of, where the recipe names another one."""
    from conv2former.checkpoints.weights import saved_weights
    from conv2former.errors import UserError, say_once

    try:
        name = saved_weights(weights).architecture.partition(".")[0]
    except UserError:  # said when they are loaded
        return None
    if name == base.model.name.partition(".")[0]:
        return None
    say_once(f"taken as --model {name}, of which the weights are")
    return name


def _say_left_out(recipe: str, loaded: Any) -> None:
    """What --model leaves out of a recipe, and --set does not give again."""
    import timm

    from conv2former.errors import UserError, say_once
    from conv2former.recipes.load import load_recipe

    if not timm.is_model(loaded.model.name.partition(".")[0]):
        return  # refused when it is built
    try:
        base = load_recipe(recipe)
    except UserError:  # a file that the command line completes
        return
    own = {key: value for key, value in base.model.args.items() if key not in loaded.model.args}
    settings = ", ".join(f"{key}: {value}" for key, value in own.items())
    if settings:
        say_once(f"--model leaves out the recipe's model.args ({settings})")


def _train(recipe: Any, out: Path, **options: Any) -> None:
    from conv2former.engine.report import best_weights
    from conv2former.engine.run_dir import RunDir
    from conv2former.engine.train import Interrupted
    from conv2former.engine.train import train as run_train

    try:
        evaluation = run_train(recipe, out=out, **options)
    except Interrupted as stop:
        say(str(stop))
        sys.exit(stop.code)
    if evaluation:
        pictures, run = sorted(path.name for path in out.glob("*.png")), shlex.quote(str(out))
        tell(result_line(evaluation, f"weights, metrics{' and plots' if pictures else ''}", out))
        if best := best_weights(RunDir(out)):
            say(best)
        if pictures:
            say(f"look at {', '.join(pictures)} in {run}")
        say(f"next: conv2former predict {run} IMAGES --out annotated", f"      conv2former demo {run}")
