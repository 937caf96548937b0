"""Ground truth: which recordings there are, which subset each belongs to, and what happens in them when.

Two forms are read. JSON as ActivityNet introduced it and ActionFormer extended it:

    {"version": ..., "classes": [...], "database": {RECORDING: {
        "subset": "train", "duration": 411.96, "fps": 50.0, "num_frames": 20598, "subject": "u01",
        "annotations": [{"segment": [4.98, 24.64], "label": "STANDING", "label_id": 4}]}}}

where only `database`, `segment` and `label` are needed (a label's name decides; `label_id` orders and numbers
the classes where `classes` is absent), and CSV for labels made by hand (`recording`, `start`, `end`, `label`,
optionally `subset`; a row without start, end and label names a recording in which nothing happens).
All times are seconds from the recording's first sample.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import DataError
from engine.recording import SUFFIXES
from engine.schema import nearest

# The largest public file of this form (Ego4D's) has some 60 MB.
MAX_ANNOTATION_BYTES = 512 * 1024**2
DEFAULT_SUBSET = "train"
CSV_COLUMNS = ("recording", "start", "end", "label")
_SHOWN_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Segment:
    """One instance of an action, in seconds from the recording's first sample."""

    start: float
    end: float
    label: str


@dataclass(frozen=True, slots=True)
class Recording:
    """One recording and what happens in it. `duration` in seconds, `fps` in Hz; None where not stated."""

    name: str
    subset: str
    duration: float | None
    segments: tuple[Segment, ...]
    fps: float | None = None
    num_frames: int | None = None
    subject: str | None = None


@dataclass(frozen=True, slots=True)
class Annotations:
    """The classes in the order of their ids, and the recordings in the order of the file.

    `ids` has the number of each label: its position in the file's `classes`, else its `label_id` (these may
    leave gaps), else its position in `classes` here. Empty where annotations were not read from a file.
    """

    classes: tuple[str, ...]
    recordings: tuple[Recording, ...]
    channels: tuple[str, ...] = ()
    ids: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def subsets(self) -> tuple[str, ...]:
        """The names of the subsets, in order of appearance."""
        return tuple(dict.fromkeys(recording.subset for recording in self.recordings))

    def subset(self, name: str) -> tuple[Recording, ...]:
        """The recordings of one subset; its name is compared without regard to case.

        Raises DataError when no recording belongs to it.
        """
        chosen = tuple(item for item in self.recordings if item.subset.lower() == name.lower())
        if not chosen:
            raise DataError(f"no recording has the subset `{name}`{nearest(name, self.subsets)}")
        return chosen


