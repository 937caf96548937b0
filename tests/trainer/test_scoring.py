"""Whole scores: files in, one record out; what is left out is counted, what does not fit is refused."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from engine.errors import ConfigError, DataError
from trainer.annotations import Annotations, Recording, Segment, read_annotations
from trainer.predictions import Detection, FrameScores, Predictions, Start
from trainer.scoring import Scores, parse_tious, render, score

GOLDEN = Path(__file__).parents[1] / "golden" / "thumos14_actionformer"

TRUTH = Annotations(
    classes=("rest", "wave", "never"),
    recordings=(
        Recording(
            "r1", "test", 20.0, (Segment(2, 6, "wave"), Segment(8, 12, "rest"), Segment(14, 18, "wave"))
        ),
        Recording("r2", "test", 10.0, ()),
        Recording("r3", "train", 10.0, (Segment(1, 2, "wave"),)),
    ),
)


def _events(*rows: tuple[str, str, float, float, float, float]) -> Predictions:
    """(recording, label, start, end, emission of the start, emission of the end)."""
    names = dict.fromkeys(row[0] for row in rows)
    return Predictions(
        segments={
            n: tuple(Detection(s, e, c, 0.5, "i", b) for r, c, s, e, _, b in rows if r == n) for n in names
        },
        starts={n: tuple(Start(s, c, 0.5, "i", a) for r, c, s, _, a, _ in rows if r == n) for n in names},
        from_events=True,
        bundles=("b1",),
    )


PERFECT = _events(
    ("r1", "wave", 2, 6, 2.5, 7.0), ("r1", "rest", 8, 12, 8.5, 14.0), ("r1", "wave", 14, 18, 16.0, 18.5)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5", (0.5,)),
        ("0.3,0.5", (0.3, 0.5)),
        ("0.3:0.7:0.1", tuple(np.linspace(0.3, 0.7, 5))),
        ("0.5:0.95:0.05", tuple(np.linspace(0.5, 0.95, 10))),
        ("0.5:0.5:0.1", (0.5,)),
    ],
)
def test_tious(text: str, expected: tuple[float, ...]) -> None:
    assert parse_tious(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "a", "0.3:0.7", "0.7:0.3:0.1", "0.3:0.7:0", "0:0.5:0.1", "1.5", "nan", "0.3:0.7:0.3", "0.1:1:1e-9"],
)
def test_tious_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--tiou"):
        parse_tious(text)


def test_perfect_events_and_their_delays() -> None:
    scores = score(PERFECT, TRUTH, "Test", (0.3, 1.0))
    assert scores.mean_ap == (1, 1)
    assert scores.recall_1x == (1, 1)
    assert scores.average_mean_ap == 1
    assert set(scores.start_mean_ap) == {1}
    assert (scores.counts.f1, scores.counts.true_positives) == (1, 3)
    assert (scores.recordings, scores.instances, scores.missing_recordings) == (2, 3, 1)
    assert [item.label for item in scores.classes] == ["rest", "wave"]  # `never` does not occur
    assert [item.instances for item in scores.classes] == [1, 2]
    assert scores.start_delay is not None
    assert (scores.start_delay.count, scores.start_delay.mean, scores.start_delay.p50) == (3, 1.0, 0.5)
    assert scores.end_delay is not None
    assert (scores.end_delay.mean, scores.end_delay.p50) == (3.5 / 3, 1.0)
    assert scores.end_delay.p95 == pytest.approx(1.9)
    assert scores.bundles == ("b1",)


def test_results_have_no_delays() -> None:
    found = {
        name: tuple(Detection(d.start, d.end, d.label, d.score) for d in rows)
        for name, rows in PERFECT.segments.items()
    }
    starts = {name: tuple(Start(d.start, d.label, d.score) for d in rows) for name, rows in found.items()}
    scores = score(Predictions(found, starts), TRUTH, "test", (0.5,))
    assert (scores.average_mean_ap, scores.start_delay, scores.end_delay) == (1, None, None)


def test_what_is_left_out_is_counted() -> None:
    predictions = _events(
        ("r1", "wave", 2, 6, 2, 6),
        ("r2", "never", 1, 2, 1, 2),  # a false positive: nothing happens in r2
        ("r3", "wave", 1, 2, 1, 2),  # of the other subset
        ("r9", "wave", 1, 2, 1, 2),
        ("r1", "jump", 8, 12, 8, 12),
    )
    scores = score(predictions, TRUTH, "test", (0.5,))
    assert (scores.ignored_recordings, scores.missing_recordings, scores.detections) == (2, 0, 3)
    assert scores.unknown_labels == ("jump",)
    counts = scores.counts
    assert (counts.true_positives, counts.false_positives, counts.false_negatives) == (1, 2, 2)
    assert scores.mean_ap == (
        0.25,
    )  # wave 1/2, rest 0; the rest of what was said is of no class of the truth


def test_no_predictions_are_misses() -> None:
    scores = score(Predictions({}, {}, from_events=True), TRUTH, "test", (0.5,))
    assert (scores.average_mean_ap, scores.counts.false_negatives, scores.missing_recordings) == (0, 3, 2)
    assert scores.start_delay is None


def test_repeated_truth_counts_once() -> None:
    twice = Annotations(
        ("wave",), (Recording("r1", "test", 9.0, (Segment(1, 2, "wave"), Segment(1.0004, 2, "wave"))),)
    )
    assert score(_events(("r1", "wave", 1, 2, 1, 2)), twice, "test", (0.5,)).average_mean_ap == 1


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="no recording has the subset `dev`"):
        score(PERFECT, TRUTH, "dev", (0.5,))
    with pytest.raises(DataError, match="found `video_1` and such, expected `r1` and such"):
        score(_events(("video_1", "wave", 1, 2, 1, 2)), TRUTH, "test", (0.5,))
    with pytest.raises(DataError, match=r"found `Wave` \(did you mean `wave`\?\)"):
        score(_events(("r1", "Wave", 1, 2, 1, 2)), TRUTH, "test", (0.5,))
    empty = Annotations(("wave",), (Recording("r1", "test", 9.0, ()),))
    with pytest.raises(DataError, match="no annotated action"):
        score(PERFECT, empty, "test", (0.5,))


def _frames(seconds: float, rate: float) -> FrameScores:
    """Perfect scores for r1, columns in another order than the annotations' classes."""
    middle = (np.arange(round(seconds * rate)) + 0.5) / rate
    wave = ((middle >= 2) & (middle < 6)) | ((middle >= 14) & (middle < 18))
    rest = (middle >= 8) & (middle < 12)
    columns = np.stack([wave, rest, np.zeros_like(wave)], axis=1).astype(np.float32)
    return FrameScores({"r1": columns}, rate, ("wave", "rest", "never"))


