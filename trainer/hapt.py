"""UCI's HAPT archive (dataset 341, waist-worn phones) into recordings and annotations.

The archive's `RawData` holds, for each experiment, `acc_expEE_userUU.txt` (g, gravity included) and
`gyro_expEE_userUU.txt` (rad/s), 50 Hz, three columns, and one `labels.txt` whose rows are experiment, user,
activity (1 to 12), first and last sample, counted from 1, the last one included.

Cite: Reyes-Ortiz, Oneto, Sama, Parra, Anguita. Transition-Aware Human Activity Recognition Using Smartphones.
Neurocomputing 171 (2016) 754-767. The archive's own terms: as is, citation required, no commercial use.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import DataError

RATE = 50.0
CLASSES = (
    "WALKING",
    "WALKING_UPSTAIRS",
    "WALKING_DOWNSTAIRS",
    "SITTING",
    "STANDING",
    "LAYING",
    "STAND_TO_SIT",
    "SIT_TO_STAND",
    "SIT_TO_LIE",
    "LIE_TO_SIT",
    "STAND_TO_LIE",
    "LIE_TO_STAND",
)
CHANNELS = ("acc_x_g", "acc_y_g", "acc_z_g", "gyro_x_rad_s", "gyro_y_rad_s", "gyro_z_rad_s")
# The archive's own split (its `Test/subject_id_test.txt`).
TEST_USERS = frozenset({2, 4, 9, 10, 12, 13, 18, 20, 24})
NOTICE = (
    "HAPT is distributed as is; any use must cite Reyes-Ortiz et al., Neurocomputing 171 (2016) 754-767, "
    "and its README forbids commercial use."
)
_VERSION = "HAPT-2.1-raw"
# The longest of the archive's text files has 2 MB.
_MAX_TEXT_BYTES = 256 * 1024**2
_FILE = re.compile(r"(acc|gyro)_exp(\d+)_user(\d+)\.txt")

_README = f"""# HAPT, continuous: waist-worn phone, 50 Hz, 12 activities and postural transitions
Origin: UCI dataset 341, "Smartphone-Based Recognition of Human Activities and Postural Transitions", RawData.
Licence: {NOTICE}
Conversion (`onset data hapt`): data/hapt_uUU_eEE.npy, float16 [T, 6]: acceleration x, y, z in g, gravity
included, then angular velocity x, y, z in rad/s; no filtering. A row s, e of labels.txt (from 1, inclusive)
is `segment(frames)` [s - 1, e) from 0, half-open; `segment` is in seconds.
Split: the archive's own, by subject: test = users {", ".join(map(str, sorted(TEST_USERS)))}.
"""


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written: recordings, annotated segments, hours."""

    recordings: int
    segments: int
    hours: float


def convert_hapt(raw: Path, output: Path) -> Converted:
    """Convert the archive's `RawData` folder (or the folder that holds it) into `output`.

    Writes `annotations.json`, `data/*.npy` (float16 [T, 6]) and `README.md`. Raises DataError, before
    anything is written, with what is missing or does not fit; and when `output` holds annotations already.
    """
    if not (raw / "labels.txt").is_file() and (raw / "RawData" / "labels.txt").is_file():
        raw = raw / "RawData"
    if not (raw / "labels.txt").is_file():
        raise DataError(f"{raw}: no labels.txt; expected the folder RawData of the unpacked HAPT archive")
    if (output / "annotations.json").exists():
        raise DataError(f"{output}: holds annotations.json already; choose another folder, or remove it")
    files = _files(raw)
    labels = _labels(raw / "labels.txt", files)

    problems: list[str] = []
    recordings: dict[tuple[int, int], NDArray[np.float16]] = {}
    for key, pair in files.items():
        halves = [_sensor(pair[kind]) for kind in ("acc", "gyro")]
        if len(halves[0]) != len(halves[1]):
            problems.append(
                f"experiment {key[0]}: {len(halves[0])} rows of acceleration, {len(halves[1])} of gyroscope"
            )
            continue
        recordings[key] = np.concatenate(halves, axis=1).astype(np.float16)
        for activity, start, end in labels.get(key, []):
            if not 1 <= start <= end <= len(halves[0]):
                problems.append(
                    f"experiment {key[0]}: {CLASSES[activity - 1]} from sample {start} to {end} does not lie "
                    f"in its {len(halves[0])} samples"
                )
    if problems:
        raise DataError(f"{raw}: " + "; ".join(problems[:20]))
    return _write(recordings, labels, output)


