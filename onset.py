"""The command line: one command, `onset`, with the verbs that each package brings.

The only place that knows all three packages. Verbs that train or export import torch when they run, the
others
never do.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from engine.errors import ConfigError, OnsetError
from stream import cli as stream_cli
from trainer import data_cli, score_cli

app = typer.Typer(
    name="onset",
    help="Streaming online action detection: live samples in, action start and end events out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_cli.app, name="data")
app.command("detect")(stream_cli.detect)
app.command("run")(stream_cli.run)
app.command("send")(stream_cli.send)
app.command("score")(score_cli.score)
app.command("plot")(score_cli.plot)


def _needs_torch(verb: str) -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"`onset {verb}` needs torch: run `make setup`, or `pip install '.[train]'`"
        ) from None


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The training configuration, e.g. configs/hapt.yaml.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the run.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --output.")] = False,
    seed: Annotated[int | None, typer.Option(help="In place of the configuration's seed.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all.")] = None,
) -> None:
    """Train a detector. Under `torchrun -m onset train ...` on several processes."""
    _needs_torch("train")
    from trainer.config import read_config
    from trainer.train import train as run_training

    settings = read_config(config)
    if seed is not None:
        settings = settings.model_copy(update={"seed": seed})
    path = run_training(settings, output, resume=resume, threads=threads)
    Console(stderr=True).print(f"trained: {path}; next: onset export {output} --output BUNDLE")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A folder that `onset train` made.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle's folder.")],
) -> None:
    """Export a run as a bundle: an ONNX step graph and a manifest, which run without torch."""
    _needs_torch("export")
    from trainer.export import export as write

    manifest = write(run, output)
    Console(stderr=True).print(
        f"{output}: {manifest.id}, {len(manifest.classes)} classes, "
        f"chunks of {manifest.chunk / manifest.frame.rate:g} s"
    )


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A folder that `onset train` made.")],
    subset: Annotated[
        str, typer.Option(help="`test`, `train`, `holdout`, or a subset of the data.")
    ] = "test",
    tiou: Annotated[str, typer.Option(help="Thresholds, first:last:step.")] = "0.3:0.7:0.1",
    min_score: Annotated[
        float, typer.Option("--min-score", help="Emission threshold for mAP, which ranks everything.")
    ] = 0.01,
    json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Score a run online: its step, run by the runtime over whole recordings, events as they were emitted.

    mAP and the starts are taken at --min-score; F1 and the delays at the bundle's own thresholds.
    """
    _needs_torch("evaluate")
    import json as json_module

    from stream.offline import detect_recordings
    from trainer.annotations import Annotations, find_recording, read_annotations
    from trainer.build import load_run
    from trainer.data import choose
    from trainer.export import export as write
    from trainer.predictions import read_predictions
    from trainer.scoring import Scores, parse_tious, render
    from trainer.scoring import score as score_predictions

    config = load_run(run)[0]
    annotations = read_annotations(config.data.annotations)
    chosen = choose(annotations, config.data, subset)
    paths = [find_recording(config.data.recordings, recording.name) for recording in chosen]
    truth = Annotations(annotations.classes, tuple(chosen))
    names = {recording.subset for recording in chosen}
    results: dict[str, Scores] = {}
    with tempfile.TemporaryDirectory() as folder:
        write(run, Path(folder) / "bundle")
        for title, threshold in (("everything committed", min_score), ("default thresholds", None)):
            events = Path(folder) / f"{len(results)}.jsonl"
            detect_recordings(Path(folder) / "bundle", paths, events, min_score=threshold)
            for name in sorted(names):
                scores = score_predictions(read_predictions(events), truth, name, parse_tious(tiou))
                results[title if len(names) == 1 else f"{title}, {name}"] = scores
    if json:
        typer.echo(
            json_module.dumps({k: json_module.loads(v.to_json()) for k, v in results.items()}, indent=2)
        )
        return
    console = Console()
    for title, scores in results.items():
        console.rule(f"{config.name}, {subset}: {title}")
        console.print(render(scores))


def main() -> None:
    """Entry point: errors that Onset raises on purpose become one sentence and status 2."""
    console = Console(stderr=True)
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    try:
        app()
    except OnsetError as problem:
        console.print(f"[bold red]error[/] {type(problem).__name__}:", end=" ")
        console.print(str(problem), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
