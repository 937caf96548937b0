"""Thresholds for an operating point: what is promised of them holds, and the command line keeps it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import onset
from engine.errors import ConfigError, DataError
from engine.manifest import Decoding
from tests.trainer.synthetic import write_data_set
from trainer import calibration
from trainer.annotations import Annotations, Recording, Segment, read_annotations
from trainer.build import read_settings
from trainer.calibration import THRESHOLDS, Calibration, calibrate, in_use, with_thresholds
from trainer.config import Config, read_config
from trainer.online_training import train_online
from trainer.predictions import Detection, Predictions, Start

CHUNK = 0.4


@dataclass(frozen=True)
class Guess:
    """What a detector holds for possible: told early where its start is sure enough, else with its end."""

    start: float
    end: float
    right: bool
    delay: float = 0.5  # of an early announcement, seconds


def world(guesses: Sequence[Guess]) -> tuple[Annotations, Callable[[Decoding], Predictions]]:
    """Actions of 4 s, one every 10 s and one for each guess; a wrong guess lies between two of them."""
    actions = tuple(Segment(10.0 * k, 10.0 * k + 4.0, "a") for k in range(len(guesses)))
    truth = Annotations(("a",), (Recording("r", "train", 10.0 * len(guesses), actions),))

    def detect(decoding: Decoding) -> Predictions:
        start_threshold = max(decoding.start_threshold, decoding.gate)
        end_threshold = max(decoding.end_threshold, decoding.gate)
        segments, starts = [], []
        for number, guess in enumerate(guesses):
            begin = 10.0 * number + (0.0 if guess.right else 5.5)
            if guess.start >= start_threshold:
                waits = 0.0 if guess.start >= decoding.confident else decoding.hold
                emitted = begin + guess.delay + waits
            elif guess.end >= end_threshold:
                emitted = begin + 4.0
            else:
                continue
            length = 4.0 if guess.right else 2.0
            segments.append(Detection(begin, begin + length, "a", guess.end, str(number), begin + length))
            starts.append(Start(begin, "a", guess.start, str(number), emitted))
        return Predictions({"r": tuple(segments)}, {"r": tuple(starts)}, from_events=True)

    return truth, detect


def calibrated(
    guesses: Sequence[Guess], precision: float | None, decoding: Decoding | None = None
) -> Calibration:
    truth, detect = world(guesses)
    return calibrate(detect, truth, "holdout", decoding or Decoding(), precision, CHUNK)


scores = st.integers(1, 99).map(lambda percent: percent / 100)
guessed = st.lists(
    st.builds(Guess, scores, scores, st.booleans(), st.sampled_from([0.2, 0.5, 3.0])), min_size=1
)


@settings(max_examples=15, deadline=None)
@given(guesses=guessed, precision=st.sampled_from([0.0, 0.5, 0.8, 0.9, 1.0]))
def test_the_precision_is_reached_or_refused(guesses: list[Guess], precision: float) -> None:
    truth, detect = world(guesses)

    def right(decoding: Decoding) -> tuple[int, int]:
        found = [guesses[int(item.id or 0)].right for item in detect(decoding).segments["r"]]
        return sum(found), len(found)

    try:
        result = calibrate(detect, truth, "holdout", Decoding(), precision, CHUNK)
    except (ConfigError, DataError):
        for start in THRESHOLDS:
            for end in THRESHOLDS:
                hits, count = right(with_thresholds(Decoding(), start, end))
                assert not hits or hits / count < precision
        return
    hits, count = right(result.after.decoding)
    assert hits / count >= precision
    assert (result.after.precision, result.after.recall) == (hits / count, hits / len(guesses))
    assert result.after.start_precision >= precision
    assert result.after.decoding.gate <= result.after.decoding.start_threshold
    assert result.after.decoding.gate <= result.after.decoding.end_threshold


@settings(max_examples=5, deadline=None)
@given(guesses=guessed)
def test_f1_is_within_a_standard_error_of_the_best(guesses: list[Guess]) -> None:
    if not any(guess.right for guess in guesses):
        guesses = [*guesses, Guess(0.9, 0.9, True)]
    result = calibrated(guesses, None)
    best = max(result.before.f1, result.after.f1)
    assert result.after.f1 >= best - (best * (1 - best) / len(guesses)) ** 0.5
    assert result == calibrated(guesses, None), "the same again"


def test_the_middle_of_what_is_equal_is_taken_and_nothing_else_changes() -> None:
    """Starts from 0.15 to 0.5 are right, and ends from 0.15 on: they are not needed."""
    guesses = [Guess(0.5, 0.5, True)] * 12 + [Guess(0.1, 0.1, False)] * 6
    configured = Decoding(confident=0.4, hold=0.7, min_duration=0.2, max_duration=50)
    for precision in (None, 0.9, 1.0):
        result = calibrated(guesses, precision, configured)
        assert result.after.decoding == with_thresholds(configured, 0.3, 0.4)
        assert result.after.precision == 1.0
    assert (result.subset, result.recordings, result.actions) == ("holdout", 1, 18)


def test_what_waits_for_the_end_is_not_better_by_a_hair() -> None:
    """One start of thirty is wrong; announcing all of them at their ends instead would avoid it."""
    guesses = [Guess(0.45, 0.9, True)] * 29 + [Guess(0.45, 0.01, False)]
    for precision in (None, 0.9):
        result = calibrated(guesses, precision)
        assert result.after.decoding.start_threshold <= 0.4
        assert result.after.start_delay == pytest.approx(0.5)
    # Where that precision is asked for, there is no other way.
    result = calibrated(guesses, 1.0)
    assert result.after.decoding.start_threshold > 0.45
    assert result.after.start_delay == pytest.approx(4.0)


def test_the_gate_makes_way_for_lower_thresholds() -> None:
    guesses = [Guess(0.06, 0.06, True)] * 10
    result = calibrated(guesses, None, Decoding(gate=0.3, hold=0.0))
    assert result.before.recall == 0
    assert result.after.recall == 1
    assert result.after.decoding.gate <= 0.05


def test_waiting_is_cut_where_it_gains_nothing() -> None:
    """Every start waits for a second; to be confident of 0.2 is enough, and `hold` may stay."""
    guesses = [Guess(0.25, 0.25, True)] * 12 + [Guess(0.1, 0.1, False)] * 6
    result = calibrated(guesses, None, Decoding(confident=0.6, hold=1.0))
    assert result.after.start_delay == pytest.approx(0.5)
    assert result.after.decoding.confident <= 0.2
    assert result.after.decoding.hold == 1.0


def test_what_is_out_of_reach_is_said_with_what_is_not() -> None:
    guesses = [Guess(0.5, 0.5, True)] * 3 + [Guess(0.5, 0.5, False)]
    with pytest.raises(ConfigError, match=r"precision of 0\.9; the nearest has 0\.750 .*recall of 0\.750"):
        calibrated(guesses, 0.9)
    with pytest.raises(DataError, match="train longer"):
        calibrated([Guess(0.5, 0.5, False)] * 3, None)
    truth, detect = world([])
    with pytest.raises(DataError, match="`holdout`: no annotated action"):
        calibrate(detect, truth, "holdout", Decoding(), None, CHUNK)


def test_progress_ends_at_one_at_most() -> None:
    truth, detect = world([Guess(0.5, 0.5, True)] * 3)
    told: list[float] = []
    calibrate(detect, truth, "holdout", Decoding(), None, CHUNK, told.append)
    assert told == sorted(told)
    assert 0.95 < told[-1] <= 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that holds out r3 of six recordings, with thresholds that are far off."""
    folder = tmp_path_factory.mktemp("calibration")
    path = write_data_set(folder, steps=100)
    path.write_text(
        path.read_text().replace("recordings: data}", "recordings: data, holdout: [r3]}")
        + "decoding: {start_threshold: 0.9, end_threshold: 0.9, hold: 0.5}\n"
    )
    torch.set_num_threads(1)
    train_online(read_config(path), folder / "run")
    return folder / "run"


