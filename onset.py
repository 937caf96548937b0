"""The command line: one command, `onset`, with the verbs that each package brings.

The only place that knows all three packages. Verbs that train or export import torch when they run, the
others
never do.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from engine.errors import ConfigError, OnsetError
from stream import cli as stream_cli
from trainer import data_cli, score_cli
from trainer.data import Grid
from trainer.scoring import Scores

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
        path = train_online(settings, output, resume=resume, init=init)
        following = f"onset export {output} --output BUNDLE"
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
    json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Score a run on its data: mAP at each tIoU, recall, starts.

    A causal run is scored online: its step, run by the runtime over whole recordings, events as they were
    emitted; mAP and the starts at --min-score, F1 and the delays at the bundle's own thresholds. A run in
    full context (ActionFormer) detects in each recording as a whole.
    """
    _needs_torch("evaluate")
    import json as json_module

    from trainer.build import CONFIG, read_settings
    from trainer.recipe import Recipe
    from trainer.scoring import render

    if not (run / CONFIG).is_file():
        raise ConfigError(
            f"{run}: not a run, there is no {CONFIG}; `onset train` or `onset import` makes one"
        )
    settings = read_settings(run / CONFIG)
    name: str
    if isinstance(settings, Recipe):
        results = _evaluate_offline(run, subset, tiou, predictions)
        name = settings.dataset_name
    elif predictions is not None:
        raise ConfigError("`--predictions` belongs to full context; `onset detect --output` saves events")
    else:
        results = _evaluate_online(run, subset, tiou or "0.3:0.7:0.1", min_score)
        name = settings.name
    if json:
        typer.echo(
            json_module.dumps({k: json_module.loads(v.to_json()) for k, v in results.items()}, indent=2)
        )
        return
    console = Console()
    for title, scores in results.items():
        console.rule(f"{name}, {subset}: {title}")
        console.print(render(scores))


def _evaluate_online(run: Path, subset: str, tiou: str, min_score: float) -> dict[str, Scores]:
    from stream.offline import detect_streams
    from trainer.annotations import Annotations, read_annotations
    from trainer.build import load_run
    from trainer.data import choose, grid_of, present, read_samples
    from trainer.export import export as write
    from trainer.predictions import read_predictions, retimed
    from trainer.scoring import parse_tious
    from trainer.scoring import score as score_predictions

    config, _, content = load_run(run)
    data, rate = config.data, float(content["data"]["sample_rate"])
    annotations = read_annotations(data.annotations)
    chosen = choose(annotations, data, subset)
    streams = [(item.name, partial(read_samples, item, data)) for item in present(chosen, data)]
    # A stream counts its samples at the bundle's rate; the truth is in seconds of each recording.
    clocks = {item.name: partial(_in_recording, rate, grid_of(item, data)) for item in chosen}
    truth = Annotations(annotations.classes, tuple(chosen))
    names = {recording.subset for recording in chosen}
    results: dict[str, Scores] = {}
    with tempfile.TemporaryDirectory() as folder:
        write(run, Path(folder) / "bundle")
        for title, threshold in (("everything committed", min_score), ("default thresholds", None)):
            events = Path(folder) / f"{len(results)}.jsonl"
            detect_streams(Path(folder) / "bundle", streams, events, min_score=threshold)
            found = retimed(read_predictions(events), clocks)
            for name in sorted(names):
                scores = score_predictions(found, truth, name, parse_tious(tiou))
                results[title if len(names) == 1 else f"{title}, {name}"] = scores
    return results


def _in_recording(rate: float, grid: Grid | None, seconds: float) -> float:
    return seconds if grid is None or (grid.rate == rate and not grid.shift) else grid.seconds(seconds * rate)


def _evaluate_offline(
    run: Path, subset: str, tiou: str | None, predictions: Path | None
) -> dict[str, Scores]:
    import torch

    from trainer.annotations import read_annotations
    from trainer.build import load_offline_run
    from trainer.features import FeatureSet
    from trainer.offline_evaluation import detect_all
    from trainer.predictions import write_results
    from trainer.recipe import TIOUS
    from trainer.scoring import parse_tious
    from trainer.scoring import score as score_predictions

    recipe, detector, _ = load_offline_run(run)
    tious = parse_tious(tiou or TIOUS[recipe.dataset_name])
    if torch.cuda.is_available():
        detector.cuda()
    split = {"test": recipe.val_split, "train": recipe.train_split}.get(subset, (subset,))
    data = FeatureSet(recipe, split, training=False)
    found = detect_all(detector, data)
    if predictions is not None:
        write_results(predictions, found)
    assert recipe.dataset.json_file is not None  # the feature set has read it
    truth = read_annotations(recipe.dataset.json_file)
    return {f"full context, {name}": score_predictions(found, truth, name, tious) for name in split}


def main() -> None:
    """Entry point: errors that Onset raises on purpose become one sentence and status 2."""
    console = Console(stderr=True)
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    try:
        app()
    except (OnsetError, OSError) as problem:
        console.print(f"[bold red]error[/] {type(problem).__name__}:", end=" ")
        console.print(str(problem), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
