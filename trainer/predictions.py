"""What a detector said, read for scoring and plotting: segments, announced starts, per-frame scores.

Three files are read:

- ActivityNet results: `{"results": {RECORDING: [{"segment": [s, e], "label": L, "score": p}]}}`;
- event lines (`.jsonl`), one JSON object a line, as Onset's runtime writes them: `action.started`,
  `action.ended`, `action.aborted`, `stream.started`, `stream.ended`. A stream's id is the recording's name;
- frame scores (`.npz`): for each recording an array [T, K] under the recording's name, beside `frame_rate`
  (frames a second, a scalar) and `classes` (K names). Frame t stands for the time (t + 0.5) / frame_rate.

All times are seconds from the recording's first sample. Events may have been delivered more than once (a
topic read from its beginning, a spool that was sent again): a repeated event counts once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.errors import DataError
from engine.recording import read_arrays

EVENT_VERSION = 1
MAX_PREDICTION_BYTES = 2 * 1024**3
# A line holds one flat event of a few hundred bytes; what is longer is another kind of file.
MAX_LINE_CHARS = 64 * 1024

Outcome = Literal["ended", "aborted", "open"]


@dataclass(frozen=True, slots=True)
class Detection:
    """A detected segment in seconds. From events: its id; `emitted`, the stream time of `action.ended`."""

    start: float
    end: float
    label: str
    score: float
    id: str | None = None
    emitted: float | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """An announced start in seconds, as it was first estimated.

    From events: the action's id, `emitted`, the stream time of `action.started`, what became of the action,
    and `until`, the stream time of the event that aborted it.
    """

    time: float
    label: str
    score: float
    id: str | None = None
    emitted: float | None = None
    outcome: Outcome = "ended"
    until: float | None = None


@dataclass(frozen=True, slots=True)
class Predictions:
    """Everything one file says. Every recording it names is a key of `segments` and of `starts`.

    `clock` is the stream time of the last event of each recording (events only), `repeated` the number of
    events that came again.
    """

    segments: Mapping[str, tuple[Detection, ...]]
    starts: Mapping[str, tuple[Start, ...]]
    from_events: bool = False
    bundles: tuple[str, ...] = ()
    clock: Mapping[str, float] = field(default_factory=dict)
    repeated: int = 0

    @property
    def recordings(self) -> tuple[str, ...]:
        """The names of the recordings that the file mentions, in order of appearance."""
        return tuple(self.segments)

    @property
    def bundle(self) -> str | None:
        """The one bundle that wrote all the events; None for results, or where there were several."""
        return self.bundles[0] if len(self.bundles) == 1 else None


@dataclass(frozen=True, slots=True)
class FrameScores:
    """Scores for each frame and class: `scores[recording]` is float32 [T, K]; `rate` in frames a second."""

    scores: Mapping[str, NDArray[np.float32]]
    rate: float
    classes: tuple[str, ...]


def read_predictions(path: Path) -> Predictions:
    """Read ActivityNet results (one JSON object) or event lines, whichever the file holds.

    Raises DataError naming the line or the recording at fault.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise DataError(f"{path}: found a folder, expected predictions (.json) or events (.jsonl)")
        if size > MAX_PREDICTION_BYTES:
            raise DataError(f"{path}: {size} bytes, expected predictions of at most {MAX_PREDICTION_BYTES}")
        if _holds_events(path):
            return _from_events(path)
        return _from_results(path)
    except OSError as problem:
        raise DataError(f"{path}: cannot be opened: {problem.strerror or problem}") from None
    except UnicodeDecodeError as problem:
        raise DataError(f"{path}: not readable as text in UTF-8: {problem}") from None


def retimed(predictions: Predictions, clocks: Mapping[str, Callable[[float], float]]) -> Predictions:
    """The same with every time of a recording (segments, starts, emissions) by its clock in `clocks`."""

    def at(name: str, time: float | None) -> float | None:
        return None if time is None else clocks[name](time)

    return replace(
        predictions,
        segments={
            name: tuple(
                replace(
                    item,
                    start=clocks[name](item.start),
                    end=clocks[name](item.end),
                    emitted=at(name, item.emitted),
                )
                for item in items
            )
            for name, items in predictions.segments.items()
        },
        starts={
            name: tuple(
                replace(
                    item,
                    time=clocks[name](item.time),
                    emitted=at(name, item.emitted),
                    until=at(name, item.until),
                )
                for item in items
            )
            for name, items in predictions.starts.items()
        },
        clock={name: clocks[name](time) for name, time in predictions.clock.items()},
    )


