"""The verbs of `onset data`: is my data fit to train on, and public data in Onset's form."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from engine.errors import ConfigError
from trainer.check import check_data, render
from trainer.hapt import NOTICE, convert_hapt

app = typer.Typer(
    name="data",
    help="Check recordings and labels before training; convert public data sets.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.command()
def check(
    annotations: Annotated[
        Path,
        typer.Argument(
            metavar="ANNOTATIONS",
            help="Labels: ActivityNet-style .json, or .csv with columns recording,start,end,label,subset.",
        ),
    ],
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="The recordings: NAME.npy, NAME.npz or NAME.csv, [T, C] each, here or in its folder data.",
        ),
    ],
    rate: Annotated[
        float | None,
        typer.Option(help="Samples (or feature frames) a second, where fps is absent or means the video."),
    ] = None,
) -> None:
    """Say everything that is wrong with recordings and labels, at once.

    Looks for missing or damaged files, NaN, channels and rates that differ, segments outside their recording,
    empty, repeated or overlapping segments, unknown labels, and classes that only one subset has.

    Exit status: 0 when fine (warnings allowed), 1 when there are errors, 2 when nothing could be checked.

    Example: `onset data check labels.csv recordings --rate 50`
    """
    if rate is not None and not 0 < rate < float("inf"):
        raise ConfigError(f"`--rate {rate:g}`: expected samples a second, more than 0")
    report = check_data(annotations, folder, rate)
    _console().print(render(report))
    raise typer.Exit(1 if report.errors else 0)


@app.command()
def hapt(
    raw: Annotated[
        Path,
        typer.Argument(
            metavar="RAWDATA",
            help="The folder RawData of the unpacked archive: acc_exp*_user*.txt, gyro_*.txt and labels.txt.",
        ),
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="A new folder for annotations.json and data/*.npy.")
    ],
) -> None:
    """Convert the UCI HAPT archive (phone on the waist, 50 Hz, 12 activities) for training.

    Get "Smartphone-Based Recognition of Human Activities and Postural Transitions" (dataset 341) from the UCI
    Machine Learning Repository, unpack it, and point here at its folder RawData. The subjects are split into
    train and test as in the archive.

    Example: `onset data hapt HAPT/RawData data/hapt`
    """
    done = convert_hapt(raw, output)
    console = _console()
    console.print(
        f"{done.recordings} recordings, {done.segments} segments, {done.hours:.2f} hours: {output}",
        highlight=False,
        markup=False,
    )
    console.print(NOTICE, style="yellow", highlight=False)


def _console() -> Console:
    # In a pipe there is no width to keep to, and a line that was broken is hard to search for.
    return Console(width=None if sys.stdout.isatty() else 200)
