"""`onset data check`: each thing that can be wrong is found, and data that is fine passes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from engine.errors import DataError
from trainer.check import Report, check_data, render

RATE = 10.0


class Dataset:
    """Two fine recordings of 20 s, 3 channels at 10 Hz, to be spoilt by the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "data").mkdir()
        rng = np.random.default_rng(0)
        self.samples = {name: rng.normal(size=(200, 3)).astype(np.float32) for name in ("r1", "r2")}
        self.document: dict[str, Any] = {
            "classes": ["rest", "wave"],
            "database": {name: self._entry(subset) for name, subset in (("r1", "train"), ("r2", "test"))},
        }

    @staticmethod
    def _entry(subset: str) -> dict[str, Any]:
        annotations = [{"segment": [1, 4], "label": "wave"}, {"segment": [5, 20], "label": "rest"}]
        return {
            "subset": subset,
            "duration": 20.0,
            "fps": RATE,
            "num_frames": 200,
            "annotations": annotations,
        }

    def segments(self, name: str = "r1") -> list[dict[str, Any]]:
        segments: list[dict[str, Any]] = self.document["database"][name]["annotations"]
        return segments

    def check(self, rate: float | None = None) -> Report:
        for name, samples in self.samples.items():
            np.save(self.folder / "data" / f"{name}.npy", samples)
        path = self.folder / "annotations.json"
        path.write_text(json.dumps(self.document))
        return check_data(path, self.folder, rate)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path)


def test_fine_data_has_no_problems(dataset: Dataset) -> None:
    report = dataset.check()
    assert (report.errors, report.warnings) == ((), ())
    assert report.subsets == {"train": 1, "test": 1}
    assert report.hours == pytest.approx(40 / 3600)
    assert (report.channels, report.rates) == ((3,), (RATE,))
    rest, wave = report.classes
    assert (wave.label, wave.counts, wave.median) == ("wave", {"train": 1, "test": 1}, 3.0)
    assert (rest.shortest, rest.longest) == (15.0, 15.0)


def _one(problems: tuple[str, ...], *parts: str) -> None:
    (problem,) = problems
    for part in parts:
        assert part in problem


def test_a_missing_file(dataset: Dataset) -> None:
    del dataset.samples["r1"]
    _one(dataset.check().errors, "recording `r1`: no file")


def test_a_damaged_file_and_a_wrong_shape(dataset: Dataset) -> None:
    dataset.samples["r1"] = np.zeros((2, 100, 3), np.float32)
    _one(dataset.check().errors, "r1.npy", "[2, 100, 3]")
    del dataset.samples["r1"]
    (dataset.folder / "data" / "r1.npy").write_bytes(b"nothing")
    _one(dataset.check().errors, "r1.npy", "not readable")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(dataset: Dataset, value: float) -> None:
    dataset.samples["r1"][17:19, 2] = value
    _one(dataset.check().errors, "recording `r1`: 2 values", "sample 17, channel 2")


def test_a_dead_channel(dataset: Dataset) -> None:
    dataset.samples["r1"][:, 1] = 4
    _one(dataset.check().warnings, "channel 1 never changes")


def test_channels_that_differ(dataset: Dataset) -> None:
    dataset.samples["r1"] = dataset.samples["r1"][:, :2]
    dataset.samples["r3"] = dataset.samples["r2"]
    dataset.document["database"]["r3"] = dataset.document["database"]["r2"]
    _one(dataset.check().errors, "recording `r1`: 2 channels, expected 3")
    dataset.document["channels"] = ["x", "y"]
    assert len(dataset.check().errors) == 2  # now r2 and r3 are the odd ones


def test_a_transposed_recording_is_recognised(dataset: Dataset) -> None:
    dataset.document["channels"] = ["x", "y", "z"]
    dataset.samples["r1"] = dataset.samples["r1"].T.copy()
    errors = dataset.check().errors
    assert any("200 channels, expected 3" in error and "is it [C, T]?" in error for error in errors)


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ([19, 21], "ends at 21 s, after the recording (20.00 s)"),
        ([-1, 2], "starts before the recording"),
        ([6, 6], "ends where it starts"),
        ([6, 5], "before its start"),
        ([1, 4], "is there twice"),
        ([1.0005, 4.0005], "is there twice"),
    ],
)
def test_segments_that_cannot_be(dataset: Dataset, segment: list[float], message: str) -> None:
    dataset.segments().append({"segment": segment, "label": "wave"})
    assert [error for error in dataset.check().errors if message in error], message
    assert len(dataset.check().errors) == 1


