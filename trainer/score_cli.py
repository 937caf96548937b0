"""`onset score` and `onset plot`: how good were the predictions, in numbers and in a picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from engine.errors import ConfigError
from trainer import plotting, scoring
from trainer.annotations import read_annotations
from trainer.predictions import read_frame_scores, read_predictions


def score(
    predictions: Annotated[
        Path,
        typer.Argument(
            metavar="PREDICTIONS",
            help='Event lines of `onset` (.jsonl), or ActivityNet results (.json with the key "results").',
        ),
    ],
    ground_truth: Annotated[
        Path,
        typer.Argument(metavar="GROUND_TRUTH", help="Annotations: .json as for ActivityNet, or .csv labels."),
    ],
    subset: Annotated[
        str, typer.Option(help="Which recordings to score: a subset of the annotations.")
    ] = "test",
    tiou: Annotated[
        str, typer.Option(help="tIoU thresholds: one, a list (0.3,0.5), or first:last:step, last included.")
    ] = scoring.DEFAULT_TIOUS,
    frames: Annotated[
        Path | None,
        typer.Option(
            help="Frame scores for the per-frame mAP: .npz of one [T, K] a recording, frame_rate, classes."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Score predictions: mAP and recall over tIoU, F1, action starts, and how late events came.

    mAP is computed as by the official evaluators of ActivityNet and ActionFormer. Delays need events: they
    say how many seconds of the stream passed between the true start (or end) and the event that told of it.
    Streams are matched to recordings by name.

    Example: `onset score events.jsonl annotations.json --subset test --tiou 0.5:0.95:0.05`
    """
    tious = scoring.parse_tious(tiou)
    truth = read_annotations(ground_truth)
    said = read_predictions(predictions)
    frame_scores = None if frames is None else read_frame_scores(frames)
    scores = scoring.score(said, truth, subset, tious, frame_scores)
    if as_json:
        typer.echo(scores.to_json())
    else:
        # In a pipe there is no width to keep to, and a table that was squeezed is hard to read.
        Console(width=None if sys.stdout.isatty() else 200).print(scoring.render(scores))


def plot(
    events: Annotated[
        Path,
        typer.Argument(
            metavar="EVENTS", help="Event lines of `onset` (.jsonl), or ActivityNet results (.json)."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The picture to write: .png, .svg or .pdf.")
    ] = Path("timeline.png"),
    truth: Annotated[
        Path | None, typer.Option(help="Annotations, drawn above what was detected: .json or .csv.")
    ] = None,
    streams: Annotated[
        str,
        typer.Option(help="Which streams, separated by commas; else the first of the file, annotated first."),
    ] = "",
    limit: Annotated[
        int, typer.Option(help=f"How many streams where none are named, at most {plotting.MAX_STREAMS}.")
    ] = plotting.DEFAULT_STREAMS,
    window: Annotated[
        str, typer.Option(metavar="FROM:TO", help="Draw only this part of each stream, in seconds: 60:180.")
    ] = "",
) -> None:
    """Draw a timeline of what was detected: a colour for each class, a mark where each start was announced.

    Actions that were aborted, or had not ended when the events stop, are hatched. Needs matplotlib, which
    the extra `plot` brings.

    Example: `onset plot events.jsonl --truth annotations.json --output timeline.png`
    """
    annotations = None if truth is None else read_annotations(truth)
    names = [name.strip() for name in streams.split(",") if name.strip()]
    result = plotting.plot(events, output, annotations, names, limit, _window(window))
    more = f"; {result.left_out} more in the file: choose with --streams" if result.left_out else ""
    shown = len(result.streams)
    typer.echo(f"{output}: {shown} stream{'s' if shown > 1 else ''}{more}")


def _window(text: str) -> tuple[float, float] | None:
    if not text:
        return None
    try:
        first, last = (float(part) for part in text.split(":"))
    except ValueError:
        raise ConfigError(f"`--window {text}`: expected two numbers of seconds, such as 60:180") from None
    return first, last
