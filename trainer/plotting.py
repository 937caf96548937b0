"""A timeline of what was detected, stream by stream, under what was true: one picture of a run.

matplotlib is imported when something is drawn, not before: scoring and checking need no plotting.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError, DataError
from engine.schema import nearest
from trainer.annotations import Annotations
from trainer.predictions import Predictions, read_predictions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OUTPUT_SUFFIXES = (".png", ".svg", ".pdf")
DEFAULT_STREAMS = 6
# A picture of more panels is a scroll; beyond this, choose streams or draw several.
MAX_STREAMS = 40
MAX_ROWS = 3

# Sixteen colours that alternate in hue and in lightness, so that neighbours in a list of classes differ.
PALETTE = (
    "#4269d0",
    "#efb118",
    "#e4572e",
    "#6cc5b0",
    "#2f8f46",
    "#ff8ab7",
    "#8b4fd9",
    "#97bbf5",
    "#8a5a3c",
    "#b9bec7",
    "#12636b",
    "#c2256f",
    "#b8cc4a",
    "#7a1f2b",
    "#2c2f6b",
    "#22b8e6",
)
_INK, _FAINT = "#22262b", "#8b929c"
_WIDTH_INCHES, _PANEL_INCHES, _PANEL_WITHOUT_TRUTH_INCHES = 12.0, 1.12, 0.78


@dataclass(frozen=True, slots=True)
class Plotted:
    """What the picture shows, and how many streams it leaves out."""

    streams: tuple[str, ...]
    left_out: int


@dataclass(frozen=True, slots=True)
class _Bar:
    start: float
    end: float
    label: str
    finished: bool = True


def plot(
    events: Path,
    output: Path,
    annotations: Annotations | None = None,
    streams: Sequence[str] = (),
    limit: int = DEFAULT_STREAMS,
    window: tuple[float, float] | None = None,
) -> Plotted:
    """Draw the streams of an event file (or of a results file) to `output`: .png, .svg or .pdf.

    One panel a stream: above, where `annotations` know the stream, the truth; below, what was detected, with
    a mark where each start was announced. Actions that were aborted, or were still going on when the events
    stop, are hatched. Without `streams`, the first `limit` streams of the file (annotated ones first where
    there are annotations) are drawn. `window` is (from, to) in seconds.
    Raises ConfigError when an option cannot be used or matplotlib is missing, DataError for the files.
    """
    if output.suffix.lower() not in OUTPUT_SUFFIXES:
        raise ConfigError(f"{output}: expected a file that ends in {', '.join(OUTPUT_SUFFIXES)}")
    if not 1 <= limit <= MAX_STREAMS:
        raise ConfigError(f"{limit} streams in one picture: expected 1 to {MAX_STREAMS}")
    if window is not None and not window[0] < window[1]:
        raise ConfigError(f"the window from {window[0]:g} s to {window[1]:g} s is empty")
    predictions = read_predictions(events)
    truth = {} if annotations is None else {item.name: item for item in annotations.recordings}
    chosen, left_out = _choose(predictions, truth, streams, limit, events)
    lanes = {name: _detected(predictions, name) for name in chosen}
    above = {
        name: [_Bar(segment.start, segment.end, segment.label) for segment in truth[name].segments]
        for name in chosen
        if name in truth
    }
    first, last = window if window is not None else (-math.inf, math.inf)
    shown = {
        bar.label
        for bars in (*lanes.values(), *above.values())
        for bar in bars
        if bar.end >= first and bar.start <= last
    }
    known = annotations.classes if annotations is not None else ()
    classes = [name for name in known if name in shown] + sorted(shown - set(known))
    everything = {bar.label for bars in (*lanes.values(), *above.values()) for bar in bars}
    colours = _colours([*known, *sorted(everything - set(known))])
    _draw(output, predictions, chosen, lanes, above, classes, colours, window)
    return Plotted(streams=tuple(chosen), left_out=left_out)


def _choose(
    predictions: Predictions,
    truth: Mapping[str, object],
    streams: Sequence[str],
    limit: int,
    events: Path,
) -> tuple[list[str], int]:
    if not predictions.recordings:
        raise DataError(f"{events}: holds no events, so there is nothing to draw")
    if streams:
        for name in streams:
            if name not in predictions.recordings:
                raise DataError(f"{events}: no stream `{name}`{nearest(name, predictions.recordings[:50])}")
        if len(streams) > MAX_STREAMS:
            raise ConfigError(f"{len(streams)} streams in one picture: expected at most {MAX_STREAMS}")
        return list(dict.fromkeys(streams)), 0
    ordered = sorted(predictions.recordings, key=lambda name: bool(truth) and name not in truth)
    return ordered[:limit], max(0, len(ordered) - limit)


def _detected(predictions: Predictions, name: str) -> list[_Bar]:
    bars = [_Bar(item.start, item.end, item.label) for item in predictions.segments[name]]
    for start in predictions.starts[name]:
        if start.outcome != "ended":
            end = predictions.clock[name] if start.until is None else start.until
            bars.append(_Bar(start.time, end, start.label, finished=False))
    return bars


def _colours(classes: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """A colour for each class, by its place; beyond the palette, the same hues in other lightness."""
    result: dict[str, tuple[float, float, float]] = {}
    for place, name in enumerate(classes):
        text = PALETTE[place % len(PALETTE)]
        red, green, blue = (int(text[at : at + 2], 16) / 255 for at in (1, 3, 5))
        hue, light, saturation = colorsys.rgb_to_hls(red, green, blue)
        turn = place // len(PALETTE)
        light = light if turn == 0 else 0.25 + 0.5 * ((light + 0.37 * turn) % 1.0)
        result[name] = colorsys.hls_to_rgb(hue, light, saturation)
    return result


def _rows(bars: Sequence[_Bar]) -> tuple[list[int], list[int]]:
    """For each bar its row, and how many rows it shares the lane's height with.

    Bars that overlap are put in rows of their own, at most MAX_ROWS; where nothing overlaps a bar has the
    lane for itself. Neighbours that share less than half of the shorter one stay in one row: two estimates of
    one border are no second lane.
    """
    rows, counts = [0] * len(bars), [1] * len(bars)
    free: list[tuple[float, float]] = []  # for each row in use, the last bar's end and length
    cluster: list[int] = []
    for place in sorted(range(len(bars)), key=lambda index: (bars[index].start, bars[index].end)):
        bar = bars[place]
        length = bar.end - bar.start
        open_rows = [end - bar.start > min(length, other) / 2 for end, other in free]
        if not any(open_rows) and not any(end > bar.start for end, _ in free[1:]):
            free, cluster = [], []
        row = next((number for number, taken in enumerate(open_rows) if not taken), len(free))
        if row >= len(free) and len(free) < MAX_ROWS:
            free.append((bar.end, length))
        else:
            row = min(row, MAX_ROWS - 1)
            free[row] = max(free[row], (bar.end, length))
        rows[place] = row
        cluster.append(place)
        for other in cluster:
            counts[other] = len(free)
    return rows, counts


def _draw(
    output: Path,
    predictions: Predictions,
    chosen: Sequence[str],
    lanes: Mapping[str, Sequence[_Bar]],
    above: Mapping[str, Sequence[_Bar]],
    classes: Sequence[str],
    colours: Mapping[str, tuple[float, float, float]],
    window: tuple[float, float] | None,
) -> None:
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch
        from matplotlib.ticker import FuncFormatter, MultipleLocator
    except ImportError:
        raise ConfigError("matplotlib is not installed; run: pip install 'onset[plot]'") from None

    last = max(
        [predictions.clock.get(name, 0.0) for name in chosen]
        + [bar.end for bars in (*lanes.values(), *above.values()) for bar in bars]
        + [1e-3]
    )
    begin, end = window if window is not None else (0.0, last)
    per_row = max(1, min(6, len(classes)))
    legend_inches = 0.19 * math.ceil((len(classes) + 2) / per_row) + 0.1
    panel_inches = _PANEL_INCHES if above else _PANEL_WITHOUT_TRUTH_INCHES
    height = panel_inches * len(chosen) + legend_inches + 0.70
    style = {"font.family": "sans-serif", "font.size": 9, "hatch.linewidth": 0.8, "svg.hashsalt": "onset"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH_INCHES, height), facecolor="white")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(chosen), 1, sharex=True, squeeze=False)[:, 0]
        figure.subplots_adjust(
            left=0.075,
            right=0.985,
            top=1 - 0.30 / height,
            bottom=(legend_inches + 0.42) / height,
            hspace=0.42,
        )
        for axes, name in zip(panels, chosen, strict=True):
            _panel(axes, name, predictions, lanes[name], above.get(name), colours, (begin, end))
            axes.set_ylim(-0.08, 2.28 if above else 1.2)
        panels[-1].xaxis.set_major_locator(MultipleLocator(_tick_step(end - begin)))
        panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: _clock(value, end - begin)))
        panels[-1].tick_params(axis="x", length=3, color=_FAINT, labelbottom=True, labelsize=8)
        panels[-1].set_xlabel("time in the stream", color=_FAINT, labelpad=2, fontsize=8)

        handles: list[Any] = [Patch(facecolor=colours[name], label=name) for name in classes]
        if predictions.from_events:
            handles.append(
                Line2D([], [], color=_INK, marker="v", markersize=4.5, linestyle="", label="start announced")
            )
        if any(not bar.finished for bars in lanes.values() for bar in bars):
            handles.append(
                Patch(facecolor="white", edgecolor=_FAINT, hatch="/////", label="aborted or still open")
            )
        legend = figure.legend(
            handles=handles,
            loc="lower center",
            ncols=per_row,
            frameon=False,
            handlelength=1.3,
            handleheight=0.9,
            labelspacing=0.3,
            borderpad=0.2,
            borderaxespad=0.2,
            columnspacing=1.6,
            bbox_to_anchor=(0.53, 0.0),
            fontsize=8.5,
            labelcolor=_INK,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)  # a `$` in a class name is a dollar
        try:
            figure.savefig(output, dpi=150)
        except OSError as problem:
            raise ConfigError(f"{output}: cannot be written: {problem.strerror or problem}") from None


def _panel(
    axes: Axes,
    name: str,
    predictions: Predictions,
    detected: Sequence[_Bar],
    true: Sequence[_Bar] | None,
    colours: Mapping[str, tuple[float, float, float]],
    span: tuple[float, float],
) -> None:
    axes.set_xlim(*span)
    axes.set_title(name, loc="left", fontsize=9, fontweight="bold", color=_INK, pad=3, parse_math=False)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#d5d9de")
    axes.tick_params(axis="x", length=0, labelbottom=False, colors=_FAINT)
    axes.tick_params(axis="y", length=0, pad=4, labelsize=8, labelcolor=_FAINT)
    axes.set_yticks([1.8, 0.45] if true is not None else [0.45])
    axes.set_yticklabels(["truth", "detected"] if true is not None else ["detected"])
    axes.grid(axis="x", color="#eceef1", linewidth=0.8)
    axes.set_axisbelow(True)
    if true is not None:
        _lane(axes, true, 1.35, 0.9, colours, span)
    _lane(axes, detected, 0.0, 0.9, colours, span)
    marks = [start.emitted for start in predictions.starts[name] if start.emitted is not None]
    marks = [time for time in marks if span[0] <= time <= span[1]]
    axes.plot(marks, [1.07] * len(marks), linestyle="", marker="v", markersize=4, color=_INK, clip_on=False)


def _lane(
    axes: Axes,
    bars: Sequence[_Bar],
    bottom: float,
    height: float,
    colours: Mapping[str, tuple[float, float, float]],
    span: tuple[float, float],
) -> None:
    rows, counts = _rows(bars)
    groups: dict[tuple[str, float, float, bool], list[tuple[float, float]]] = {}
    for bar, row, count in zip(bars, rows, counts, strict=True):
        step = height / count
        low = bottom + height - (row + 1) * step
        groups.setdefault((bar.label, low, step, bar.finished), []).append((bar.start, bar.end - bar.start))
        # Points that the bar is wide, and that its name takes at 6.5 points (capitals are the wide case).
        start, end = max(bar.start, span[0]), min(bar.end, span[1])
        width = (end - start) / (span[1] - span[0]) * _WIDTH_INCHES * 0.91 * 72
        if not bar.finished or count > 2 or width < 4.6 * len(bar.label) + 6:
            continue
        red, green, blue = colours[bar.label]
        axes.text(
            (start + end) / 2,
            low + step / 2,
            bar.label,
            ha="center",
            va="center_baseline",
            fontsize=6.5,
            color="white" if 0.30 * red + 0.59 * green + 0.11 * blue < 0.62 else _INK,
            parse_math=False,
            clip_on=True,
            zorder=3,
        )
    for (label, low, step, finished), extents in groups.items():
        place = (low + 0.02, step - 0.04)
        colour = colours[label]
        if finished:
            axes.broken_barh(extents, place, facecolors=[colour], edgecolors="white", linewidth=0.6)
        else:
            pale = tuple(1 - 0.22 * (1 - channel) for channel in colour)
            axes.broken_barh(
                extents, place, facecolors=[pale], edgecolors=[colour], hatch="/////", linewidth=0.6
            )


def _tick_step(span: float) -> float:
    """Seconds between ticks: of the steps that a clock has, the smallest that gives at most 12 ticks."""
    steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400]
    if span <= 12:
        return float(next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1) if span / step <= 12))
    return float(next((step for step in steps if span / step <= 12), span / 6))


def _clock(seconds: float, span: float) -> str:
    """`75 s` in a short picture, `1:15` in a longer one, `2:01:15` beyond an hour."""
    if span <= 120:
        return f"{seconds:g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
