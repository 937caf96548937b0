"""Results, event lines and frame scores: what is read, what is counted once, what is refused and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import DataError
from stream.events import VERSION, Event
from trainer.predictions import (
    EVENT_VERSION,
    MAX_LINE_CHARS,
    Detection,
    read_frame_scores,
    read_predictions,
)


def _started(instance: str, time: float, start: float, **more: Any) -> Event:
    fields: dict[str, Any] = {
        "stream": "r1",
        "epoch": 0,
        "bundle": "b1",
        "label": "wave",
        "score": 0.5,
    } | more
    return Event("action.started", time=time, start=start, instance_id=instance, **fields)


def _ended(instance: str, time: float, start: float, end: float, **more: Any) -> Event:
    fields: dict[str, Any] = {
        "stream": "r1",
        "epoch": 0,
        "bundle": "b1",
        "label": "wave",
        "score": 0.9,
    } | more
    return Event("action.ended", time=time, start=start, end=end, instance_id=instance, **fields)


def _aborted(instance: str, time: float) -> Event:
    return Event("action.aborted", "r1", 0, "b1", time, instance_id=instance, label="wave", start=0.0)


def _write(folder: Path, lines: list[Event | str], name: str = "events.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(f"{line if isinstance(line, str) else line.to_json()}\n" for line in lines))
    return path


def test_the_reader_knows_the_version_that_the_runtime_writes() -> None:
    assert EVENT_VERSION == VERSION


def test_results(tmp_path: Path) -> None:
    items = [{"segment": [1, 2.5], "label": "wave", "score": 0.25}]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"version": "x", "results": {"r1": items, "r2": []}}, indent=1))
    predictions = read_predictions(path)
    assert predictions.segments == {"r1": (Detection(1.0, 2.5, "wave", 0.25),), "r2": ()}
    (start,) = predictions.starts["r1"]
    assert (start.time, start.label, start.score, start.emitted) == (1.0, "wave", 0.25, None)
    assert not predictions.from_events
    assert predictions.recordings == ("r1", "r2")
    assert predictions.bundle is None


@pytest.mark.parametrize("name", ["events.jsonl", "events.json", "events.txt"])
def test_events(tmp_path: Path, name: str) -> None:
    lines: list[Event | str] = [
        Event("stream.started", "r1", 0, "b1", 0.0),
        _started("i1", 1.5, 1.0),
        _started("i2", 2.0, 1.75, label="rest"),
        "",
        _ended("i1", 4.0, 1.125, 3.5),
        _started("i3", 5.0, 4.5),
        _aborted("i3", 6.0),
        Event("stream.ended", "r1", 0, "b1", 9.0, reason="end of file"),
        Event("stream.started", "r2", 0, "b1", 0.0),
    ]
    predictions = read_predictions(_write(tmp_path, lines, name))
    assert predictions.from_events
    assert predictions.bundle == "b1"
    assert predictions.segments == {"r1": (Detection(1.125, 3.5, "wave", 0.9, "i1", 4.0),), "r2": ()}
    first, second, third = predictions.starts["r1"]
    assert (first.time, first.label, first.score, first.emitted) == (1.0, "wave", 0.5, 1.5)
    assert (first.id, first.outcome, first.until) == ("i1", "ended", None)
    assert (second.label, second.outcome) == ("rest", "open")
    assert (third.outcome, third.until) == ("aborted", 6.0)
    assert predictions.clock == {"r1": 9.0, "r2": 0.0}


def test_an_event_that_is_delivered_again_counts_once(tmp_path: Path) -> None:
    lines = [_started("i1", 1.5, 1.0), _ended("i1", 4.0, 1.0, 3.5)]
    predictions = read_predictions(_write(tmp_path, [*lines, *lines, lines[0]]))
    assert len(predictions.segments["r1"]) == len(predictions.starts["r1"]) == 1
    assert predictions.repeated == 3


def test_the_same_id_in_another_stream_is_another_action(tmp_path: Path) -> None:
    lines = [_started("i1", 1.5, 1.0), _started("i1", 1.5, 1.0, stream="r2", bundle="b2")]
    predictions = read_predictions(_write(tmp_path, [*lines]))
    assert (predictions.repeated, predictions.bundle, predictions.bundles) == (0, None, ("b1", "b2"))
    assert len(predictions.starts["r1"]) == len(predictions.starts["r2"]) == 1


def test_a_run_that_saw_nothing(tmp_path: Path) -> None:
    assert read_predictions(_write(tmp_path, [])).recordings == ()


GOOD = _started("i1", 1.5, 1.0).to_json()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, GOOD[:-5]], "jsonl:2: not readable as JSON"),
        ([GOOD, "[]"], "jsonl:2: expected an event"),
        ([GOOD.replace('"version":1', '"version":2')], "an event of version 2, expected 1"),
        ([GOOD.replace('"score":0.5,', "")], "`score` is None"),
        ([GOOD.replace('"score":0.5', '"score":NaN')], "`score` is nan"),
        ([GOOD.replace('"start":1.0', '"start":true')], "`start` is True"),
        ([GOOD.replace('"label":"wave"', '"label":7')], "`label` is 7"),
        ([GOOD.replace("action.started", "action.begun")], "found the event `action.begun`"),
        ([_ended("i1", 4.0, 1.0, 3.5).to_json()], "which has not started"),
        ([GOOD, _ended("i1", 4.0, 3.0, 2.0).to_json()], "before its start"),
        ([GOOD, GOOD.replace("0.5", "0.6")], "says something else"),
        ([GOOD, _aborted("i1", 3.0).to_json(), _ended("i1", 4.0, 1.0, 2.0).to_json()], "is over already"),
        ([GOOD, "x" * (MAX_LINE_CHARS + 1)], "longer than"),
    ],
)
def test_events_that_cannot_be_used_are_named_by_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(DataError) as problem:
        read_predictions(_write(tmp_path, [*lines]))
    assert message in str(problem.value)
    assert f"events.jsonl:{len(lines)}" in str(problem.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "neither as results"),
        ('{"database": {}}', "looks like an annotation file"),
        ("[]", "expected an object with the key `results`"),
        ('{"results": {"r": {}}}', "recording `r`: expected a list"),
        ('{"results": {"r": [{}]}}', "recording `r`, detection 0: expected an object with `segment`"),
        ('{"results": {"r": [{"segment": [2, 1], "label": "a", "score": 1}]}}', "before its start"),
        ('{"results": {"r": [{"segment": [1, 2], "label": "a"}]}}', "`score` is None"),
        ('{"results": {"r": [{"segment": [1, 2], "score": 1}]}}', "`label` is None"),
        ('{"results": {"r": [{"segment": [1, 1' + "0" * 400 + '], "label": "a", "score": 1}]}}', "finite"),
    ],
)
def test_results_that_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"results\.json") as problem:
        read_predictions(path)
    assert message in str(problem.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be opened"):
        read_predictions(tmp_path / "gone.json")
    with pytest.raises(DataError, match="found a folder"):
        read_predictions(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b'{"type": "\xff"}\n')
    with pytest.raises(DataError, match="UTF-8"):
        read_predictions(tmp_path / "a.jsonl")


def test_frame_scores(tmp_path: Path) -> None:
    path = tmp_path / "frames.npz"
    scores = np.arange(6, dtype=np.float16).reshape(3, 2)
    np.savez(path, r1=scores, frame_rate=12.5, classes=np.array(["a", "b"]))
    frames = read_frame_scores(path)
    assert (frames.rate, frames.classes) == (12.5, ("a", "b"))
    assert list(frames.scores) == ["r1"]
    assert frames.scores["r1"].dtype == np.float32
    np.testing.assert_array_equal(frames.scores["r1"], scores)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": None}, "no array `classes`"),
        ({"frame_rate": None}, "no array `frame_rate`"),
        ({"frame_rate": np.array([1.0, 2.0])}, "expected one number"),
        ({"frame_rate": np.array(0.0)}, "more than 0"),
        ({"classes": np.array([1, 2])}, "expected K names"),
        ({"r1": np.zeros((3, 3))}, "expected numbers [T, 2]"),
        ({"r1": np.full((3, 2), np.nan)}, "NaN or Inf"),
    ],
)
def test_frame_scores_that_cannot_be_used(
    tmp_path: Path, changes: dict[str, np.ndarray | None], message: str
) -> None:
    arrays = {"r1": np.zeros((3, 2)), "frame_rate": np.array(5.0), "classes": np.array(["a", "b"])} | changes
    np.savez(tmp_path / "f.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(DataError) as problem:
        read_frame_scores(tmp_path / "f.npz")
    assert message in str(problem.value)
