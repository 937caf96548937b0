"""Runs of the trainer, judged by the runtime itself: scored, and their thresholds chosen.

Beside `onset` the only place that knows all three packages. Imports torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engine.errors import ConfigError
from engine.manifest import Decoding, Manifest
from stream.offline import Recorded, detect_recorded, record_streams
from trainer import calibration
from trainer.annotations import Annotations, Recording, read_annotations
from trainer.build import CONFIG, load_offline_run, load_run, read_settings
from trainer.config import Config, DataConfig
from trainer.data import Grid, choose, grid_of, present, read_samples
from trainer.detector import Detector
from trainer.export import export
from trainer.features import FeatureSet
from trainer.offline_evaluation import detect_all
from trainer.offline_signals import detect_recordings
from trainer.online_evaluation import frame_scores
from trainer.online_training import write_config
from trainer.predictions import FrameScores, Predictions, read_predictions, retimed, write_results
from trainer.recipe import TIOUS, Recipe
from trainer.scoring import Scores, parse_tious, score
from trainer.shuffle import shuffled_recording

ONLINE_TIOUS = "0.3:0.7:0.1"

FloatArray = NDArray[np.float32]
Progress = Callable[[str, float | None], None]  # what is being done, and how much of it is


def evaluate(
    run: Path,
    subset: str,
    tiou: str | None = None,
    min_score: float = 0.01,
    predictions: Path | None = None,
    shuffle: int | None = None,
    chunk: int | None = None,
) -> tuple[str, dict[str, Scores]]:
    """The run's name and its scores on a subset of its data, by what they are scores of.

    Raises ConfigError for what does not fit the kind of run, DataError for data that cannot be read.
    """
    if not (run / CONFIG).is_file():
        raise ConfigError(
            f"{run}: not a run, there is no {CONFIG}; `onset train` or `onset import` makes one"
        )
    settings = read_settings(run / CONFIG)
    if chunk is not None and (isinstance(settings, Recipe) or settings.model.context == "full"):
        raise ConfigError("`--chunk` cuts a stream, and this run reads recordings whole")
    if isinstance(settings, Recipe):
        if shuffle is not None:
            raise ConfigError("`--shuffle` cuts raw recordings, and this run reads features of videos")
        return settings.dataset_name, _features_offline(run, subset, tiou, predictions)
    if settings.model.context == "full":
        return settings.name, _signals_offline(run, settings, subset, tiou, predictions, shuffle)
    if predictions is not None:
        raise ConfigError("`--predictions` belongs to full context; `onset detect --output` saves events")
    return settings.name, _online(run, subset, tiou or ONLINE_TIOUS, min_score, shuffle, chunk)


def calibrate(
    run: Path,
    subset: str,
    precision: float | None,
    write: bool,
    warn: Callable[[str], None],
    progress: Progress,
) -> calibration.Calibration:
    """Choose a causal run's thresholds on recordings it was not trained on; `write`: into its configuration.

    Raises ConfigError where the run holds nothing out.
    """
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
    for name, count in calibration.in_use(annotations, data, chosen).items():
        if name == "train":
            reason = "trained the run: on others, these thresholds will give less than is shown here"
        else:
            reason = "are for testing: what `onset evaluate` says of them is no test any more"
        warn(f"{count} of the {len(chosen)} recordings of `{subset}` {reason}")
    progress("running the network once", None)
    items = [_Item(item, partial(read_samples, item, data)) for item in chosen]
    with _online_run(run, rate, data, items) as online:
        result = calibration.calibrate(
            online.detect,
            Annotations(annotations.classes, tuple(chosen)),
            subset,
            config.decoding,
            precision,
            online.manifest.chunk / online.manifest.frame.rate,
            lambda fraction: progress("trying settings", fraction),
        )
    if write:
        write_config(config.model_copy(update={"decoding": result.after.decoding}), run)
    return result


@dataclass(frozen=True)
class _Item:
    """A recording to be judged on: what is true of it, and its samples [T, C]."""

    truth: Recording
    read: Callable[[], FloatArray]


@dataclass(frozen=True)
class _Online:
    """What the step of a run said of recordings, from which events are decided as often as one likes."""

    recorded: Recorded
    events: Path
    clocks: Mapping[str, Callable[[float], float]]

    @property
    def manifest(self) -> Manifest:
        """Of the run's bundle."""
        return self.recorded.manifest

    def detect(self, decoding: Decoding) -> Predictions:
        """The events that the runtime emits with this decoding, in seconds of each recording."""
        detect_recorded(self.recorded, self.events, decoding)
        return retimed(read_predictions(self.events), self.clocks)


