"""Predictions against annotations: everything that is measured about one subset, as one record.

Composes `trainer.metrics`; knows names, subsets and how a score is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from engine.errors import ConfigError, DataError
from engine.schema import Strict, nearest
from trainer import metrics
from trainer.annotations import Annotations, Recording, Segment, unique_segments
from trainer.metrics import Floats, Instances
from trainer.predictions import Detection, FrameScores, Predictions, Start

# THUMOS14's thresholds, the field's habit and this command's default.
DEFAULT_TIOUS = "0.3:0.7:0.1"
F1_TIOU = 0.5
# Shou et al. (ECCV 2018) report p-mAP at offsets of 1 to 10 seconds.
START_OFFSETS = tuple(float(second) for second in range(1, 11))
# An announced start belongs to an action that was going on between the announced start and the emission, give
# or take one second, the smallest offset of p-mAP; see `metrics.match_starts`.
START_TOLERANCE = 1.0
_MAX_TIOUS = 100


class Delay(Strict):
    """Emission minus truth, in seconds of the stream, over the `count` events that match a truth."""

    count: int
    mean: float
    p50: float
    p95: float


class Counts(Strict):
    """Everything detected against everything true, at one tIoU, over all classes."""

    tiou: float
    f1: float
    precision: float
    recall: float
    true_positives: int
    false_positives: int
    false_negatives: int


class ClassScore(Strict):
    """One class of the truth: how often it occurs, its AP at each tIoU, and its F1 at tIoU 0.5."""

    label: str
    instances: int
    ap: tuple[float, ...]
    average_ap: float
    f1: float
    frame_ap: float | None = None


class Scores(Strict):
    """What was measured. Every rate lies in [0, 1]; times are seconds.

    `mean_ap`, `recall_1x` and `recall_5x` go with `tious`; `start_mean_ap` goes with `start_offsets`.
    `frame_mean_ap` needs frame scores; the delays need events, and are None where no event matches.
    """

    subset: str
    recordings: int
    instances: int
    detections: int
    missing_recordings: int
    ignored_recordings: int
    unknown_labels: tuple[str, ...]
    bundles: tuple[str, ...]
    tious: tuple[float, ...]
    mean_ap: tuple[float, ...]
    average_mean_ap: float
    recall_1x: tuple[float, ...]
    recall_5x: tuple[float, ...]
    counts: Counts
    start_offsets: tuple[float, ...]
    start_mean_ap: tuple[float, ...]
    start_delay: Delay | None
    end_delay: Delay | None
    frame_mean_ap: float | None
    classes: tuple[ClassScore, ...]

    def to_json(self) -> str:
        """One JSON object, indented; floats as they are, so that it can be compared and stored."""
        return self.model_dump_json(indent=2)


def parse_tious(text: str) -> tuple[float, ...]:
    """`0.5`, `0.3,0.5` or `0.3:0.7:0.1` (first, last, step; the last belongs to it).

    Raises ConfigError when a threshold is not in (0, 1] or the form is another.
    """
    way_out = f"`--tiou {text}`: expected `0.5`, `0.3,0.5,0.7` or `0.3:0.7:0.1` with thresholds in (0, 1]"
    try:
        parts = [float(part) for part in text.split(":" if ":" in text else ",")]
    except ValueError:
        raise ConfigError(way_out) from None
    if not all(math.isfinite(part) for part in parts):
        raise ConfigError(way_out)
    if ":" in text:
        if len(parts) != 3 or parts[2] <= 0 or parts[1] < parts[0]:
            raise ConfigError(way_out)
        first, last, step = parts
        gaps = (last - first) / step
        if gaps > _MAX_TIOUS:
            raise ConfigError(f"`--tiou {text}`: more than {_MAX_TIOUS} thresholds; choose a larger step")
        if abs(gaps - round(gaps)) > 1e-6:
            raise ConfigError(f"`--tiou {text}`: {last:g} is not a whole number of steps of {step:g} away")
        # linspace, as in the reference configurations: 0.3 + 0.1 + 0.1 is not their last bit.
        parts = np.linspace(first, last, round(gaps) + 1).tolist()
    if len(parts) > _MAX_TIOUS or not all(0 < part <= 1 for part in parts):
        raise ConfigError(way_out)
    return tuple(parts)


def score(
    predictions: Predictions,
    annotations: Annotations,
    subset: str,
    tious: Sequence[float],
    frames: FrameScores | None = None,
) -> Scores:
    """Measure predictions on one subset.

    Recordings of the subset without predictions are misses; predictions for other recordings are left out and
    counted in `ignored_recordings`. True segments that repeat one another, or are shorter than a millisecond,
    count once or not at all (`annotations.unique_segments`), as in the reference evaluators.
    Raises DataError when the subset is unknown or empty of actions, or when no recording or no label fits.
    """
    if not tious:
        raise ConfigError("no tIoU threshold; expected at least one, such as 0.5")
    recordings = annotations.subset(subset)
    names = {recording.name: number for number, recording in enumerate(recordings)}
    true_segments = [
        (names[recording.name], segment)
        for recording in recordings
        for segment in unique_segments(recording.segments)
    ]
    if not true_segments:
        raise DataError(f"subset `{subset}`: no annotated action in its {len(recordings)} recordings")
    found = [(names[name], item) for name in names for item in predictions.segments.get(name, ())]
    starts = [(names[name], item) for name in names for item in predictions.starts.get(name, ())]
    _check_names(predictions, names, subset)
    unknown = _check_labels(annotations.classes, [*found, *starts])

    labels = {name: number for number, name in enumerate((*annotations.classes, *unknown))}
    truth = _segment_table(true_segments, labels)
    detections = _segment_table(found, labels)
    announced = _start_table(starts, labels)

    ap = metrics.average_precision(truth, detections, tious)
    recall = metrics.recall_at_kx(truth, detections, tious)
    start_ap = metrics.start_average_precision(truth, announced, START_OFFSETS)
    f1 = metrics.f1_at(truth, detections, F1_TIOU)
    frame_ap = None if frames is None else _frame_ap(recordings, annotations.classes, frames)
    start_delay, end_delay = _delays(truth, detections, found, announced, starts)
    instances = np.bincount(truth.label, minlength=len(labels))
    return Scores(
        subset=recordings[0].subset,
        recordings=len(recordings),
        instances=len(truth),
        detections=len(detections),
        missing_recordings=sum(name not in predictions.segments for name in names),
        ignored_recordings=sum(name not in names for name in predictions.recordings),
        unknown_labels=unknown,
        bundles=predictions.bundles,
        tious=tuple(tious),
        mean_ap=tuple(ap.mean.tolist()),
        average_mean_ap=float(ap.mean.mean()),
        recall_1x=tuple(recall[:, 0].tolist()),
        recall_5x=tuple(recall[:, 1].tolist()),
        counts=Counts(
            tiou=F1_TIOU,
            f1=f1.f1,
            precision=f1.precision,
            recall=f1.recall,
            true_positives=f1.true_positives,
            false_positives=f1.false_positives,
            false_negatives=f1.false_negatives,
        ),
        start_offsets=START_OFFSETS,
        start_mean_ap=tuple(start_ap.mean.tolist()),
        start_delay=start_delay,
        end_delay=end_delay,
        frame_mean_ap=None if frame_ap is None else float(np.nanmean(frame_ap)),
        classes=tuple(
            ClassScore(
                label=annotations.classes[number],
                instances=int(instances[number]),
                ap=tuple(ap.ap[:, column].tolist()),
                average_ap=float(ap.ap[:, column].mean()),
                f1=metrics.f1_at(_of_class(truth, number), _of_class(detections, number), F1_TIOU).f1,
                frame_ap=_or_none(frame_ap, number),
            )
            for column, number in enumerate(ap.classes.tolist())
        ),
    )


def render(scores: Scores) -> Group:
    """The scores as rich tables: one line a tIoU, one a class, then F1, starts, delays and what to know."""
    return Group(*_rendered(scores))


def _rendered(scores: Scores) -> Iterable[Table | Text]:
    yield Text(
        f"Subset {scores.subset}: {scores.recordings} recordings, {scores.instances} actions, "
        f"{scores.detections} detections (all values in %, delays in seconds)",
        style="bold",
    )
    overview = Table(box=box.SIMPLE_HEAD)
    overview.add_column("tIoU")
    for heading in ("mAP", "recall@1x", "recall@5x"):
        overview.add_column(heading, justify="right")
    rows = zip(scores.tious, scores.mean_ap, scores.recall_1x, scores.recall_5x, strict=True)
    for threshold, ap, once, five in rows:
        overview.add_row(f"{threshold:.2f}", _percent(ap), _percent(once), _percent(five))
    overview.add_section()
    overview.add_row(
        "average",
        _percent(scores.average_mean_ap),
        _percent(float(np.mean(scores.recall_1x))),
        _percent(float(np.mean(scores.recall_5x))),
        style="bold",
    )
    yield overview

    classes = Table(box=box.SIMPLE_HEAD)
    classes.add_column("class")
    classes.add_column("actions", justify="right")
    shown = _shown_tious(scores.tious)
    for index in shown:
        classes.add_column(f"AP@{scores.tious[index]:.2f}", justify="right")
    classes.add_column("average AP", justify="right")
    classes.add_column(f"F1@{F1_TIOU:.2f}", justify="right")
    if scores.frame_mean_ap is not None:
        classes.add_column("frame AP", justify="right")
    for item in scores.classes:
        cells = [
            item.label,
            str(item.instances),
            *(_percent(item.ap[index]) for index in shown),
            _percent(item.average_ap),
            _percent(item.f1),
        ]
        if scores.frame_mean_ap is not None:
            cells.append("-" if item.frame_ap is None else _percent(item.frame_ap))
        classes.add_row(*cells)
    yield classes

    counts = scores.counts
    rest = Table(box=box.SIMPLE_HEAD, show_header=False)
    rest.add_column()
    rest.add_column()
    rest.add_row(
        f"F1 at tIoU {counts.tiou:g}",
        f"{_percent(counts.f1)}  (precision {_percent(counts.precision)}, recall {_percent(counts.recall)}; "
        f"{counts.true_positives} right, {counts.false_positives} wrong, {counts.false_negatives} missed)",
    )
    offsets = dict(zip(scores.start_offsets, scores.start_mean_ap, strict=True))
    rest.add_row(
        "start p-mAP",
        ", ".join(
            f"{_percent(value)} at {offset:g} s" for offset, value in offsets.items() if offset in (1, 2, 5)
        ),
    )
    if scores.frame_mean_ap is not None:
        rest.add_row("frame mAP", _percent(scores.frame_mean_ap))
    for name, delay in (("start delay", scores.start_delay), ("end delay", scores.end_delay)):
        if delay is not None:
            rest.add_row(
                name,
                f"mean {delay.mean:+.2f} s, median {delay.p50:+.2f} s, 95 % within {delay.p95:+.2f} s "
                f"({delay.count} events)",
            )
    yield rest
    yield from (Text(note, style="yellow") for note in _notes(scores))


def _notes(scores: Scores) -> Iterable[str]:
    if scores.missing_recordings:
        yield (
            f"{scores.missing_recordings} of {scores.recordings} recordings have no predictions: "
            "their actions count as missed."
        )
    if scores.ignored_recordings:
        yield f"Recordings outside this subset whose predictions were left out: {scores.ignored_recordings}."
    if scores.unknown_labels:
        yield (
            f"Labels that the annotations do not know: {', '.join(scores.unknown_labels)}. "
            "They count as wrong in F1 and nowhere else."
        )
    if len(scores.bundles) > 1:
        yield f"The events come from {len(scores.bundles)} bundles: {', '.join(scores.bundles)}."


def _shown_tious(tious: Sequence[float]) -> list[int]:
    """At most five columns: all, or first and last with three evenly between them."""
    return sorted({round(place) for place in np.linspace(0, len(tious) - 1, min(5, len(tious)))})


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _check_names(predictions: Predictions, names: dict[str, int], subset: str) -> None:
    known = [name for name in predictions.recordings if name in names]
    if predictions.recordings and not known:
        some = predictions.recordings[0]
        raise DataError(
            f"no predicted recording is in the subset `{subset}`: found `{some}` and such, expected "
            f"`{next(iter(names))}` and such; choose another --subset, or name streams after recordings"
        )


def _check_labels(classes: Sequence[str], items: Sequence[tuple[int, Detection | Start]]) -> tuple[str, ...]:
    """The predicted labels that are no class, sorted; DataError when that is all of them."""
    labels = {item.label for _, item in items}
    unknown = tuple(sorted(labels - set(classes)))
    if unknown and len(unknown) == len(labels):
        raise DataError(
            "no predicted label is a class of the annotations: "
            f"found `{unknown[0]}`{nearest(unknown[0], classes)}"
        )
    return unknown


def _segment_table(
    items: Sequence[tuple[int, Segment]] | Sequence[tuple[int, Detection]], labels: dict[str, int]
) -> Instances:
    return Instances(
        recording=np.array([number for number, _ in items], dtype=np.int64),
        label=np.array([labels[item.label] for _, item in items], dtype=np.int64),
        start=np.array([item.start for _, item in items], dtype=np.float64),
        end=np.array([item.end for _, item in items], dtype=np.float64),
        score=np.array([getattr(item, "score", 1.0) for _, item in items], dtype=np.float64),
    )


def _of_class(table: Instances, label: int) -> Instances:
    rows = table.label == label
    return Instances(*(getattr(table, field.name)[rows] for field in fields(Instances)))


def _start_table(items: Sequence[tuple[int, Start]], labels: dict[str, int]) -> Instances:
    times = np.array([item.time for _, item in items], dtype=np.float64)
    return Instances(
        recording=np.array([number for number, _ in items], dtype=np.int64),
        label=np.array([labels[item.label] for _, item in items], dtype=np.int64),
        start=times,
        end=times,
        score=np.array([item.score for _, item in items], dtype=np.float64),
    )


def _delays(
    truth: Instances,
    detections: Instances,
    found: Sequence[tuple[int, Detection]],
    announced: Instances,
    starts: Sequence[tuple[int, Start]],
) -> tuple[Delay | None, Delay | None]:
    """(start delay, end delay); (None, None) where nothing was emitted, as in results."""
    if any(item.emitted is None for _, item in found) or any(item.emitted is None for _, item in starts):
        return None, None
    said = np.array([item.emitted for _, item in starts], dtype=np.float64)
    rows = metrics.match_starts(truth, announced, said, START_TOLERANCE)
    start_delay = _delay(said[rows >= 0] - truth.start[rows[rows >= 0]])
    ended = np.array([item.emitted for _, item in found], dtype=np.float64)
    rows = metrics.match_segments(truth, detections, F1_TIOU)
    return start_delay, _delay(ended[rows >= 0] - truth.end[rows[rows >= 0]])


def _delay(seconds: Floats) -> Delay | None:
    if not len(seconds):
        return None
    p50, p95 = np.percentile(seconds, [50, 95]).tolist()
    return Delay(count=len(seconds), mean=float(seconds.mean()), p50=p50, p95=p95)


def _frame_ap(recordings: Sequence[Recording], classes: Sequence[str], frames: FrameScores) -> Floats:
    """Frame AP for each class of the annotations [K], NaN where it never occurs.

    A frame is true for a class when its middle lies in one of its segments. Frames of the recording for which
    there is no score rank below all others, so that what was not looked at cannot be right.
    """
    for label in frames.classes:
        if label not in classes:
            raise DataError(f"frame scores: class `{label}` is not annotated{nearest(label, classes)}")
    for label in classes:
        if label not in frames.classes:
            raise DataError(f"frame scores: no column for class `{label}`, expected one for each class")
    columns = [frames.classes.index(label) for label in classes]
    number = {label: index for index, label in enumerate(classes)}
    truths: list[NDArray[np.bool_]] = []
    scores: list[NDArray[np.float32]] = []
    for recording in recordings:
        given = frames.scores.get(recording.name)
        values = np.zeros((0, len(classes)), dtype=np.float32) if given is None else given[:, columns]
        length = recording.duration
        if length is None:
            length = max((segment.end for segment in recording.segments), default=0.0)
        whole = math.floor(
            length * frames.rate + 1e-6
        )  # a last frame that the recording cuts off is not asked
        total = max(len(values), whole)
        values = np.concatenate(
            [values, np.full((total - len(values), len(classes)), -np.inf, dtype=np.float32)]
        )
        truth = np.zeros((total, len(classes)), dtype=np.bool_)
        for segment in unique_segments(recording.segments):
            first = max(0, math.ceil(segment.start * frames.rate - 0.5))
            last = max(0, math.ceil(segment.end * frames.rate - 0.5))
            truth[first:last, number[segment.label]] = True
        truths.append(truth)
        scores.append(values)
    result = metrics.frame_average_precision(np.concatenate(truths), np.concatenate(scores))
    if np.isnan(result).all():
        raise DataError(f"frame scores: at {frames.rate:g} frames a second no frame lies in any action")
    return result


def _or_none(values: Floats | None, index: int) -> float | None:
    return None if values is None or np.isnan(values[index]) else float(values[index])
