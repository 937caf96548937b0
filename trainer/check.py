"""Is this data fit to train on? Everything that is wrong with recordings and labels, said at once.

An error is what training or scoring would trip over or be misled by; a warning is what should be known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from engine.errors import DataError
from engine.recording import SUFFIXES, read_recording
from trainer.annotations import Annotations, Recording, Segment, examine_annotations, find_recording

# Labels are set by hand, to a frame or so: what reaches further beyond the end is a mistake of another kind.
_SLACK_FRAMES = 1.5
# A stated rate, or a stated duration, may be rounded; two per cent and a second are not rounding.
_RATE_TOLERANCE, _DURATION_TOLERANCE = 0.02, 1.0
_SAME = 1e-3  # seconds within which two segments are the same one, as in `annotations.unique_segments`
_SHOWN = 100


@dataclass(frozen=True, slots=True)
class ClassSummary:
    """One class: instances in each subset, and its durations in seconds (None where it never occurs)."""

    label: str
    counts: dict[str, int]
    median: float | None
    shortest: float | None
    longest: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """What there is, and what is wrong with it. `channels` and `rates` hold each value that was found."""

    subsets: dict[str, int]
    hours: float
    channels: tuple[int, ...]
    rates: tuple[float, ...]
    classes: tuple[ClassSummary, ...]
    errors: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(slots=True)
class _Findings:
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_data(annotations_path: Path, folder: Path, rate: float | None = None) -> Report:
    """Check annotations against the recordings in `folder` (or `folder/data`).

    `rate`: samples (or feature frames) a second, where the annotations' `fps` is absent or means the video.
    Raises DataError only when there is no annotation file or no folder; the rest is in the report.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected the folder of the recordings")
    annotations, problems = examine_annotations(annotations_path)
    findings = _Findings(errors=list(problems))
    if annotations is None:
        return Report({}, 0.0, (), (), (), tuple(findings.errors), ())
    shapes: dict[str, tuple[int, int]] = {}
    rates: dict[str, float] = {}
    used: set[Path] = set()
    for recording in annotations.recordings:
        try:
            path = find_recording(folder, recording.name)
            used.add(path.resolve())
            samples = read_recording(path)
        except DataError as problem:
            findings.errors.append(str(problem))
            samples = None
        length = recording.duration
        if samples is not None:
            shapes[recording.name] = (samples.shape[0], samples.shape[1])
            _check_values(recording.name, samples, findings)
            known = rate or recording.fps
            if known is None and recording.duration is not None:
                known = len(samples) / recording.duration
            if known is not None:
                rates[recording.name] = known
                length = len(samples) / known
                _check_length(recording, len(samples), known, findings)
        _check_segments(recording, length, rates.get(recording.name), findings)
    _check_channels(annotations, shapes, findings)
    _check_rates(annotations, shapes, rates, findings)
    _check_labels(annotations, findings)
    _check_strays(folder, used | {annotations_path.resolve()}, findings)
    seconds = [
        shapes[item.name][0] / rates[item.name] if item.name in rates else (item.duration or 0.0)
        for item in annotations.recordings
    ]
    return Report(
        subsets=dict(Counter(item.subset for item in annotations.recordings)),
        hours=sum(seconds) / 3600,
        channels=tuple(sorted({channels for _, channels in shapes.values()})),
        rates=tuple(sorted({round(value, 3) for value in rates.values()})),
        classes=tuple(_summary(label, annotations) for label in annotations.classes),
        errors=tuple(findings.errors),
        warnings=tuple(findings.warnings),
    )


def render(report: Report) -> Group:
    """The report as rich tables, then the problems: errors first."""
    return Group(*_rendered(report))


def _rendered(report: Report) -> Iterable[Table | Text]:
    if report.subsets:
        overview = Table(box=box.SIMPLE_HEAD, show_header=False)
        overview.add_column(style="dim")
        overview.add_column()
        total = sum(report.subsets.values())
        parts = ", ".join(f"{count} {name}" for name, count in report.subsets.items())
        overview.add_row("recordings", f"{total} ({parts})")
        overview.add_row("hours", f"{report.hours:.2f}")
        overview.add_row("channels", ", ".join(map(str, report.channels)) or "unknown")
        overview.add_row("rate", ", ".join(f"{rate:g} Hz" for rate in report.rates[:8]) or "unknown")
        overview.add_row("actions", str(sum(sum(item.counts.values()) for item in report.classes)))
        yield overview
    if report.classes:
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("class")
        for name in report.subsets:
            table.add_column(name, justify="right")
        for heading in ("median", "shortest", "longest"):
            table.add_column(heading, justify="right")
        for item in report.classes:
            counts = [str(item.counts.get(name, 0)) for name in report.subsets]
            lengths = ["-" if s is None else f"{s:.2f} s" for s in (item.median, item.shortest, item.longest)]
            table.add_row(item.label, *counts, *lengths)
        yield table
    yield from _listed("error", report.errors, "bold red")
    yield from _listed("warning", report.warnings, "yellow")
    if report.errors:
        yield Text(f"Errors: {len(report.errors)}. Warnings: {len(report.warnings)}.", style="bold red")
    elif report.warnings:
        yield Text(f"No errors. Warnings: {len(report.warnings)}. Ready to train.", style="bold green")
    else:
        yield Text("No problems. Ready to train.", style="bold green")


def _listed(kind: str, items: Sequence[str], style: str) -> Iterable[Text]:
    for item in items[:_SHOWN]:
        yield Text.assemble((f"{kind}: ", style), item)
    if len(items) > _SHOWN:
        yield Text(f"{kind}: and {len(items) - _SHOWN} more", style=style)


