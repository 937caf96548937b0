"""Timelines: a picture of bounded size, of the streams that were asked for, in colours one can tell."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError, DataError
from stream.events import Event
from trainer import plotting
from trainer.annotations import Annotations, Recording, Segment
from trainer.plotting import PALETTE, plot

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'onset[plot]'")

TRUTH = Annotations(
    ("rest", "wave$_{", "never"),
    (Recording("s2", "test", 20.0, (Segment(1, 9, "rest"), Segment(9, 12, "wave$_{"))),),
)


def _events(folder: Path, streams: int) -> Path:
    lines = []
    for number in range(1, streams + 1):
        name = f"s{number}"
        common = {"stream": name, "epoch": 0, "bundle": "b"}
        lines += [
            Event("action.started", time=1.5, instance_id="1", label="rest", start=1.0, score=0.9, **common),
            Event(
                "action.started", time=8.0, instance_id="2", label="wave$_{", start=7.5, score=0.9, **common
            ),
            Event(
                "action.ended", time=10, instance_id="1", label="rest", start=1, end=9, score=0.9, **common
            ),
            Event("action.aborted", time=14.0, instance_id="2", label="wave$_{", start=7.5, **common),
            Event(
                "action.started", time=16.0, instance_id="3", label="rest", start=15.0, score=0.9, **common
            ),
            Event("stream.ended", time=20.0, **common),
        ]
    path = folder / "events.jsonl"
    path.write_text("".join(line.to_json() + "\n" for line in lines))
    return path


def _size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def test_a_picture_of_events_and_truth(tmp_path: Path) -> None:
    from matplotlib.image import imread

    result = plot(_events(tmp_path, 3), tmp_path / "t.png", TRUTH)
    assert result.streams == ("s2", "s1", "s3")  # the annotated one first
    assert result.left_out == 0
    pixels = imread(tmp_path / "t.png")[..., :3]
    for place in (0, 1):  # both classes are there, in their colours
        colour = [int(PALETTE[place][at : at + 2], 16) / 255 for at in (1, 3, 5)]
        assert (np.abs(pixels - colour).max(axis=-1) < 0.01).sum() > 500
    colour = [int(PALETTE[2][at : at + 2], 16) / 255 for at in (1, 3, 5)]
    assert (np.abs(pixels - colour).max(axis=-1) < 0.01).sum() == 0  # `never` is not even in the legend


def test_the_same_events_give_the_same_picture(tmp_path: Path) -> None:
    events = _events(tmp_path, 2)
    for name in ("a.png", "b.png"):
        plot(events, tmp_path / name, TRUTH)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_number_of_streams_is_bounded_and_can_be_chosen(tmp_path: Path) -> None:
    events = _events(tmp_path, 60)
    result = plot(events, tmp_path / "t.png")
    assert (len(result.streams), result.left_out) == (plotting.DEFAULT_STREAMS, 54)
    width, height = _size(tmp_path / "t.png")
    assert width == 1800
    assert height < 1000
    assert plot(events, tmp_path / "t.png", streams=["s9", "s3"]).streams == ("s9", "s3")
    with pytest.raises(ConfigError, match="expected 1 to 40"):
        plot(events, tmp_path / "t.png", limit=60)
    with pytest.raises(ConfigError, match="at most 40"):
        plot(events, tmp_path / "t.png", streams=[f"s{number}" for number in range(1, 61)])
    with pytest.raises(DataError, match=r"no stream `s99`"):
        plot(events, tmp_path / "t.png", streams=["s99"])


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_forms_of_output(tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"t{suffix}"
    plot(_events(tmp_path, 1), output, window=(3.0, 10.0))
    assert output.stat().st_size > 1000


def test_results_can_be_drawn_too(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"results": {"s2": [{"segment": [0, 5000], "label": "rest", "score": 1}]}}))
    assert plot(path, tmp_path / "t.png", TRUTH).streams == ("s2",)


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    events = _events(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"ends in \.png"):
        plot(events, tmp_path / "t.jpg")
    with pytest.raises(ConfigError, match="is empty"):
        plot(events, tmp_path / "t.png", window=(5.0, 5.0))
    with pytest.raises(ConfigError, match="cannot be written"):
        plot(events, tmp_path / "gone" / "t.png")
    events.write_text("")
    with pytest.raises(DataError, match="holds no events"):
        plot(events, tmp_path / "t.png")


def test_matplotlib_is_not_imported_before_something_is_drawn() -> None:
    code = "import sys, trainer.plotting, trainer.scoring; assert 'matplotlib' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_sixteen_classes_are_told_apart() -> None:
    colours = plotting._colours([f"c{number}" for number in range(40)])
    assert len(set(colours.values())) == 40
    first = list(colours.values())[: len(PALETTE)]
    for one, other in itertools.combinations(first, 2):
        assert sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5 > 0.15


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), max_size=30))
def test_bars_of_one_row_overlap_by_less_than_half(spans: list[tuple[int, int]]) -> None:
    bars = [plotting._Bar(float(start), float(start + length), "a") for start, length in spans]
    rows, counts = plotting._rows(bars)
    assert all(0 <= row < count <= plotting.MAX_ROWS for row, count in zip(rows, counts, strict=True))
    for (one, row), (other, other_row) in itertools.combinations(zip(bars, rows, strict=True), 2):
        shared = min(one.end, other.end) - max(one.start, other.start)
        if row == other_row < plotting.MAX_ROWS - 1:  # the last row takes what is left
            assert shared <= min(one.end - one.start, other.end - other.start) / 2 or shared <= 0
