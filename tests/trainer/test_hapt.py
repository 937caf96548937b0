"""The UCI archive converts to what the shared data holds, array for array and annotation for annotation."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import DataError
from trainer.annotations import find_recording, read_annotations
from trainer.check import check_data
from trainer.hapt import CLASSES, convert_hapt

ROOT = Path(__file__).parents[2]
Labels = list[tuple[int, int, int, int, int]]


def write_archive(folder: Path, samples: dict[tuple[int, int], np.ndarray], labels: Labels) -> Path:
    """The archive's layout for (experiment, user) -> [T, 6] and rows of labels.txt."""
    raw = folder / "RawData"
    raw.mkdir(parents=True)
    for (experiment, user), values in samples.items():
        for kind, columns in (("acc", values[:, :3]), ("gyro", values[:, 3:])):
            lines = [" ".join(repr(float(value)) for value in row) for row in columns]
            (raw / f"{kind}_exp{experiment:02d}_user{user:02d}.txt").write_text("\n".join(lines) + "\n")
    (raw / "labels.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in labels))
    return raw


def _samples(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(length, 6)).astype(np.float16)


SAMPLES = {(1, 1): _samples(120, 1), (2, 1): _samples(75, 2), (3, 2): _samples(60, 3)}
LABELS: Labels = [(1, 1, 5, 11, 60), (1, 1, 7, 61, 120), (3, 2, 1, 1, 60), (2, 1, 12, 7, 8)]


def test_a_small_archive(tmp_path: Path) -> None:
    raw = write_archive(tmp_path, SAMPLES, LABELS)
    done = convert_hapt(raw, tmp_path / "out")
    assert (done.recordings, done.segments) == (3, 4)
    assert done.hours == pytest.approx((120 + 75 + 60) / 50 / 3600)
    document = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert document["classes"] == list(CLASSES)
    assert list(document["database"]) == ["hapt_u01_e01", "hapt_u01_e02", "hapt_u02_e03"]
    entry = document["database"]["hapt_u01_e01"]
    assert entry["annotations"][0] == {
        "segment": [0.2, 1.2],  # rows 11 to 60 from 1, inclusive, are frames 10 to 60 from 0, half-open
        "segment(frames)": [10, 60],
        "label": "STANDING",
        "label_id": 4,
    }
    assert (entry["subset"], entry["duration"], entry["subject"]) == ("train", 2.4, "u01")
    assert document["database"]["hapt_u02_e03"]["subset"] == "test"
    for (experiment, user), values in SAMPLES.items():
        array = np.load(tmp_path / "out" / "data" / f"hapt_u{user:02d}_e{experiment:02d}.npy")
        assert array.dtype == np.float16
        np.testing.assert_array_equal(array, values)
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "Neurocomputing 171 (2016) 754-767" in readme
    assert "forbids commercial use" in readme
    assert check_data(tmp_path / "out" / "annotations.json", tmp_path / "out").errors == ()


def test_the_folder_above_rawdata_will_do(tmp_path: Path) -> None:
    write_archive(tmp_path / "HAPT", SAMPLES, LABELS)
    assert convert_hapt(tmp_path / "HAPT", tmp_path / "out").recordings == 3


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ((1, 1, 5, 100, 121), "STANDING from sample 100 to 121 does not lie in its 120 samples"),
        ((1, 1, 5, 0, 3), "from sample 0 to 3"),
        ((1, 1, 13, 1, 3), "activity 13, expected 1 to 12"),
        ((1, 7, 1, 1, 3), "no files of experiment 1 of user 7"),
    ],
)
def test_labels_that_do_not_fit(tmp_path: Path, label: tuple[int, int, int, int, int], message: str) -> None:
    raw = write_archive(tmp_path, SAMPLES, [*LABELS, label])
    with pytest.raises(DataError) as problem:
        convert_hapt(raw, tmp_path / "out")
    assert message in str(problem.value)
    assert not (tmp_path / "out").exists()