def test_a_segment_may_end_with_the_last_frame(dataset: Dataset) -> None:
    dataset.segments()[1]["segment"] = [5, 20.1]
    assert dataset.check().errors == ()


def test_overlap_within_a_class_is_a_warning_even_when_not_adjacent(dataset: Dataset) -> None:
    dataset.segments()[:] = [
        {"segment": span, "label": "wave"} for span in ([1, 10], [2, 3], [5, 6], [11, 12])
    ] + [{"segment": [0, 20], "label": "rest"}]
    report = dataset.check()
    assert report.errors == ()
    assert len(report.warnings) == 2
    assert "overlaps the one from 1 s to 10 s" in report.warnings[1]


def test_labels_that_are_unknown_unused_or_in_one_subset_only(dataset: Dataset) -> None:
    dataset.segments()[0]["label"] = "waev"
    dataset.document["classes"].append("jump")
    report = dataset.check()
    _one(report.errors, "label `waev` is not in `classes` (did you mean `wave`?)")
    assert any("class `jump`: never occurs" in item for item in report.warnings)
    assert any("class `wave`: occurs only in the subset `test`" in item for item in report.warnings)


def test_files_without_annotation(dataset: Dataset) -> None:
    np.save(dataset.folder / "extra.npy", np.zeros(3))
    (dataset.folder / "notes.txt").write_text("")
    _one(dataset.check().warnings, "without annotation: extra.npy")


def test_an_implausible_rate(dataset: Dataset) -> None:
    dataset.samples["r1"] = dataset.samples["r1"][:100]
    dataset.segments()[:] = [{"segment": [1, 4], "label": "wave"}, {"segment": [5, 9], "label": "rest"}]
    _one(dataset.check().errors, "100 samples at 10 Hz are 10.0 s", "duration is 20.0 s (5 samples a second)")


def test_the_rate_of_features_is_given_beside_the_videos(dataset: Dataset) -> None:
    for entry in dataset.document["database"].values():
        entry |= {"fps": 30.0, "num_frames": 600}
    assert len(dataset.check().errors) >= 2
    report = dataset.check(rate=RATE)
    assert (report.errors, report.warnings, report.rates) == ((), (), (RATE,))


def test_rates_that_differ(dataset: Dataset) -> None:
    dataset.document["database"]["r2"] |= {"fps": 5.0, "duration": 40.0}
    _one(dataset.check().errors, "several rates: 5, 10 Hz")


def test_labels_in_csv_need_a_rate(tmp_path: Path) -> None:
    np.save(tmp_path / "r1.npy", np.random.default_rng(0).normal(size=(50, 2)))
    labels = tmp_path / "labels.csv"
    labels.write_text("recording,start,end,label\nr1,1,4,wave\n")
    _one(check_data(labels, tmp_path).errors, "no rate for `r1`:", "--rate")
    report = check_data(labels, tmp_path, 10.0)
    assert (report.errors, report.warnings) == ((), ())
    _one(check_data(labels, tmp_path, 20.0).errors, "after the recording (2.50 s)")


def test_everything_is_said_at_once_and_shown(dataset: Dataset) -> None:
    dataset.samples["r1"][0, 0] = np.nan
    dataset.samples["r2"] = dataset.samples["r2"][:, :1]
    dataset.segments("r2").append({"segment": [9, 8], "label": "jump"})
    dataset.segments("r2").append({"segment": [50, 60], "label": "wave"})
    report = dataset.check()
    assert len(report.errors) == 4
    output = io.StringIO()
    Console(file=output, width=160).print(render(report))
    text = output.getvalue()
    for part in (*(error[:60] for error in report.errors), "2 (1 train, 1 test)", "10 Hz", "Errors: 4."):
        assert part in text


def test_nothing_to_check(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        check_data(tmp_path / "a.json", tmp_path / "gone")
    with pytest.raises(DataError, match="cannot be opened"):
        check_data(tmp_path / "a.json", tmp_path)
    (tmp_path / "a.json").write_text("{}")
    assert check_data(tmp_path / "a.json", tmp_path).errors == (
        "found no key `database`, expected an object of recordings",
    )