def test_frame_scores() -> None:
    scores = score(PERFECT, TRUTH, "test", (0.5,), _frames(20, 12.5))
    assert scores.frame_mean_ap == 1
    assert [item.frame_ap for item in scores.classes] == [1, 1]
    cut = score(PERFECT, TRUTH, "test", (0.5,), _frames(13, 12.5))  # the second wave was never looked at
    by_label = {item.label: item.frame_ap for item in cut.classes}
    assert by_label["rest"] == 1
    assert by_label["wave"] is not None
    assert 0.5 < by_label["wave"] < 0.8  # half are found; the others share the last rank with the unseen
    assert score(PERFECT, TRUTH, "test", (0.5,)).frame_mean_ap is None


def test_frame_scores_of_other_classes_are_refused() -> None:
    with pytest.raises(DataError, match="class `jump` is not annotated"):
        score(PERFECT, TRUTH, "test", (0.5,), FrameScores({}, 5.0, ("jump",)))
    with pytest.raises(DataError, match="no column for class `wave`"):
        score(PERFECT, TRUTH, "test", (0.5,), FrameScores({}, 5.0, ("rest",)))


def test_json_reads_back_as_the_same_scores() -> None:
    scores = score(PERFECT, TRUTH, "test", (0.3, 0.5), _frames(20, 5))
    assert Scores.model_validate_json(scores.to_json()) == scores


def test_the_table_shows_the_numbers_and_the_notes() -> None:
    predictions = _events(
        ("r1", "wave", 2, 6, 2.25, 6.5), ("r1", "jump", 8, 12, 8, 12), ("r9", "wave", 1, 2, 1, 2)
    )
    output = io.StringIO()
    console = Console(width=120, file=output)
    console.print(render(score(predictions, TRUTH, "test", parse_tious("0.3:0.7:0.1"), _frames(20, 5))))
    text = output.getvalue()
    for part in (
        "2 recordings, 3 actions",
        "25.00",
        "recall@5x",
        "frame mAP",
        "mean +0.25 s",
        "1 of 2 recordings have no predictions",
        "whose predictions were left out: 1.",
        "do not know: jump",
    ):
        assert part in text


def test_released_thumos14_detections_through_the_files(tmp_path: Path) -> None:
    (tmp_path / "truth.json").write_bytes(gzip.decompress((GOLDEN / "ground_truth.json.gz").read_bytes()))
    annotations = read_annotations(tmp_path / "truth.json")
    said = np.load(GOLDEN / "predictions.npz", allow_pickle=False)
    names, results = said["video_ids"].tolist(), {}
    rows = zip(
        *(said[key].tolist() for key in ("video_index", "t_start", "t_end", "label", "score")), strict=True
    )
    for video, start, end, label, value in rows:
        item = Detection(start, end, annotations.classes[label], value)
        results.setdefault(names[video], []).append(item)
    segments = {name: tuple(items) for name, items in results.items()}
    starts = {
        name: tuple(Start(i.start, i.label, i.score) for i in items) for name, items in segments.items()
    }
    scores = score(Predictions(segments, starts), annotations, "test", parse_tious("0.3:0.7:0.1"))
    expected = json.loads((GOLDEN / "expected.json").read_text())
    np.testing.assert_allclose(scores.mean_ap, expected["mAP"], rtol=0, atol=1e-9)
    assert round(100 * scores.average_mean_ap, 2) == 66.83
    assert scores.missing_recordings == 0


def test_f1_of_each_class_is_that_of_its_own_events() -> None:
    found = _events(
        ("r1", "wave", 2, 6, 2.5, 7.0),
        ("r1", "rest", 8, 12, 8.5, 14.0),
        ("r1", "wave", 0, 1, 1.0, 1.5),
        ("r1", "wave", 8, 9, 9.0, 9.5),
    )
    scores = score(found, TRUTH, "test", (0.5,))
    assert {item.label: item.f1 for item in scores.classes} == {"rest": 1.0, "wave": pytest.approx(0.4)}
    assert scores.counts.f1 == pytest.approx(4 / 7)
    assert "F1@0.50" in _shown(scores)


def _shown(scores: Scores) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(render(scores))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
