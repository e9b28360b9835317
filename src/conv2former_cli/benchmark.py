"""``conv2former benchmark``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from conv2former_cli.common import DeviceOption, JsonOption, app, print_table, tell, wrote

MODES = "eager, compile, cudagraphs, onnxruntime, openvino, openvino-int8, aotinductor"


@app.command()
def benchmark(
    models: Annotated[list[str] | None, Argument(help="Any timm models; they are compared with the first.")] = None,
    frontier: Annotated[
        bool, Option("--frontier", help="In place of MODELS: ours beside today's models for CPUs, with their accuracy.")
    ] = False,
    mode: Annotated[list[str] | None, Option(help=f"{MODES}; repeatable (default: first two).")] = None,
    train: Annotated[bool, Option("--train", help="Training steps instead of inference.")] = False,
    dtype: Annotated[list[str] | None, Option(help="float32, bfloat16; repeatable (default: float32).")] = None,
    batch_size: Annotated[list[int] | None, Option(min=1, help="Images of a step; repeatable (default: 8).")] = None,
    size: Annotated[
        list[int] | None, Option(min=1, help="Side of the image, pixels; repeatable (default: the first model's own).")
    ] = None,
    rounds: Annotated[int, Option(min=1, help="Timed steps of each configuration.")] = 10,
    threads: Annotated[int | None, Option(min=1, help="On the CPU (default: as many as PyTorch takes).")] = None,
    device: DeviceOption = "auto",
    ops: Annotated[str, Option(help="What computes our operations: auto, reference, cpp, triton.")] = "auto",
    fuse: Annotated[bool | None, Option("--fuse/--no-fuse", help="Re-parameterize for inference (by default).")] = None,
    profile: Annotated[bool, Option("--profile", help="Also show where a step's time goes, by operation.")] = False,
    out: Annotated[Path | None, Option(help="Folder for rows, table and plots.")] = None,
    json_: JsonOption = False,
) -> None:
    """Measure how fast models compute: images per second, memory, multiply-adds, side by side in turns.

    A configuration that fails is a row that says why; the exit status is 1 where none could be measured.

    Example: conv2former benchmark conv2former_t convnext_tiny --dtype bfloat16 --mode compile --mode openvino
    """
    from conv2former.errors import UserError
    from conv2former.tools.benchmark import frontier as front
    from conv2former.tools.benchmark import report
    from conv2former.tools.benchmark.measure import benchmark as run_benchmark
    from conv2former.tools.benchmark.options import BenchmarkOptions

    options = BenchmarkOptions(
        models=models or (),
        modes=mode or (),
        training=train,
        dtypes=dtype or (("float32", "bfloat16") if frontier else ("float32",)),
        batch_sizes=batch_size or ((8, 1) if frontier else (8,)),
        image_sizes=size or (),
        rounds=rounds,
        threads=threads,
        device=device,
        ops=ops,
        fuse=fuse,
        profile=profile,
        out=out,
    )
    if frontier == bool(models):
        raise UserError("give the names of models, or --frontier without names")
    rows = (front.frontier if frontier else run_benchmark)(options)
    files = (front.write if frontier else report.write)(rows, out) if out else []
    if json_:
        print(json.dumps([row.to_json() for row in rows], indent=2))
        return
    tell(report.conditions(rows))
    if frontier:
        head, *lines = front.table(rows)
        print_table(head, lines, right=range(3, len(head)))
        tell(front.steadiness(rows))
    else:
        print_table(report.columns(rows), [report.cells(row) for row in rows], right=report.RIGHT)
    if profile:
        tell("", *report.profiles(rows).split("\n"))
    if out:
        tell(wrote(files, out))
