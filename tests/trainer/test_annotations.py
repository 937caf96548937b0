"""Annotation files of every accepted form, and everything that is wrong with the others, said at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import DataError
from trainer.annotations import (
    Annotations,
    Segment,
    examine_annotations,
    find_recording,
    read_annotations,
    unique_segments,
)

ONE = {"segment": [1.0, 2.5], "label": "wave", "label_id": 1}


def _write(folder: Path, document: Any, name: str = "a.json") -> Path:
    path = folder / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_everything_that_is_stated_is_read(tmp_path: Path) -> None:
    entry = {"subset": "test", "duration": 9.5, "fps": 50.0, "num_frames": 475, "subject": "u7", "age": 69}
    document = {
        "version": 1,
        "taxonomy": [{}],
        "channels": ["x", "y"],
        "classes": ["rest", "wave"],
        "database": {"r1": entry | {"annotations": [ONE]}, "r2": {"subset": "train", "annotations": []}},
    }
    annotations = read_annotations(_write(tmp_path, document))
    assert annotations.classes == ("rest", "wave")
    assert annotations.channels == ("x", "y")
    assert annotations.subsets == ("test", "train")
    first, second = annotations.recordings
    assert first.segments == (Segment(1.0, 2.5, "wave"),)
    assert (first.name, first.subset, first.duration) == ("r1", "test", 9.5)
    assert (first.fps, first.num_frames, first.subject) == (50.0, 475, "u7")
    assert (second.segments, second.duration, second.fps) == ((), None, None)
    assert annotations.subset("TEST") == (first,)


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (["b", "a"], ("b", "a")),
        ({"a": 1, "b": 0}, ("b", "a")),
        ({"10": "a", "9": "b"}, ("b", "a")),
        (None, ("b", "a")),
    ],
)
def test_order_of_classes(tmp_path: Path, classes: object, expected: tuple[str, ...]) -> None:
    labels = [
        {"segment": [0, 1], "label": "a", "label_id": 7},
        {"segment": [0, 1], "label": "b", "label_id": 3},
    ]
    document: dict[str, Any] = {"database": {"r": {"subset": "train", "annotations": labels}}}
    if classes is not None:
        document["classes"] = classes
    assert read_annotations(_write(tmp_path, document)).classes == expected


def test_without_classes_and_ids_labels_are_sorted(tmp_path: Path) -> None:
    labels = [{"segment": [0, 1], "label": name} for name in ("c", "a", "b")]
    assert read_annotations(_write(tmp_path, {"database": {"r": {"annotations": labels}}})).classes == (
        "a",
        "b",
        "c",
    )


@pytest.mark.parametrize(
    ("classes", "numbers", "expected"),
    [
        (None, (7, 3), {"b": 3, "a": 7}),  # as the file gives them, gaps and all
        (["b", "c", "a"], (7, 3), {"b": 0, "c": 1, "a": 2}),  # `classes` decides
        ({"10": "a", "9": "b"}, (7, 3), {"b": 0, "a": 1}),
        (None, (7, None), {"a": 0, "b": 1}),  # not every label has one: sorted
        (None, (None, None), {"a": 0, "b": 1}),
    ],
)
def test_ids_of_the_labels(
    tmp_path: Path, classes: object, numbers: tuple[int | None, ...], expected: dict[str, int]
) -> None:
    labels = [
        {"segment": [0, 1], "label": label} | ({} if number is None else {"label_id": number})
        for label, number in zip("ab", numbers, strict=True)
    ]
    document: dict[str, Any] = {"database": {"r": {"annotations": labels}}}
    if classes is not None:
        document["classes"] = classes
    annotations = read_annotations(_write(tmp_path, document))
    assert annotations.ids == expected
    assert annotations.classes == tuple(annotations.ids)


def test_ids_of_a_csv_and_of_none(tmp_path: Path) -> None:
    path = _write(tmp_path, "recording,start,end,label\nr,0,1,wave\nr,1,2,rest\n", "labels.csv")
    assert read_annotations(path).ids == {"rest": 0, "wave": 1}
    made = Annotations(("wave",), ())
    assert made.ids == {}
    assert isinstance(hash(made), int)


def test_duration_follows_from_frames_and_rate(tmp_path: Path) -> None:
    path = _write(tmp_path, {"database": {"r": {"fps": 50, "num_frames": 125, "annotations": []}}})
    assert read_annotations(path).recordings[0].duration == 2.5


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    document = {
        "classes": ["wave"],
        "database": {
            "r1": {
                "subset": 3,
                "duration": -1,
                "annotations": [
                    {"segment": [1, "x"], "label": "wave"},
                    {"segment": [1, 2]},
                    {"segment": [2, 1], "label": "wave"},
                    {"segment": [1, 2], "label": "wav"},
                    {"segment": [float("nan"), 2], "label": "wave"},
                    7,
                ],
            },
            "r2": [],
            "r3": {"annotations": {}},
        },
    }
    path = _write(tmp_path, document)
    with pytest.raises(DataError) as problem:
        read_annotations(path)
    message = str(problem.value)
    for part in (
        str(path),
        "`subset` is 3",
        "`duration` is -1",
        "annotation 0: `segment` is [1, 'x']",
        "annotation 1: `label` is None",
        "annotation 2: ends at 1 s, before its start at 2 s",
        "annotation 4: `segment` is [nan, 2]",
        "annotation 5: found the number 7",
        "recording `r2`: found a list",
        "recording `r3`: `annotations` is an object",
        "label `wav` is not in `classes` (did you mean `wave`?)",
    ):
        assert part in message
    annotations, problems = examine_annotations(path)
    assert annotations is not None
    assert len(problems) == 10
    assert [item.name for item in annotations.recordings] == ["r1", "r3"]


def test_long_lists_of_problems_are_cut(tmp_path: Path) -> None:
    document = {"database": {f"r{number}": 1 for number in range(50)}}
    with pytest.raises(DataError, match="and 31 more"):
        read_annotations(_write(tmp_path, document))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ("[1]", "found a list"),
        ("{}", "no key `database`"),
        ('{"results": {}}', "looks like a predictions file"),
        ('{"database": []}', "`database` is a list"),
        ('{"database": {}}', "no recording"),
        ('{"database": {"a": {}, "a": {}}}', "recording `a` appears more than once"),
        ('{"classes": ["x", "x"], "database": {"a": {}}}', "x more than once"),
        ('{"classes": [1], "database": {"a": {}}}', "`classes`: expected a list of names"),
        ('{"database": {"a": {"fps": 1' + "0" * 400 + "}}}", "expected a positive number"),
    ],
)
def test_malformed_json(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=r"a\.json") as problem:
        read_annotations(_write(tmp_path, content))
    assert message in str(problem.value)


def test_ids_that_contradict_one_another(tmp_path: Path) -> None:
    labels = [("a", 1), ("a", 2), ("b", 2)]
    items = [{"segment": [0, 1], "label": label, "label_id": number} for label, number in labels]
    with pytest.raises(DataError) as problem:
        read_annotations(_write(tmp_path, {"database": {"r": {"annotations": items}}}))
    assert "label `a` has several ids: [1, 2]" in str(problem.value)
    assert "label_id 2 stands for several labels: a, b" in str(problem.value)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv(tmp_path: Path, delimiter: str) -> None:
    rows = ["recording,start,end,label,subset", "r1,0.5,2,wave,train", "r2,,,,test", "", "r1,3,4.25,rest,"]
    path = _write(tmp_path, "\ufeff" + "\n".join(rows).replace(",", delimiter), "labels.csv")
    annotations = read_annotations(path)
    assert annotations.classes == ("rest", "wave")
    first, second = annotations.recordings
    assert first.segments == (Segment(0.5, 2.0, "wave"), Segment(3.0, 4.25, "rest"))
    assert (first.subset, first.duration) == ("train", None)
    assert (second.name, second.subset, second.segments) == ("r2", "test", ())


def test_csv_without_a_subset_is_for_training(tmp_path: Path) -> None:
    path = _write(tmp_path, 'recording,start,end,label\n"r,1",0,1,"a, b"\n', "labels.csv")
    recording = read_annotations(path).recordings[0]
    assert (recording.name, recording.subset) == ("r,1", "train")
    assert recording.segments == (Segment(0.0, 1.0, "a, b"),)


def test_csv_problems(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing: label"):
        read_annotations(_write(tmp_path, "recording,start,end\n", "labels.csv"))
    text = "recording,start,end,label,subset\nr,1,x,a,train\n,1,2,a,train\nr,2,1,a,test\nr,1,,a,train\n"
    with pytest.raises(DataError) as problem:
        read_annotations(_write(tmp_path, text, "labels.csv"))
    for part in (
        "line 2: `segment`",
        "line 3: no `recording`",
        "line 4: `r` is in",
        "line 4: ends",
        "line 5:",
    ):
        assert part in str(problem.value)


def test_unknown_subset_names_the_known_ones(tmp_path: Path) -> None:
    annotations = read_annotations(_write(tmp_path, {"database": {"r": {"subset": "validation"}}}))
    with pytest.raises(DataError, match="did you mean `validation`"):
        annotations.subset("validatoin")


def test_files_that_are_not_there_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be opened"):
        read_annotations(tmp_path / "a.json")
    with pytest.raises(DataError, match=r"expected \.json or \.csv"):
        read_annotations(_write(tmp_path, "", "a.yaml"))
    with pytest.raises(DataError, match="found a folder"):
        read_annotations(tmp_path)


def test_find_recording_looks_in_the_folder_then_in_data(tmp_path: Path) -> None:
    (tmp_path / "data" / "p1").mkdir(parents=True)
    np.save(tmp_path / "data" / "a.npy", np.zeros(3))
    np.save(tmp_path / "data" / "p1" / "c.npy", np.zeros(3))
    (tmp_path / "b.csv").write_text("1\n")
    assert find_recording(tmp_path, "a") == tmp_path / "data" / "a.npy"
    assert find_recording(tmp_path, "a.npy") == tmp_path / "data" / "a.npy"
    assert find_recording(tmp_path, "b") == tmp_path / "b.csv"
    assert find_recording(tmp_path, "p1/c") == tmp_path / "data" / "p1" / "c.npy"
    np.save(tmp_path / "a.npy", np.zeros(3))
    assert find_recording(tmp_path, "a") == tmp_path / "a.npy"
    with pytest.raises(DataError, match="recording `d`: no file"):
        find_recording(tmp_path, "d")


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/passwd", ""])
def test_a_name_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.csv").write_text("1\n")
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="leaves the folder"):
        find_recording(tmp_path / "in", name)


def test_unique_segments_drops_repetitions_and_the_very_short() -> None:
    segments = [
        Segment(0, 1, "a"),
        Segment(0.0005, 1.0005, "a"),
        Segment(0.0012, 1.0012, "a"),
        Segment(0, 1, "b"),
        Segment(3, 3.0005, "a"),
        Segment(4, 4, "a"),
    ]
    assert unique_segments(segments) == (segments[0], segments[2], segments[3])


@given(
    st.lists(
        st.builds(
            lambda start, length, label: Segment(start, start + length, label),
            st.integers(0, 40).map(lambda x: x * 4e-4),
            st.integers(0, 8).map(lambda x: x * 4e-4),
            st.sampled_from("ab"),
        ),
        max_size=20,
    )
)
def test_unique_segments_is_idempotent_and_keeps_the_order(segments: list[Segment]) -> None:
    once = unique_segments(segments)
    assert unique_segments(once) == once
    positions = [segments.index(segment) for segment in once]
    assert positions == sorted(positions)
