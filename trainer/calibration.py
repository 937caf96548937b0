"""Thresholds for an operating point, chosen on recordings that a run was not trained on.

A holdout is small, and the highest value found on it is partly luck; worse, it tends to lie where starts are
announced at their ends, since waiting is the surest way to be right. So the best is not what is chosen:

1. Of the settings that reach the asked precision, those stay whose recall (F1 where none is asked) is within
   one standard error of the best, that of a proportion of so many actions (the one standard error rule of
   Breiman et al., Classification and Regression Trees, 1984).
2. Of these, those stay whose median start delay is within one chunk, the unit of latency, of the shortest.
3. Of these, the one in their middle is taken: the nearest to all others on the grid of thresholds.

So on a grid of both thresholds. What that gives stands, unless 1 or 2 speak against it beside what was
configured and beside the same with another `confident` and `hold`; then the survivor that changes the least
takes its place. The gate is lowered to the thresholds where it is above them, since it would be in force in
their place; all other settings stay. The same run and recordings give the same choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from rich import box
from rich.table import Table

from engine.errors import ConfigError, DataError
from engine.manifest import Decoding
from engine.schema import Strict
from trainer.annotations import Annotations, Recording
from trainer.config import DataConfig
from trainer.data import choose
from trainer.predictions import Predictions
from trainer.scoring import F1_TIOU, START_TOLERANCE, score

THRESHOLDS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)
CONFIDENT = (0.1, 0.2, 0.3, 0.5)
HOLDS = (0.5, 1.0, 2.0)  # times what is configured, since classes differ in their pace


class Measured(Strict):
    """What one decoding gave: rates in [0, 1], seconds of the stream.

    `precision`, `recall` and `f1` are those of ended segments at tIoU 0.5; `start_precision` is the share of
    announced starts that `metrics.match_starts` finds true; `start_delay` is the median over these.
    """

    decoding: Decoding
    detections: int
    precision: float
    recall: float
    f1: float
    start_precision: float
    start_delay: float | None

    def reaches(self, precision: float | None) -> bool:
        """Are segments and starts as precise as asked, and is anything right?"""
        least = 0.0 if precision is None else precision
        return self.recall > 0 and self.worst >= least

    @property
    def worst(self) -> float:
        """The lower one of both precisions."""
        return min(self.precision, self.start_precision)

    def value(self, precision: float | None) -> float:
        """What is to be as high as possible."""
        return self.f1 if precision is None else self.recall


class Calibration(Strict):
    """What was chosen for which `precision` (None: for F1), on how many recordings and actions of which
    subset, of how many settings that were tried."""

    subset: str
    precision: float | None
    recordings: int
    actions: int
    tried: int
    before: Measured
    after: Measured


def calibrate(
    detect: Callable[[Decoding], Predictions],
    truth: Annotations,
    subset: str,
    decoding: Decoding,
    precision: float | None,
    grain: float,
    progress: Callable[[float], None] | None = None,
) -> Calibration:
    """Choose thresholds, beginning from `decoding`, for all recordings of `truth`: see the module.

    `detect` gives the events of these recordings; `subset` is what they are called; `precision` in [0, 1], or
    None for the highest F1; `grain`: seconds of a chunk; `progress` is told the fraction that is done.

    Raises ConfigError when nothing reaches the precision, DataError when nothing is annotated or found.
    """
    # They may come from several subsets of the annotations, and are judged as one.
    recordings = tuple(replace(recording, subset=subset) for recording in truth.recordings)
    judged = Annotations(truth.classes, recordings)
    total = 1 + len(THRESHOLDS) ** 2 + len(CONFIDENT) * len(HOLDS)  # at most
    tried = actions = 0

    def measure(candidate: Decoding) -> Measured:
        nonlocal tried, actions
        predictions = detect(candidate)
        scores = score(predictions, judged, subset, (F1_TIOU,))
        announced = sum(len(starts) for starts in predictions.starts.values())
        delay = scores.start_delay
        tried, actions = tried + 1, scores.instances
        if progress is not None:
            progress(tried / total)
        return Measured(
            decoding=candidate,
            detections=scores.detections,
            precision=scores.counts.precision,
            recall=scores.counts.recall,
            f1=scores.counts.f1,
            start_precision=delay.count / announced if delay else 0.0,
            start_delay=delay.p50 if delay else None,
        )

    before = measure(decoding)
    grid = [measure(with_thresholds(decoding, start, end)) for start in THRESHOLDS for end in THRESHOLDS]
    first = middle(survivors(grid, actions, precision, grain), precision) or _closest(grid)
    around = [first, before, *(measure(other) for other in _paces(first.decoding))]
    left = survivors(around, actions, precision, grain)
    if not left:
        raise _out_of_reach(_closest(around), precision)

    def change(item: Measured) -> tuple[bool, bool, bool, float]:
        other = item.decoding
        return (
            item is not first,
            other.hold != decoding.hold,
            other.confident != decoding.confident,
            -item.value(precision),
        )

    after = min(left, key=change)
    return Calibration(
        subset=subset,
        precision=precision,
        recordings=len(recordings),
        actions=actions,
        tried=tried,
        before=before,
        after=after,
    )


def with_thresholds(decoding: Decoding, start: float, end: float) -> Decoding:
    """`decoding` with other thresholds, and a gate that leaves them in force."""
    gate = min(decoding.gate, start, end)
    return decoding.model_copy(update={"start_threshold": start, "end_threshold": end, "gate": gate})


def survivors(
    found: Sequence[Measured], actions: int, precision: float | None, grain: float
) -> list[Measured]:
    """Those that reach the precision, as good as the best give or take its standard error over `actions`, and
    as early as the earliest of these give or take `grain` seconds."""
    reached = [item for item in found if item.reaches(precision)]
    best = max((item.value(precision) for item in reached), default=0.0)
    error = math.sqrt(best * (1.0 - best) / actions)
    good = [item for item in reached if item.value(precision) >= best - error]
    soonest = min((_delay(item) for item in good), default=0.0)
    return [item for item in good if _delay(item) <= soonest + grain]


def middle(found: Sequence[Measured], precision: float | None) -> Measured | None:
    """The one whose thresholds are nearest to those of all others, in steps of the grid; None of none.

    Of several such, the best, then that of the lowest thresholds.
    """

    def place(item: Measured) -> tuple[int, int]:
        decoding = item.decoding
        return THRESHOLDS.index(decoding.start_threshold), THRESHOLDS.index(decoding.end_threshold)

    places = [place(item) for item in found]

    def rank(item: Measured) -> tuple[int, float, tuple[int, int]]:
        start, end = place(item)
        steps = sum(abs(start - i) + abs(end - j) for i, j in places)
        return steps, -item.value(precision), (start, end)

    return min(found, key=rank, default=None)


def in_use(annotations: Annotations, data: DataConfig, chosen: Sequence[Recording]) -> dict[str, int]:
    """How many of `chosen` are in `train` and in `test`, where there are any: thresholds chosen on the former
    are those of a detector that knows what comes, and the latter are no test any more."""
    counts = {}
    for subset in ("train", "test"):
        try:
            names = {recording.name for recording in choose(annotations, data, subset)}
        except DataError:  # nothing belongs to it
            continue
        counts[subset] = sum(recording.name in names for recording in chosen)
    return {subset: count for subset, count in counts.items() if count}


def render(result: Calibration) -> Table:
    """Before and after, as a rich table; rates in %, the delay in seconds."""
    goal = "highest F1" if result.precision is None else f"precision {100 * result.precision:g} %"
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{result.subset}, {goal}: {result.actions} actions in {result.recordings} recordings, "
        f"{result.tried} settings tried",
        caption=f"segments at tIoU {F1_TIOU:g}, starts within {START_TOLERANCE:g} s; delay: median, seconds",
    )
    table.add_column("")
    columns = ("start", "end", "confident", "hold", "precision", "recall", "F1", "of starts", "start delay")
    for heading in columns:
        table.add_column(heading, justify="right")
    for title, item in (("before", result.before), ("after", result.after)):
        decoding = item.decoding
        settings = (decoding.start_threshold, decoding.end_threshold, decoding.confident, decoding.hold)
        rates = (item.precision, item.recall, item.f1, item.start_precision)
        delay = "-" if item.start_delay is None else f"{item.start_delay:+.2f}"
        table.add_row(title, *(f"{s:g}" for s in settings), *(f"{100 * r:.2f}" for r in rates), delay)
    return table


def _paces(decoding: Decoding) -> list[Decoding]:
    """`decoding` with every other pair of `confident` and `hold` around its own."""
    pairs = dict.fromkeys(
        (confident, min(600.0, decoding.hold * times)) for confident in CONFIDENT for times in HOLDS
    )
    pairs.pop((decoding.confident, decoding.hold), None)
    return [decoding.model_copy(update={"confident": c, "hold": hold}) for c, hold in pairs]


def _delay(item: Measured) -> float:
    return math.inf if item.start_delay is None else item.start_delay


def _closest(found: Sequence[Measured]) -> Measured:
    """Where nothing reaches what was asked, what comes nearest to it."""
    return max(found, key=lambda item: (item.recall > 0, item.worst, item.recall))


def _out_of_reach(best: Measured, precision: float | None) -> ConfigError | DataError:
    if not best.recall:
        return DataError(
            f"no setting detects any of the annotated actions at tIoU {F1_TIOU:g}; train longer, or look at "
            "`onset data check`"
        )
    decoding = best.decoding
    return ConfigError(
        f"no setting reaches a precision of {precision:g}; the nearest has {best.precision:.3f} (of starts "
        f"{best.start_precision:.3f}) at a recall of {best.recall:.3f}, with start_threshold "
        f"{decoding.start_threshold:g} and end_threshold {decoding.end_threshold:g}; ask for less, or train "
        "longer or on more"
    )