def test_an_archive_that_is_not_whole(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no labels\.txt"):
        convert_hapt(tmp_path, tmp_path / "out")
    raw = write_archive(tmp_path, SAMPLES, LABELS)
    gyro = raw / "gyro_exp01_user01.txt"
    text = gyro.read_text()
    gyro.write_text(text + "1 2 3\n")
    with pytest.raises(DataError, match="120 rows of acceleration, 121 of gyroscope"):
        convert_hapt(raw, tmp_path / "out")
    gyro.write_text(text + "1 two 3\n")
    with pytest.raises(DataError, match="not readable as rows of numbers"):
        convert_hapt(raw, tmp_path / "out")
    gyro.unlink()
    with pytest.raises(DataError, match=r"missing gyro_exp01_user01\.txt"):
        convert_hapt(raw, tmp_path / "out")


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    raw = write_archive(tmp_path, SAMPLES, LABELS)
    convert_hapt(raw, tmp_path / "out")
    with pytest.raises(DataError, match="choose another folder"):
        convert_hapt(raw, tmp_path / "out")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared HAPT recordings: $ONSET_DATA/hapt, or unpacked from hapt.tar.xz there or in shared/data."""
    places = [Path(os.environ["ONSET_DATA"])] if "ONSET_DATA" in os.environ else []
    for place in [*places, ROOT.parent / "shared" / "data"]:
        if (place / "hapt" / "annotations.json").is_file():
            return place / "hapt"
        if (place / "hapt.tar.xz").is_file():
            folder = tmp_path_factory.mktemp("shared")
            with tarfile.open(place / "hapt.tar.xz") as archive:
                archive.extractall(folder, filter="data")
            return next(folder.rglob("annotations.json")).parent
    pytest.skip("no HAPT recordings: run with ONSET_DATA=FOLDER, the folder that holds hapt/ or hapt.tar.xz")


def test_the_shared_data_comes_back_from_the_archives_layout(shared: Path, tmp_path: Path) -> None:
    expected: dict[str, Any] = json.loads((shared / "annotations.json").read_text())
    # Four subjects of both subsets: enough text to parse; the annotations of all are compared below.
    users = ("u01", "u02", "u10", "u30")
    samples, labels, database = {}, [], {}
    for name, entry in expected["database"].items():
        experiment, user = int(name[-2:]), int(entry["subject"][1:])
        if entry["subject"] in users:
            samples[experiment, user] = np.load(find_recording(shared, name))
            database[name] = entry
            labels += [
                (
                    experiment,
                    user,
                    item["label_id"] + 1,
                    item["segment(frames)"][0] + 1,
                    item["segment(frames)"][1],
                )
                for item in entry["annotations"]
            ]
    convert_hapt(write_archive(tmp_path, samples, labels), tmp_path / "out")

    text = (tmp_path / "out" / "annotations.json").read_text()
    assert text == json.dumps(expected | {"database": database}, indent=1)
    for name in database:
        mine, theirs = tmp_path / "out" / "data" / f"{name}.npy", find_recording(shared, name)
        assert mine.read_bytes() == theirs.read_bytes()


def test_the_annotations_of_all_the_shared_data_come_back(shared: Path, tmp_path: Path) -> None:
    expected = (shared / "annotations.json").read_text()
    samples, labels = {}, []
    for name, entry in json.loads(expected)["database"].items():
        experiment, user = int(name[-2:]), int(entry["subject"][1:])
        samples[experiment, user] = entry["num_frames"]
        labels += [
            (
                experiment,
                user,
                item["label_id"] + 1,
                item["segment(frames)"][0] + 1,
                item["segment(frames)"][1],
            )
            for item in entry["annotations"]
        ]
    raw = write_archive(tmp_path, {}, labels)
    for (experiment, user), length in samples.items():
        for kind in ("acc", "gyro"):
            (raw / f"{kind}_exp{experiment:02d}_user{user:02d}.txt").write_text("0 0 1\n" * length)
    convert_hapt(raw, tmp_path / "out")
    assert (tmp_path / "out" / "annotations.json").read_text() == expected
    assert len(read_annotations(tmp_path / "out" / "annotations.json").subset("test")) == 19