def test_recordings_that_are_in_use_are_counted(run: Path) -> None:
    config = read_settings(run / "config.yaml")
    assert isinstance(config, Config)
    annotations = read_annotations(config.data.annotations)
    recordings = {recording.name: recording for recording in annotations.recordings}
    assert in_use(annotations, config.data, [recordings["r3"]]) == {}
    assert in_use(annotations, config.data, list(recordings.values())) == {"train": 3, "test": 2}


Said = tuple[int, str, str]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def call(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["onset", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as done:
            onset.main()
        said = capfd.readouterr()
        return int(done.value.code or 0), said.out, said.err

    return call


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coarse grid, for what is not about the choice."""
    monkeypatch.setattr(calibration, "THRESHOLDS", (0.1, 0.4))
    monkeypatch.setattr(calibration, "CONFIDENT", (0.3,))


def test_calibrate_keeps_its_word(run: Path, tmp_path: Path, cli: Callable[..., Said]) -> None:
    """What is written is what was shown, and the network's own run over the same recordings confirms it."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    status, out, err = cli("calibrate", copy, "--precision", 0.7, "--json")
    assert status == 0, err
    assert "warning" not in err
    shown = Calibration.model_validate_json(out)
    assert (shown.subset, shown.recordings, shown.precision) == ("holdout", 1, 0.7)
    assert shown.after.recall > shown.before.recall
    assert shown.after.reaches(0.7)
    before, after = (read_settings(folder / "config.yaml") for folder in (run, copy))
    assert isinstance(before, Config)
    assert after == before.model_copy(update={"decoding": shown.after.decoding})

    status, out, err = cli("evaluate", copy, "--subset", "holdout", "--json")
    assert status == 0, err
    scores = json.loads(out)["default thresholds"]
    for key in ("precision", "recall", "f1"):
        assert scores["counts"][key] == getattr(shown.after, key)
    assert scores["start_delay"]["p50"] == shown.after.start_delay


@pytest.mark.usefixtures("few")
def test_a_dry_run_shows_and_writes_nothing(run: Path, cli: Callable[..., Said]) -> None:
    before = {path: path.read_bytes() for path in run.iterdir()}
    status, out, err = cli("calibrate", run, "--dry-run", "--f1")
    assert status == 0, err
    assert "holdout, highest F1" in out
    for title in ("before", "after", "precision", "recall", "start delay"):
        assert title in out
    assert "left as it was" in err
    assert {path: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.usefixtures("few")
def test_what_cannot_be_done_is_refused_and_changes_nothing(
    run: Path, tmp_path: Path, cli: Callable[..., Said]
) -> None:
    """A run without a holdout, whose test recordings are annotated wrongly but for one action."""
    copy, truth = tmp_path / "run", run.parent / "annotations.json"
    shutil.copytree(run, copy)
    document = json.loads(truth.read_text())
    for name, first in (("r4", 1), ("r5", 0)):
        for annotation in document["database"][name]["annotations"][first:]:
            annotation["segment"][1] = annotation["segment"][0] + 0.01
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    text = (run / "config.yaml").read_text().replace(str(truth), str(tmp_path / "annotations.json"))
    (copy / "config.yaml").write_text(text.replace("holdout:\n  - r3", "holdout: []"))
    before = (copy / "config.yaml").read_text()
    for words, sentences in (
        ((), ["ConfigError", "`data.holdout`", "--subset"]),
        (("--f1", "--precision", 0.9), ["give one of them"]),
        (
            ("--subset", "test", "--precision", 1.0, "--json"),
            ["2 of the 2 recordings of `test` are for testing", "no setting reaches a precision of 1;"],
        ),
    ):  # fmt: skip
        status, out, err = cli("calibrate", copy, *words)
        assert (status, out) == (2, ""), err
        for sentence in sentences:
            assert sentence in err
    assert (copy / "config.yaml").read_text() == before