@contextmanager
def _online_run(
    run: Path, rate: float, data: DataConfig, items: Sequence[_Item], chunk: int | None = None
) -> Iterator[_Online]:
    # A stream counts its samples at the bundle's rate; the truth is in seconds of each recording.
    clocks = {item.truth.name: partial(_in_recording, rate, grid_of(item.truth, data)) for item in items}
    with tempfile.TemporaryDirectory() as folder:
        export(run, Path(folder) / "bundle", chunk=chunk)
        streams = [(item.truth.name, item.read) for item in items]
        recorded = record_streams(Path(folder) / "bundle", streams)
        yield _Online(recorded, Path(folder) / "events.jsonl", clocks)


def _in_recording(rate: float, grid: Grid | None, seconds: float) -> float:
    return seconds if grid is None or (grid.rate == rate and not grid.shift) else grid.seconds(seconds * rate)


def _online(
    run: Path, subset: str, tiou: str, min_score: float, shuffle: int | None, chunk: int | None
) -> dict[str, Scores]:
    config, detector, content = load_run(run)
    data, rate = config.data, float(content["data"]["sample_rate"])
    annotations = read_annotations(data.annotations)
    chosen = choose(annotations, data, subset)
    items = _items(chosen, data, shuffle)
    truth = _truth(annotations, chosen, items)
    names = sorted({recording.subset for recording in chosen})
    results: dict[str, Scores] = {}
    with _online_run(run, rate, data, items, chunk) as online:
        detector.chunk = online.manifest.chunk
        defaults = online.manifest.decoding
        everything = defaults.model_copy(update={"start_threshold": min_score, "end_threshold": min_score})
        frames = _frames(detector, items, data, rate, annotations.classes, config.model.lookahead)
        for title, decoding in (("everything committed", everything), ("default thresholds", defaults)):
            found = online.detect(decoding)
            for name in names:
                scores = score(found, truth, name, parse_tious(tiou), frames)
                results[title if len(names) == 1 else f"{title}, {name}"] = scores
    return results


def _frames(
    detector: Detector,
    items: Sequence[_Item],
    data: DataConfig,
    rate: float,
    classes: Sequence[str],
    lookahead: int,
) -> FrameScores | None:
    """Frame scores of raw signals; None where frames are not spread over each recording at one rate."""
    if any(grid_of(item.truth, data) != Grid(rate) for item in items):
        return None
    scores = {item.truth.name: frame_scores(detector, item.read(), lookahead) for item in items}
    return FrameScores(scores, rate / detector.hop, tuple(classes))


def _items(chosen: Sequence[Recording], data: DataConfig, shuffle: int | None) -> list[_Item]:
    there = present(list(chosen), data)
    if shuffle is None:
        return [_Item(item, partial(read_samples, item, data)) for item in there]
    items = []
    for item in there:
        grid = grid_of(item, data)
        if grid is None:
            raise ConfigError("`--shuffle` needs a sampling rate: set `data.sample_rate`")
        truth, samples = shuffled_recording(item, read_samples(item, data), grid, shuffle)
        items.append(_Item(truth, partial(_same, samples)))
    return items


def _same(samples: FloatArray) -> FloatArray:
    return samples


def _truth(annotations: Annotations, chosen: Sequence[Recording], items: Sequence[_Item]) -> Annotations:
    """What is true of the chosen recordings, also of those without a file, which count as missed."""
    known = {item.truth.name: item.truth for item in items}
    return Annotations(annotations.classes, tuple(known.get(item.name, item) for item in chosen))


def _signals_offline(
    run: Path, config: Config, subset: str, tiou: str | None, predictions: Path | None, shuffle: int | None
) -> dict[str, Scores]:
    detector = load_offline_run(run)[1]
    annotations = read_annotations(config.data.annotations)
    chosen = choose(annotations, config.data, subset)
    items = _items(chosen, config.data, shuffle)
    clips = []
    for item in items:
        grid = grid_of(item.truth, config.data)
        assert grid is not None  # the run was trained with it
        clips.append((item.truth.name, item.read(), grid))
    found = detect_recordings(detector, clips, annotations.classes)
    if predictions is not None:
        write_results(predictions, found)
    truth, tious = _truth(annotations, chosen, items), parse_tious(tiou or ONLINE_TIOUS)
    names = sorted({recording.subset for recording in chosen})
    return {f"full context, {name}": score(found, truth, name, tious) for name in names}


def _features_offline(
    run: Path, subset: str, tiou: str | None, predictions: Path | None
) -> dict[str, Scores]:
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
    return {f"full context, {name}": score(found, truth, name, tious) for name in split}
