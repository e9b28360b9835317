"""``conv2former benchmark``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from conv2former_cli.common import DeviceOption, JsonOption, app, print_table


@app.command()
def benchmark(
    models: Annotated[list[str], typer.Argument(help="Any timm models; they are compared with the first.")],
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="eager, compile, cudagraphs, onnxruntime, openvino, openvino-int8, aotinductor; repeatable (default: "
            "first two)."
        ),
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
    from conv2former.tools.benchmark import report
    from conv2former.tools.benchmark.measure import benchmark as run_benchmark
    from conv2former.tools.benchmark.options import BenchmarkOptions

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
    print_table(report.columns(rows), [report.cells(row) for row in rows], right=report.RIGHT)
    if profile:
        print(f"\n{report.profiles(rows)}")
    if files:
        print(f"{', '.join(path.name for path in files)} are in {out}")