def of_segments(segments: Mapping[str, tuple[Detection, ...]]) -> Predictions:
    """Segments alone: each also announces its start, with its own score."""
    starts = {
        name: tuple(Start(time=item.start, label=item.label, score=item.score) for item in found)
        for name, found in segments.items()
    }
    return Predictions(segments=segments, starts=starts)


def detections(
    segments: NDArray[np.floating],
    scores: NDArray[np.floating],
    labels: NDArray[np.int64],
    classes: Sequence[str],
) -> tuple[Detection, ...]:
    """Arrays [N, 2] in seconds, [N] and [N] with the classes' names."""
    rows = zip(segments.tolist(), scores.tolist(), labels.tolist(), strict=True)
    return tuple(Detection(start, end, classes[label], score) for (start, end), score, label in rows)


def write_results(path: Path, predictions: Predictions) -> None:
    """Write segments as ActivityNet results, which `read_predictions` and the official evaluators read."""
    results = {
        name: [
            {"label": item.label, "score": item.score, "segment": [item.start, item.end]} for item in items
        ]
        for name, items in predictions.segments.items()
    }
    document = {"version": "ActivityNet 1.3", "results": results, "external_data": {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document) + "\n", encoding="utf-8")


def read_frame_scores(path: Path) -> FrameScores:
    """Read an `.npz` of frame scores (see the module's docstring). Raises DataError."""
    arrays = read_arrays(path)
    for key in ("frame_rate", "classes"):
        if key not in arrays:
            raise DataError(
                f"{path}: no array `{key}`; expected `frame_rate` (frames a second), `classes` (K names) "
                "and, for each recording, an array [T, K] under its name"
            )
    rate_array, class_array = arrays.pop("frame_rate"), arrays.pop("classes")
    if rate_array.size != 1 or rate_array.dtype.kind not in "fiu":
        raise DataError(f"{path}: `frame_rate` has shape {list(rate_array.shape)}, expected one number")
    rate = float(rate_array.reshape(-1)[0])
    if not math.isfinite(rate) or rate <= 0:
        raise DataError(f"{path}: `frame_rate` is {rate}, expected frames a second, more than 0")
    if class_array.ndim != 1 or class_array.dtype.kind != "U":
        raise DataError(
            f"{path}: `classes` is {class_array.dtype} {list(class_array.shape)}, expected K names"
        )
    classes = tuple(str(name) for name in class_array)
    scores: dict[str, NDArray[np.float32]] = {}
    for name, values in arrays.items():
        if values.ndim != 2 or values.shape[1] != len(classes) or values.dtype.kind not in "fiu":
            raise DataError(
                f"{path}: `{name}` is {values.dtype} {list(values.shape)}, "
                f"expected numbers [T, {len(classes)}]"
            )
        if not np.isfinite(values).all():
            raise DataError(f"{path}: `{name}` holds NaN or Inf, expected a finite score for every frame")
        scores[name] = values.astype(np.float32)
    return FrameScores(scores=scores, rate=rate, classes=classes)


def _holds_events(path: Path) -> bool:
    """Whether the first line is an event. The suffix decides nothing: people rename files."""
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                break
        else:
            return True  # a run that saw nothing wrote nothing
    try:
        first = json.loads(line) if len(line) <= MAX_LINE_CHARS else None
    except (ValueError, RecursionError):
        return path.suffix.lower() == ".jsonl"
    return isinstance(first, dict) and "type" in first and "results" not in first


def _from_results(path: Path) -> Predictions:
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{path}: readable neither as results (JSON) nor as event lines: {problem}") from None
    results = document.get("results") if isinstance(document, dict) else None
    if not isinstance(results, dict):
        annotated = isinstance(document, dict) and "database" in document
        hint = "; this looks like an annotation file" if annotated else ""
        raise DataError(
            f'{path}: expected an object with the key `results`, or event lines such as {{"type":'
            f'"action.started",...}}{hint}'
        )
    segments: dict[str, tuple[Detection, ...]] = {}
    for name, items in results.items():
        if not isinstance(items, list):
            raise DataError(f"{path}: recording `{name}`: expected a list of detections")
        segments[name] = tuple(
            _detection(item, f"{path}: recording `{name}`, detection {number}")
            for number, item in enumerate(items)
        )
    return of_segments(segments)


def _detection(item: Any, where: str) -> Detection:
    borders = item.get("segment") if isinstance(item, dict) else None
    if not isinstance(borders, list) or len(borders) != 2:
        raise DataError(f"{where}: expected an object with `segment` [start, end], `label` and `score`")
    start, end = (_finite(value, f"{where}: `segment`") for value in borders)
    if end < start:
        raise DataError(f"{where}: ends at {end:g} s, before its start at {start:g} s")
    return Detection(start, end, _name(item, "label", where), _finite(item.get("score"), f"{where}: `score`"))