def _check_values(name: str, samples: NDArray[np.float32], findings: _Findings) -> None:
    bad = ~np.isfinite(samples)
    if bad.any():
        first, channel = np.argwhere(bad)[0]
        findings.errors.append(
            f"recording `{name}`: {int(bad.sum())} values are NaN or Inf, the first in sample {first}, "
            f"channel {channel}; fill or cut them"
        )
        return
    for channel in np.flatnonzero(samples.min(axis=0) == samples.max(axis=0)):
        findings.warnings.append(f"recording `{name}`: channel {channel} never changes; a dead sensor?")


def _check_length(recording: Recording, samples: int, rate: float, findings: _Findings) -> None:
    seconds = samples / rate
    stated = recording.duration
    if stated is not None and abs(seconds - stated) > max(_DURATION_TOLERANCE, _RATE_TOLERANCE * stated):
        findings.errors.append(
            f"recording `{recording.name}`: {samples} samples at {rate:g} Hz are {seconds:.1f} s, but its "
            f"duration is {stated:.1f} s ({samples / stated:.4g} samples a second); is the file cut, or is "
            "the rate another? For features give the rate of their frames with --rate"
        )
    elif recording.num_frames is not None and rate == recording.fps and recording.num_frames != samples:
        findings.warnings.append(
            f"recording `{recording.name}`: holds {samples} samples, `num_frames` is {recording.num_frames}"
        )


def _check_segments(
    recording: Recording, length: float | None, rate: float | None, findings: _Findings
) -> None:
    slack = _SLACK_FRAMES / rate if rate else _SAME
    by_label: dict[str, list[Segment]] = {}
    for segment in recording.segments:
        where = f"recording `{recording.name}`, `{segment.label}` at {segment.start:g} s"
        if segment.end - segment.start < _SAME:
            findings.errors.append(f"{where}: ends where it starts")
            continue
        if segment.start < 0:
            findings.errors.append(f"{where}: starts before the recording")
        if length is not None and segment.end > length + slack:
            findings.errors.append(
                f"{where}: ends at {segment.end:g} s, after the recording ({length:.2f} s)"
            )
        by_label.setdefault(segment.label, []).append(segment)
    for label, segments in by_label.items():
        segments.sort(key=lambda item: (item.start, item.end))
        reach = segments[0]  # of those before, the one that ends last
        for one, other in pairwise(segments):
            where = f"recording `{recording.name}`, `{label}` at {other.start:g} s"
            if abs(one.start - other.start) <= _SAME and abs(one.end - other.end) <= _SAME:
                findings.errors.append(f"{where}: is there twice")
            elif other.start < reach.end - _SAME:
                findings.warnings.append(
                    f"{where}: overlaps the one from {reach.start:g} s to {reach.end:g} s of the same class"
                )
            reach = max(reach, other, key=lambda item: item.end)


def _check_channels(
    annotations: Annotations, shapes: dict[str, tuple[int, int]], findings: _Findings
) -> None:
    counts = Counter(channels for _, channels in shapes.values())
    if not counts:
        return
    stated = len(annotations.channels)
    expected = stated or counts.most_common(1)[0][0]
    basis = "as `channels` in the annotations names" if stated else "as most recordings have"
    for name, (_, channels) in shapes.items():
        if channels != expected:
            findings.errors.append(
                f"recording `{name}`: {channels} channels, expected {expected}, {basis}; is it [C, T]?"
                if shapes[name][0] == expected
                else f"recording `{name}`: {channels} channels, expected {expected}, {basis}"
            )


def _check_rates(
    annotations: Annotations,
    shapes: dict[str, tuple[int, int]],
    rates: dict[str, float],
    findings: _Findings,
) -> None:
    unknown = [name for name in shapes if name not in rates]
    if unknown:
        findings.errors.append(
            f"no rate for `{unknown[0]}`{_and_more(unknown)}: the annotations give neither "
            "`fps` nor `duration`; give the samples a second with --rate"
        )
    stated = {item.fps for item in annotations.recordings if item.name in rates and item.fps is not None}
    if len(stated) > 1 and len({rates[name] for name in rates}) > 1:
        shown = ", ".join(f"{value:g}" for value in sorted(stated)[:8])
        findings.errors.append(f"recordings of several rates: {shown} Hz; one model needs one, resample them")


def _check_labels(annotations: Annotations, findings: _Findings) -> None:
    where: dict[str, set[str]] = {label: set() for label in annotations.classes}
    for recording in annotations.recordings:
        for segment in recording.segments:
            where.setdefault(segment.label, set()).add(recording.subset)
    for label, subsets in where.items():
        if not subsets:
            findings.warnings.append(f"class `{label}`: never occurs")
        elif len(subsets) == 1 and len(annotations.subsets) > 1:
            findings.warnings.append(f"class `{label}`: occurs only in the subset `{next(iter(subsets))}`")


def _check_strays(folder: Path, used: set[Path], findings: _Findings) -> None:
    places = [folder, folder / "data"]
    files = [path for place in places if place.is_dir() for path in sorted(place.iterdir())]
    strays = [
        path.name
        for path in files
        if path.suffix.lower() in SUFFIXES and path.is_file() and path.resolve() not in used
    ]
    if strays:
        more = f" and {len(strays) - 5} more" if len(strays) > 5 else ""
        findings.warnings.append(f"in {folder} without annotation: {', '.join(strays[:5])}{more}")


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _summary(label: str, annotations: Annotations) -> ClassSummary:
    counts: Counter[str] = Counter()
    lengths: list[float] = []
    for recording in annotations.recordings:
        mine = [item.end - item.start for item in recording.segments if item.label == label]
        counts[recording.subset] += len(mine)
        lengths += mine
    if not lengths:
        return ClassSummary(label, dict(counts), None, None, None)
    return ClassSummary(label, dict(counts), float(np.median(lengths)), min(lengths), max(lengths))
