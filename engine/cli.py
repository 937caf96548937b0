"""The verbs of this package: `onset compile` and `onset doctor`. The command line registers them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from engine.compiler import WORKSPACE_MIB, compile_bundle
from engine.doctor import diagnose
from engine.errors import ConfigError


def compile_(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle, as `onset export` writes it.")],
    precision: Annotated[
        str, typer.Option(help="fp32; fp16 or bf16: products in half precision, the rest in fp32.")
    ] = "fp32",
    streams: Annotated[
        str | None,
        typer.Option(help="Batches to build for, e.g. 1,8,64,512; default: 1, 2, 4, ... 64."),
    ] = None,
    workspace: Annotated[
        int, typer.Option(min=16, max=1024**2, help="MiB of scratch memory on the GPU.")
    ] = WORKSPACE_MIB,
    segments: Annotated[
        bool, typer.Option("--segments", help="End the plans in the NMS plugin, for programs of your own.")
    ] = False,
    plugin: Annotated[
        Path | None,
        typer.Option(help="With --segments: the library that `make plugin` builds. Its code is run."),
    ] = None,
) -> None:
    """Build the TensorRT plans of a bundle ahead, for the GPU of this machine.

    They are kept beside the bundle, in `plans/`, for a service with `engine: {kind: tensorrt}`. What is there
    already is not built again. A plan runs only on the TensorRT and the GPU that it was built on.

    Example: onset compile BUNDLE --precision fp16 --streams 1,8,64
    """
    if segments != (plugin is not None):
        raise ConfigError(
            "--segments and --plugin go together: `--segments --plugin PATH/libonset_nms.so`, the library "
            "that `make plugin` builds"
        )
    started = time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("looking", total=None)

        def report(doing: str, done: float | None) -> None:
            bar.update(task, description=doing, total=None if done is None else 1.0, completed=done)

        plans = compile_bundle(bundle, precision, _numbers(streams), workspace, report, plugin)
    console = Console(stderr=True)
    for plan in plans:
        console.print(f"{plan}: {plan.stat().st_size / 2**20:.1f} MiB", highlight=False, soft_wrap=True)
    console.print(f"{len(plans)} plans, {time.monotonic() - started:.0f} s", highlight=False)


def doctor(
    bundle: Annotated[
        Path | None, typer.Argument(help="A bundle: are there plans that this machine can run?")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="onnxruntime or tensorrt: the one that has to work. Default: any.")
    ] = None,
    plugin: Annotated[
        Path | None,
        typer.Option(help="The library that `make plugin` builds: can it be used? Its code is run."),
    ] = None,
) -> None:
    """Say what of this machine can run a bundle, what is missing, and what to install. Changes nothing.

    The exit status is 0 if --engine, or else any engine, can run a bundle here, and 1 if not.
    """
    if engine not in (None, "onnxruntime", "tensorrt"):
        raise ConfigError(f"--engine is {engine!r}, expected onnxruntime or tensorrt")
    diagnosis = diagnose(bundle, plugin)
    console = Console()
    marks = {True: "[green]ok[/]     ", False: "[bold red]broken[/] ", None: "[yellow]missing[/]"}
    for finding in diagnosis.findings:
        console.print(marks[finding.good], end=" ")
        console.print(f"{finding.what}: {finding.found}", markup=False, highlight=False, soft_wrap=True)
        if finding.advice:
            console.print(f"        -> {finding.advice}", markup=False, highlight=False, soft_wrap=True)
    can = " and ".join(diagnosis.engines) or "no engine"
    console.print(f"{can} can run a bundle here", highlight=False)
    if not diagnosis.engines or (engine is not None and engine not in diagnosis.engines):
        raise typer.Exit(1)


def _numbers(streams: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in streams.split(",")) if streams is not None else ()
    except ValueError:
        raise ConfigError(f"--streams is {streams!r}, expected numbers with commas: 1,8,64") from None
