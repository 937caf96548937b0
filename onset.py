"""The command line: one command, `onset`, with the verbs that each package brings.

With `onset_runs` the only place that knows all three packages. Verbs that train or export import torch when
they run, the others never do.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from engine import cli as engine_cli
from engine.errors import ConfigError, OnsetError
from engine.redaction import guard_tracebacks, learn_arguments, redacted
from stream import cli as stream_cli
from trainer import data_cli, score_cli

# The base of all that is typed wrongly; typer brings it along under changing names.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

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
app.command("keys")(stream_cli.keys)
app.command("compile")(engine_cli.compile_)
app.command("doctor")(engine_cli.doctor)
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
    config: Annotated[
        Path, typer.Argument(help="A training configuration, e.g. configs/hapt.yaml, or an official one.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the run.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --output.")] = False,
    init: Annotated[
        Path | None, typer.Option(help="A run, perhaps imported, whose weights to begin with.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="In place of the configuration's seed.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all.")] = None,
) -> None:
    """Train a detector. Under `torchrun -m onset train ...` on several processes."""
    _needs_torch("train")
    import torch

    from trainer.build import read_settings
    from trainer.offline_signals import train_offline_signals
    from trainer.offline_training import train_offline
    from trainer.online_training import train_online
    from trainer.recipe import Recipe

    if threads:
        torch.set_num_threads(threads)
    settings = read_settings(config)
    if isinstance(settings, Recipe):
        if seed is not None:
            settings = settings.model_copy(update={"init_rand_seed": seed})
        path = train_offline(settings, output, resume=resume, init=init)
        following = f"onset evaluate {output}"
    else:
        if seed is not None:
            settings = settings.model_copy(update={"seed": seed})
        whole = settings.model.context == "full"
        path = (train_offline_signals if whole else train_online)(settings, output, resume=resume, init=init)
        following = f"onset evaluate {output}" if whole else f"onset export {output} --output BUNDLE"
    Console(stderr=True).print(f"trained: {path}; next: {following}")


@app.command("import")
def import_(
    config: Annotated[Path, typer.Argument(help="An official ActionFormer configuration (.yaml).")],
    checkpoint: Annotated[Path, typer.Argument(help="Its checkpoint (.pth.tar).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the run.")],
    plain: Annotated[
        bool, typer.Option("--plain", help="The weights as they are, not their running average.")
    ] = False,
) -> None:
    """Make a run of an official ActionFormer checkpoint. Reads tensors and plain values, runs no code."""
    _needs_torch("import")
    from trainer.official import import_official

    import_official(config, checkpoint, output, ema=not plain)
    Console(stderr=True).print(f"imported: {output}; next: onset evaluate {output}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A folder that `onset train` made.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle's folder.")],
    chunk: Annotated[
        int | None,
        typer.Option(min=1, help="Frames a step, of those in `train.chunks`; default: `model.chunk`."),
    ] = None,
) -> None:
    """Export a run as a bundle: an ONNX step graph and a manifest, which run without torch."""
    _needs_torch("export")
    from trainer.export import export as write

    manifest = write(run, output, chunk=chunk)
    Console(stderr=True).print(
        f"{output}: {manifest.id}, {len(manifest.classes)} classes, "
        f"chunks of {manifest.chunk / manifest.frame.rate:g} s"
    )


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A folder that `onset train` or `onset import` made.")],
    subset: Annotated[
        str, typer.Option(help="`test`, `train`, `holdout`, or a subset of the data.")
    ] = "test",
    tiou: Annotated[
        str | None, typer.Option(help="Thresholds, first:last:step; default: the data set's own.")
    ] = None,
    min_score: Annotated[
        float, typer.Option("--min-score", help="Online: emission threshold for mAP, which ranks everything.")
    ] = 0.01,
    predictions: Annotated[
        Path | None, typer.Option(help="Full context: save the detections here, as ActivityNet JSON.")
    ] = None,
    shuffle: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Cut the activities out and join them in random order, by this seed: what is left "
            "without the order in which they were recorded?",
        ),
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Online: frames a step, as `onset export --chunk`.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Score a run on its data: mAP at each tIoU, recall, starts.

    A causal run is scored online: its step, run by the runtime over whole recordings, events as they were
    emitted; mAP and the starts at --min-score, F1 and the delays at the bundle's own thresholds. A run in
    full context (ActionFormer) detects in each recording as a whole.
    """
    _needs_torch("evaluate")
    import json as json_module

    import onset_runs
    from trainer.scoring import render

    name, results = onset_runs.evaluate(run, subset, tiou, min_score, predictions, shuffle, chunk)
    if json:
        typer.echo(
            json_module.dumps({k: json_module.loads(v.to_json()) for k, v in results.items()}, indent=2)
        )
        return
    # In a pipe there is no width to keep to.
    console = Console(width=None if sys.stdout.isatty() else 200)
    for title, scores in results.items():
        console.rule(f"{name}, {subset}: {title}")
        console.print(render(scores))


@app.command()
def calibrate(
    run: Annotated[Path, typer.Argument(help="A folder that `onset train` made, of a causal detector.")],
    precision: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="The highest recall at this precision, of segments and of starts."
        ),
    ] = None,
    f1: Annotated[bool, typer.Option("--f1", help="The highest F1 at tIoU 0.5: the default.")] = False,
    subset: Annotated[
        str, typer.Option(help="What to choose on: `holdout`, or a subset of the data.")
    ] = "holdout",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Choose the thresholds of a causal run on recordings that it was not trained on.

    These are `data.holdout` of its configuration. The network runs once over them, then about a hundred
    settings are tried on what it said. Of those as good as the best, give or take its standard error, the one
    in the middle of the earliest is written into the run's configuration, which `onset evaluate` and `onset
    export` read. (Resuming the training writes that anew.)

    Example: onset calibrate runs/my --precision 0.9
    """
    _needs_torch("calibrate")
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    import onset_runs
    from trainer.build import CONFIG
    from trainer.calibration import render

    if f1 and precision is not None:
        raise ConfigError("`--f1` and `--precision` are two goals; give one of them")
    console = Console(stderr=True)

    def warn(sentence: str) -> None:
        console.print("[bold red]warning[/]", end=" ")
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("reading", total=None)

        def report(doing: str, fraction: float | None) -> None:
            bar.update(task, description=doing, total=None if fraction is None else 1.0, completed=fraction)

        result = onset_runs.calibrate(run, subset, precision, not dry_run, warn, report)
    if json:
        typer.echo(result.model_dump_json(indent=2))
        return
    Console(width=None if sys.stdout.isatty() else 200).print(render(result))
    console.print(
        f"{run / CONFIG}: " + ("left as it was" if dry_run else f"written; next: onset evaluate {run}")
    )


class _Redacted(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def main() -> None:
    """Entry point: errors that Onset raises on purpose become one sentence and status 2.

    What is said on standard error goes through here, through the log, or through the hooks for what nobody
    caught: none of them shows a secret.
    """
    learn_arguments(sys.argv[1:])
    guard_tracebacks()
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_path=False)
    handler.setFormatter(_Redacted("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        status = app(standalone_mode=False)
    except (OnsetError, OSError) as problem:
        console.print(f"[bold red]error[/] {type(problem).__name__}:", end=" ")
        console.print(redacted(str(problem)), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except typer.Abort:
        sys.exit(1)
    except _UsageError as problem:  # what it says may quote what was typed
        problem.message = redacted(problem.message)  # type: ignore[attr-defined]
        problem.show()  # type: ignore[attr-defined]
        sys.exit(2)
    sys.exit(status)


if __name__ == "__main__":
    main()