def _files(raw: Path) -> dict[tuple[int, int], dict[str, Path]]:
    """The two files of each (experiment, user), by user, then experiment."""
    found: dict[tuple[int, int], dict[str, Path]] = {}
    for path in sorted(raw.iterdir()):
        match = _FILE.fullmatch(path.name)
        if match:
            found.setdefault((int(match[2]), int(match[3])), {})[match[1]] = path
    lonely = [
        f"{kind}_exp{experiment:02d}_user{user:02d}.txt"
        for (experiment, user), pair in found.items()
        for kind in ("acc", "gyro")
        if kind not in pair
    ]
    if lonely or not found:
        missing = ", ".join(lonely[:8]) or "acc_expEE_userUU.txt and gyro_expEE_userUU.txt"
        raise DataError(f"{raw}: missing {missing}; is the archive unpacked as a whole?")
    return dict(sorted(found.items(), key=lambda item: (item[0][1], item[0][0])))


def _labels(
    path: Path, files: dict[tuple[int, int], dict[str, Path]]
) -> dict[tuple[int, int], list[tuple[int, int, int]]]:
    """(activity, first, last) of each (experiment, user), by time."""
    rows = _numbers(path)
    if rows.shape[1] != 5:
        raise DataError(f"{path}: {rows.shape[1]} columns, expected experiment, user, activity, start, end")
    if not np.array_equal(rows, np.round(rows)):
        raise DataError(f"{path}: expected whole numbers only")
    labels: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for number, (experiment, user, activity, start, end) in enumerate(
        rows.astype(np.int64).tolist(), start=1
    ):
        if not 1 <= activity <= len(CLASSES):
            raise DataError(f"{path}:{number}: activity {activity}, expected 1 to {len(CLASSES)}")
        if (experiment, user) not in files:
            raise DataError(f"{path}:{number}: no files of experiment {experiment} of user {user}")
        labels.setdefault((experiment, user), []).append((activity, start, end))
    return {key: sorted(found, key=lambda row: row[1:]) for key, found in labels.items()}


def _sensor(path: Path) -> NDArray[np.float64]:
    values = _numbers(path)
    if values.shape[1] != 3:
        raise DataError(f"{path}: {values.shape[1]} columns, expected x, y, z")
    return values


def _numbers(path: Path) -> NDArray[np.float64]:
    try:
        if path.stat().st_size > _MAX_TEXT_BYTES:
            raise DataError(f"{path}: larger than {_MAX_TEXT_BYTES} bytes; this is no file of the archive")
        values = np.loadtxt(path, dtype=np.float64, ndmin=2, comments=None, encoding="utf-8")
    except (OSError, ValueError) as problem:
        raise DataError(f"{path}: not readable as rows of numbers: {problem}") from None
    if not len(values) or not np.isfinite(values).all():
        raise DataError(f"{path}: empty, or holds NaN or Inf; expected rows of finite numbers")
    return values


def _write(
    recordings: dict[tuple[int, int], NDArray[np.float16]],
    labels: dict[tuple[int, int], list[tuple[int, int, int]]],
    output: Path,
) -> Converted:
    (output / "data").mkdir(parents=True, exist_ok=True)
    database: dict[str, Any] = {}
    for (experiment, user), samples in recordings.items():
        name = f"hapt_u{user:02d}_e{experiment:02d}"
        np.save(output / "data" / f"{name}.npy", samples, allow_pickle=False)
        database[name] = {
            "subset": "test" if user in TEST_USERS else "train",
            "duration": _seconds(len(samples)),
            "fps": RATE,
            "num_frames": len(samples),
            "subject": f"u{user:02d}",
            "annotations": [
                {
                    "segment": [_seconds(start - 1), _seconds(end)],
                    "segment(frames)": [start - 1, end],
                    "label": CLASSES[activity - 1],
                    "label_id": activity - 1,
                }
                for activity, start, end in labels.get((experiment, user), [])
            ],
        }
    document = {"version": _VERSION, "classes": CLASSES, "channels": CHANNELS, "database": database}
    (output / "README.md").write_text(_README, encoding="utf-8")
    # Last, so that a folder with annotations is a whole one.
    (output / "annotations.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    return Converted(
        recordings=len(recordings),
        segments=sum(len(found) for found in labels.values()),
        hours=sum(len(samples) for samples in recordings.values()) / RATE / 3600,
    )


def _seconds(samples: int) -> float:
    return round(samples / RATE, 6)
