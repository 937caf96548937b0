"""The command line: one command, `onset`, with the verbs that each package brings.

The only place that knows all three packages. Verbs that train or export import torch when they run, the
others
never do.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.logging import RichHandler

from engine.errors import ConfigError, OnsetError
from engine.manifest import Decoding
from stream import cli as stream_cli
from trainer import data_cli, score_cli
from trainer.annotations import Recording
from trainer.config import Config, DataConfig
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
    shuffle: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Cut the activities out and join them in random order, by this seed: what is left "
            "without the order in which they were recorded?",
        ),
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
        if shuffle is not None:
            raise ConfigError("`--shuffle` cuts raw recordings, and this run reads features of videos")
        results = _evaluate_offline(run, subset, tiou, predictions)
        name = settings.dataset_name
    elif settings.model.context == "full":
        results = _evaluate_offline_signals(run, settings, subset, tiou, predictions, shuffle)
        name = settings.name
    elif predictions is not None:
        raise ConfigError("`--predictions` belongs to full context; `onset detect --output` saves events")
    else:
        results = _evaluate_online(run, subset, tiou or "0.3:0.7:0.1", min_score, shuffle)
        name = settings.name
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

    from stream.offline import detect_recorded, record_streams
    from trainer import calibration
    from trainer.annotations import Annotations, read_annotations
    from trainer.build import CONFIG, load_run
    from trainer.data import choose, grid_of, present
    from trainer.export import export as write
    from trainer.online_training import write_config
    from trainer.predictions import Predictions, read_predictions, retimed

    if f1 and precision is not None:
        raise ConfigError("`--f1` and `--precision` are two goals; give one of them")
    config, _, content = load_run(run)
    data, rate = config.data, float(content["data"]["sample_rate"])
    if subset == "holdout" and not data.holdout:
        raise ConfigError(
            f"{run}: its configuration holds nothing out, and thresholds chosen on what it was trained on "
            "would be those of a better detector; name subjects or recordings in `data.holdout` and train "
            "again, or give a --subset that belongs neither to `data.train` nor to `data.test`"
        )
    annotations = read_annotations(data.annotations)
    chosen = present(choose(annotations, data, subset), data)
    console = Console(stderr=True)
    for name, count in calibration.in_use(annotations, data, chosen).items():
        if name == "train":
            reason = "trained the run: on others, these thresholds will give less than is shown here"
        else:
            reason = "are for testing: what `onset evaluate` says of them is no test any more"
        console.print("[bold red]warning[/]", end=" ")
        sentence = f"{count} of the {len(chosen)} recordings of `{subset}` {reason}"
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    streams = _streams(chosen, data)
    clocks = {item.name: partial(_in_recording, rate, grid_of(item, data)) for item in chosen}
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as bar:
        task = bar.add_task("running the network once", total=None)
        bundle, events = Path(folder) / "bundle", Path(folder) / "events.jsonl"
        manifest = write(run, bundle)
        recorded = record_streams(bundle, streams)

        def detect(decoding: Decoding) -> Predictions:
            detect_recorded(recorded, events, decoding)
            return retimed(read_predictions(events), clocks)

        bar.update(task, total=1.0, description="trying settings")
        result = calibration.calibrate(
            detect,
            Annotations(annotations.classes, tuple(chosen)),
            subset,
            config.decoding,
            precision,
            manifest.chunk / manifest.frame.rate,
            lambda fraction: bar.update(task, completed=fraction),
        )
        bar.update(task, completed=1.0)
    if not dry_run:
        write_config(config.model_copy(update={"decoding": result.after.decoding}), run)
    if json:
        typer.echo(result.model_dump_json(indent=2))
        return
    Console(width=None if sys.stdout.isatty() else 200).print(calibration.render(result))
    console.print(
        f"{run / CONFIG}: " + ("left as it was" if dry_run else f"written; next: onset evaluate {run}")
    )


Reader = Callable[[], NDArray[np.float32]]


def _streams(chosen: Sequence[Recording], data: DataConfig) -> list[tuple[str, Reader]]:
    """Recordings as streams: id, and what reads the samples."""
    from trainer.data import present, read_samples

    return [(item.name, partial(read_samples, item, data)) for item in present(list(chosen), data)]


def _evaluate_online(
    run: Path, subset: str, tiou: str, min_score: float, shuffle: int | None = None
) -> dict[str, Scores]:
    from stream.offline import detect_streams
    from trainer.annotations import Annotations, read_annotations
    from trainer.build import load_run
    from trainer.data import choose, grid_of, present
    from trainer.export import export as write
    from trainer.predictions import read_predictions, retimed
    from trainer.scoring import parse_tious
    from trainer.scoring import score as score_predictions

    config, _, content = load_run(run)
    data, rate = config.data, float(content["data"]["sample_rate"])
    annotations = read_annotations(data.annotations)
    chosen = choose(annotations, data, subset)
    if shuffle is None:
        streams = _streams(chosen, data)
    else:
        pairs = {item.name: _shuffled(item, data, shuffle) for item in present(chosen, data)}
        streams = [(name, partial(_same, samples)) for name, (_, samples) in pairs.items()]
        chosen = [pairs[item.name][0] if item.name in pairs else item for item in chosen]
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


def _same(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    return samples


def _shuffled(item: Recording, data: DataConfig, seed: int) -> tuple[Recording, NDArray[np.float32]]:
    from trainer.data import grid_of, read_samples
    from trainer.shuffle import shuffled_recording

    grid = grid_of(item, data)
    if grid is None:
        raise ConfigError("`--shuffle` needs a sampling rate: set `data.sample_rate`")
    return shuffled_recording(item, read_samples(item, data), grid, seed)


def _in_recording(rate: float, grid: Grid | None, seconds: float) -> float:
    return seconds if grid is None or (grid.rate == rate and not grid.shift) else grid.seconds(seconds * rate)


def _evaluate_offline_signals(
    run: Path, config: Config, subset: str, tiou: str | None, predictions: Path | None, shuffle: int | None
) -> dict[str, Scores]:
    from trainer.annotations import Annotations, read_annotations
    from trainer.build import load_offline_run
    from trainer.data import choose, grid_of, present, read_samples
    from trainer.offline_signals import detect_recordings
    from trainer.predictions import write_results
    from trainer.scoring import parse_tious
    from trainer.scoring import score as score_predictions

    detector = load_offline_run(run)[1]
    tious = parse_tious(tiou or "0.3:0.7:0.1")
    annotations = read_annotations(config.data.annotations)
    chosen = choose(annotations, config.data, subset)
    pairs = []
    for item in present(chosen, config.data):
        if shuffle is None:
            pairs.append((item, read_samples(item, config.data)))
        else:
            pairs.append(_shuffled(item, config.data, shuffle))
    clips = []
    for item, samples in pairs:
        grid = grid_of(item, config.data)
        assert grid is not None  # the run was trained with it
        clips.append((item.name, samples, grid))
    found = detect_recordings(detector, clips, annotations.classes)
    if predictions is not None:
        write_results(predictions, found)
    by_name = {item.name: item for item, _ in pairs}
    truth = Annotations(annotations.classes, tuple(by_name.get(item.name, item) for item in chosen))
    names = sorted({recording.subset for recording in chosen})
    return {f"full context, {name}": score_predictions(found, truth, name, tious) for name in names}


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