def _from_events(path: Path) -> Predictions:
    started: dict[tuple[str, str], Start] = {}
    closed: dict[tuple[str, str], Detection | float] = {}
    said: dict[tuple[tuple[str, str], str], tuple[object, ...]] = {}
    bundles: dict[str, None] = {}
    clock: dict[str, float] = {}
    repeated = 0
    with path.open(encoding="utf-8-sig") as file:
        number = 0
        while line := file.readline(MAX_LINE_CHARS + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > MAX_LINE_CHARS:
                raise DataError(f"{where}: longer than {MAX_LINE_CHARS} characters; this is not an event")
            if not line.strip():
                continue
            event = _event(line, where)
            kind = _name(event, "type", where)
            stream = _name(event, "stream", where)
            time = _finite(event.get("time"), f"{where}: `time`")
            clock[stream] = max(time, clock.get(stream, time))
            if isinstance(event.get("bundle"), str):
                bundles[event["bundle"]] = None
            if kind.startswith("stream."):
                continue
            if kind not in ("action.started", "action.ended", "action.aborted"):
                raise DataError(f"{where}: found the event `{kind}`, expected action.* or stream.*")
            key = (stream, _name(event, "instance_id", where))
            content = tuple(event.get(name) for name in ("label", "start", "end", "score", "time"))
            if (key, kind) in said:
                if said[key, kind] != content:
                    raise DataError(
                        f"{where}: {kind} of action {key[1]} comes again and says something else; are these "
                        "the events of two runs? Give each run its own file"
                    )
                repeated += 1
                continue
            said[key, kind] = content
            if kind == "action.started":
                started[key] = Start(
                    time=_finite(event.get("start"), f"{where}: `start`"),
                    label=_name(event, "label", where),
                    score=_finite(event.get("score"), f"{where}: `score`"),
                    id=key[1],
                    emitted=time,
                    outcome="open",
                )
                continue
            if key not in started:
                raise DataError(
                    f"{where}: {kind} of action {key[1]}, which has not started; is the file cut?"
                )
            if key in closed:
                raise DataError(f"{where}: {kind} of action {key[1]}, which is over already")
            closed[key] = time if kind == "action.aborted" else _ended(event, key[1], time, where)

    segments: dict[str, list[Detection]] = {stream: [] for stream in clock}
    starts: dict[str, list[Start]] = {stream: [] for stream in clock}
    for key, start in started.items():
        end = closed.get(key)
        starts[key[0]].append(_with_outcome(start, end))
    for key, end in closed.items():
        if isinstance(end, Detection):
            segments[key[0]].append(end)
    return Predictions(
        segments={stream: tuple(found) for stream, found in segments.items()},
        starts={stream: tuple(found) for stream, found in starts.items()},
        from_events=True,
        bundles=tuple(bundles),
        clock=clock,
        repeated=repeated,
    )


def _with_outcome(start: Start, end: Detection | float | None) -> Start:
    if end is None:
        return start
    ended = isinstance(end, Detection)
    return Start(
        time=start.time,
        label=start.label,
        score=start.score,
        id=start.id,
        emitted=start.emitted,
        outcome="ended" if ended else "aborted",
        until=None if isinstance(end, Detection) else end,
    )


def _event(line: str, where: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{where}: not readable as JSON: {problem}; is the file cut?") from None
    if not isinstance(event, dict):
        raise DataError(f"{where}: expected an event, a JSON object")
    if event.get("version") != EVENT_VERSION:
        raise DataError(
            f"{where}: an event of version {event.get('version')!r}, expected {EVENT_VERSION}; "
            "score it with the Onset that wrote it"
        )
    return event


def _ended(event: dict[str, Any], instance: str, time: float, where: str) -> Detection:
    start = _finite(event.get("start"), f"{where}: `start`")
    end = _finite(event.get("end"), f"{where}: `end`")
    if not start <= end:
        raise DataError(f"{where}: ends at {end:g} s, before its start at {start:g} s")
    return Detection(
        start=start,
        end=end,
        label=_name(event, "label", where),
        score=_finite(event.get("score"), f"{where}: `score`"),
        id=instance,
        emitted=time,
    )


def _finite(value: object, where: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an integer beyond every float
            number = math.inf
        if math.isfinite(number):
            return number
    raise DataError(f"{where} is {value!r}, expected a finite number")


def _name(values: Mapping[str, Any], key: str, where: str) -> str:
    value = values.get(key)
    if isinstance(value, str) and value:
        return value
    raise DataError(f"{where}: `{key}` is {value!r}, expected a name")