def read_annotations(path: Path) -> Annotations:
    """Read a `.json` or `.csv` annotation file.

    Classes are the file's `classes`, else the labels in the order of their `label_id`, else sorted.
    Raises DataError with everything that is wrong.
    """
    annotations, problems = examine_annotations(path)
    if problems or annotations is None:
        shown = problems[:_SHOWN_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise DataError(f"{path}: " + "; ".join(shown))
    return annotations


def examine_annotations(path: Path) -> tuple[Annotations | None, list[str]]:
    """Read as much as can be read, and say what cannot: (annotations or None, problems).

    For a report on a file; whoever wants to work with it calls `read_annotations`.
    Raises DataError only when there is no such file or it is too large.
    """
    try:
        size = path.stat().st_size
    except OSError as problem:
        raise DataError(f"{path}: cannot be opened: {problem.strerror or problem}") from None
    if not path.is_file():
        raise DataError(f"{path}: found a folder, expected an annotation file (.json or .csv)")
    if size > MAX_ANNOTATION_BYTES:
        raise DataError(f"{path}: {size} bytes, expected annotations of at most {MAX_ANNOTATION_BYTES}")
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _from_json(path)
    if suffix == ".csv":
        return _from_csv(path)
    raise DataError(f"{path}: found the suffix `{path.suffix}`, expected .json or .csv")


def find_recording(folder: Path, name: str) -> Path:
    """The file of a recording: `name` with .npy, .npz or .csv in `folder`, then in `folder/data`.

    Raises DataError when there is none, or when the name leads out of the folder.
    """
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise DataError(f"recording `{name}`: found a path that leaves the folder, expected a plain name")
    for place in (folder, folder / "data"):
        for suffix in SUFFIXES:
            path = place / (name if name.lower().endswith(suffix) else name + suffix)
            if path.is_file():
                return path
    raise DataError(
        f"recording `{name}`: no file {name}{{{','.join(SUFFIXES)}}} in {folder} or {folder / 'data'}; "
        "is this the right folder?"
    )


def unique_segments(segments: Iterable[Segment], tolerance: float = 1e-3) -> tuple[Segment, ...]:
    """Drop what is shorter than `tolerance` seconds, and repetitions within it (same label, both borders).

    The rule of ActivityNet's evaluation as ActionFormer applies it, in training and in scoring alike: the
    first of the repeated stays, and a chain of near repetitions is judged against what stayed.
    """
    kept: list[Segment] = []
    by_label: dict[str, list[Segment]] = {}
    for segment in segments:
        if segment.end - segment.start < tolerance:
            continue
        same = by_label.setdefault(segment.label, [])
        if any(
            abs(segment.start - other.start) <= tolerance and abs(segment.end - other.end) <= tolerance
            for other in same
        ):
            continue
        same.append(segment)
        kept.append(segment)
    return tuple(kept)


class _Repeated(dict[str, Any]):
    """A JSON object that remembers which of its keys came more than once."""

    repeated: tuple[str, ...] = ()


def _object(pairs: list[tuple[str, Any]]) -> _Repeated:
    value = _Repeated(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        value.repeated = tuple(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return value


def _from_json(path: Path) -> tuple[Annotations | None, list[str]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_object)
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as problem:
        return None, [f"not readable as JSON: {problem}"]
    if not isinstance(document, dict):
        return None, [f"found {_kind(document)}, expected an object with the key `database`"]
    database = document.get("database")
    if not isinstance(database, _Repeated):
        hint = " (this looks like a predictions file)" if "results" in document else ""
        found = f"`database` is {_kind(database)}" if "database" in document else "no key `database`"
        return None, [f"found {found}, expected an object of recordings{hint}"]

    problems = [f"recording `{name}` appears more than once" for name in database.repeated]
    classes = _classes(document.get("classes"), problems)
    ids: dict[str, set[int]] = {}
    recordings = [_recording(name, entry, ids, problems) for name, entry in database.items()]
    channels = document.get("channels")
    if not isinstance(channels, list) or not all(isinstance(channel, str) for channel in channels):
        channels = []
    return _assemble(classes, ids, [item for item in recordings if item], channels, problems), problems


def _classes(value: object, problems: list[str]) -> tuple[str, ...] | None:
    """`classes` as a list of names, as {name: id} or as {id: name}; None where not given."""
    if value is None:
        return None
    names: list[Any] | None = None
    if isinstance(value, list):
        names = value
    elif isinstance(value, dict):
        if all(_is_int(number) for number in value.values()):
            names = sorted(value, key=lambda name: value[name])
        elif all(isinstance(name, str) for name in value.values()) and all(key.isdigit() for key in value):
            names = [value[key] for key in sorted(value, key=int)]
    if names is None or not all(isinstance(name, str) and name for name in names):
        problems.append("`classes`: expected a list of names, or an object of names and ids")
        return None
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        problems.append(f"`classes`: {', '.join(twice)} more than once")
    return tuple(dict.fromkeys(names))


def _recording(name: str, entry: object, ids: dict[str, set[int]], problems: list[str]) -> Recording | None:
    if not isinstance(entry, dict):
        problems.append(f"recording `{name}`: found {_kind(entry)}, expected an object")
        return None
    subset = entry.get("subset", DEFAULT_SUBSET)
    if not isinstance(subset, str) or not subset:
        problems.append(f"recording `{name}`: `subset` is {subset!r}, expected a name such as `train`")
        subset = DEFAULT_SUBSET
    fps = _positive(entry, "fps", name, problems)
    frames = _positive(entry, "num_frames", name, problems)
    duration = _positive(entry, "duration", name, problems)
    if duration is None and fps is not None and frames is not None:
        duration = frames / fps
    items = entry.get("annotations", [])
    if not isinstance(items, list):
        problems.append(f"recording `{name}`: `annotations` is {_kind(items)}, expected a list")
        items = []
    segments: list[Segment] = []
    for number, item in enumerate(items):
        where = f"recording `{name}`, annotation {number}"
        segment = _segment(item, where, problems)
        if segment is None:
            continue
        segments.append(segment)
        if _is_int(item.get("label_id")):
            ids.setdefault(segment.label, set()).add(item["label_id"])
    subject = entry.get("subject")
    return Recording(
        name=name,
        subset=subset,
        duration=duration,
        segments=tuple(segments),
        fps=fps,
        num_frames=None if frames is None else int(frames),
        subject=None if subject is None else str(subject),
    )


def _segment(item: object, where: str, problems: list[str]) -> Segment | None:
    if not isinstance(item, dict):
        problems.append(f"{where}: found {_kind(item)}, expected an object with `segment` and `label`")
        return None
    borders, label = item.get("segment"), item.get("label")
    if not isinstance(borders, list) or len(borders) != 2 or not all(_is_finite(x) for x in borders):
        problems.append(f"{where}: `segment` is {borders!r}, expected [start, end] in seconds")
        return None
    if not isinstance(label, str) or not label:
        problems.append(f"{where}: `label` is {label!r}, expected the name of a class")
        return None
    start, end = float(borders[0]), float(borders[1])
    if end < start:
        problems.append(f"{where}: ends at {end:g} s, before its start at {start:g} s")
        return None
    return Segment(start, end, label)


def _assemble(
    classes: tuple[str, ...] | None,
    ids: dict[str, set[int]],
    recordings: Sequence[Recording],
    channels: Sequence[str],
    problems: list[str],
) -> Annotations:
    if not recordings:
        problems.append("no recording; expected at least one")
    labels = {segment.label for recording in recordings for segment in recording.segments}
    if classes is None:
        numbers = _ids_from_labels(labels, ids, problems)
        classes = tuple(numbers)
    else:
        numbers = {label: number for number, label in enumerate(classes)}
        problems.extend(
            f"label `{label}` is not in `classes`{nearest(label, classes)}"
            for label in sorted(labels - set(classes))
        )
    return Annotations(classes=classes, recordings=tuple(recordings), channels=tuple(channels), ids=numbers)


def _ids_from_labels(labels: set[str], ids: dict[str, set[int]], problems: list[str]) -> dict[str, int]:
    """The number of each label, in ascending order: its id where every label has one, else its position."""
    by_name = {label: number for number, label in enumerate(sorted(labels))}
    if not labels or set(ids) != labels:
        return by_name
    way_out = "; make them agree, or list the names under `classes`"
    ambiguous = False
    owners: dict[int, list[str]] = {}
    for label in sorted(labels):
        if len(ids[label]) > 1:
            ambiguous = True
            problems.append(f"label `{label}` has several ids: {sorted(ids[label])}{way_out}")
        for number in ids[label]:
            owners.setdefault(number, []).append(label)
    for number, names in sorted(owners.items()):
        if len(names) > 1:
            ambiguous = True
            problems.append(f"label_id {number} stands for several labels: {', '.join(names)}{way_out}")
    if ambiguous:
        return by_name
    return {label: number for number, (label,) in sorted(owners.items())}


def _from_csv(path: Path) -> tuple[Annotations | None, list[str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        return None, [f"not readable as text in UTF-8: {problem}"]
    lines = text.splitlines()
    header = lines[0] if lines else ""
    delimiter = next((mark for mark in ("\t", ";") if mark in header), ",")
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        rows = list(reader)
    except csv.Error as problem:
        return None, [f"line {reader.line_num}: not readable as CSV: {problem}"]
    columns = [name.strip().lower() for name in reader.fieldnames or []]
    missing = [name for name in CSV_COLUMNS if name not in columns]
    if missing:
        return None, [
            f"found the header `{header}`, expected `{','.join(CSV_COLUMNS)}` and optionally `subset` "
            f"(missing: {', '.join(missing)})"
        ]
    problems: list[str] = []
    subsets: dict[str, str] = {}
    segments: dict[str, list[Segment]] = {}
    for number, raw in enumerate(rows, start=2):
        row = {
            key.strip().lower(): value.strip() for key, value in raw.items() if key and isinstance(value, str)
        }
        if not any(row.values()):
            continue
        name = row.get("recording", "")
        if not name:
            problems.append(f"line {number}: no `recording`")
            continue
        subset = row.get("subset", "")
        if name not in segments:
            segments[name] = []
        if subset and subsets.setdefault(name, subset) != subset:
            problems.append(f"line {number}: `{name}` is in `{subsets[name]}` and in `{subset}`; choose one")
        if not (row.get("start") or row.get("end") or row.get("label")):
            continue
        segment = _segment(
            {"segment": [_number(row.get("start")), _number(row.get("end"))], "label": row.get("label")},
            f"line {number}",
            problems,
        )
        if segment is not None:
            segments[name].append(segment)
    recordings = [
        Recording(name=name, subset=subsets.get(name, DEFAULT_SUBSET), duration=None, segments=tuple(found))
        for name, found in segments.items()
    ]
    return _assemble(None, {}, recordings, (), problems), problems


def _positive(entry: dict[str, Any], key: str, name: str, problems: list[str]) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    if not _is_finite(value) or value <= 0:
        problems.append(f"recording `{name}`: `{key}` is {value!r}, expected a positive number")
        return None
    return float(value)


def _number(text: str | None) -> object:
    try:
        return float(text or "")
    except ValueError:
        return text


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "nothing", bool: "a truth value"}
    return names.get(type(value), "an object" if isinstance(value, dict) else f"the number {value!r}")
