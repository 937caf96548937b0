"""The oracle of OnsetNMS: ActionFormer's own numbers, the runtime's decoder, and what its memory means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine import EngineError
from engine.nms_reference import Kept, NmsSettings, exponential, keep, probability
from engine.suppression import vote
from stream.decoder import decode
from tests.engine.nms_library import assert_equal, random_cases

GOLDEN = Path(__file__).parents[1] / "golden"
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "nms.json").read_text())
Floats = NDArray[np.float32]


def one(*spans: tuple[float, float, float], memory: Floats | None = None, **said: Any) -> Kept:
    """Offline, one stream of one class: spans are (start, end, score)."""
    start, end, score = np.array(spans, np.float32).reshape(-1, 3).T
    if memory is None:
        memory = np.zeros((1, 1), np.float32)
    return keep(score[None, :, None], np.stack([start, end], 1)[None], memory, NmsSettings(hop=0, **said))


def online(
    logits: list[list[float]], offsets: list[list[float]], memory: Floats, hop: int = 10, **said: Any
) -> Kept:
    """One chunk of one stream: logits [N][K], offsets [N][2]."""
    arrays = (np.array([values], np.float32) for values in (logits, offsets))
    return keep(*arrays, memory, NmsSettings(hop=hop, **said))


def inverse(length: float) -> float:
    """What softplus makes `length` of."""
    return float(np.log(np.expm1(length)))


# ------------------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_official_suppression(case: str) -> None:
    said = CASES[case]
    with np.load(GOLDEN / "nms.npz") as arrays:
        segments, scores, labels = (arrays[f"{case}_{name}_in"] for name in ("segments", "scores", "labels"))
        expected = [arrays[f"{case}_{name}"] for name in ("segments", "scores", "labels")]
    columns = labels if said["multiclass"] else np.zeros_like(labels)
    table = np.zeros((1, len(scores), columns.max() + 1), np.float32)
    table[0, np.arange(len(scores)), columns] = scores
    found = keep(
        table,
        segments[None],
        np.zeros((1, 1), np.float32),
        NmsSettings(
            hop=0,
            score_threshold=0.0,
            min_score=said["min_score"],
            method="soft" if said["use_soft_nms"] else "hard",
            iou_threshold=said["iou_threshold"],
            sigma=said["sigma"],
            top_k=5000,
            max_segments=said["max_seg_num"],
        ),
    )
    number = int(found.number[0])
    kept, kept_labels = found.segments[0, :number], found.labels[0, :number]
    if not said["multiclass"] and said["voting_thresh"]:
        kept = vote(kept, segments, scores, said["voting_thresh"])
    assert number == len(expected[1])
    np.testing.assert_allclose(found.scores[0, :number], expected[1], rtol=0, atol=1e-5)
    same = (np.abs(kept[:, None] - expected[0]) <= 1e-4).all(axis=2)
    same &= np.abs(found.scores[0, :number, None] - expected[1]) <= 1e-5
    if said["multiclass"]:
        same &= kept_labels[:, None] == expected[2]
    assert same.any(axis=0).all()
    assert same.any(axis=1).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 4, 50]), st.sampled_from([0, 3, 10**4]))
def test_reads_moments_as_the_decoder_of_the_runtime_does(seed: int, hop: int, age: int) -> None:
    """Within a sample and 1e-4, since here it is single precision that is rounded."""
    rng, frames, classes = np.random.default_rng(seed), 4, 3
    logits = rng.normal(0, 3, (frames, classes)).astype(np.float32)
    offsets = rng.normal(0, 2, (frames, 2)).astype(np.float32)
    outputs = dict.fromkeys(("ongoing", "start", "end"), logits)
    outputs |= {"start_offset": offsets[:, :1], "end_offsets": offsets}
    decoded = decode(outputs, age, 0, hop)
    for frame in range(frames):
        alone = np.full_like(logits, -np.inf)
        alone[frame] = logits[frame]
        found = keep(
            alone[None],
            offsets[None],
            np.array([[age]], np.float32),
            NmsSettings(hop=hop, score_threshold=0.0, min_score=0.0),
        )
        number, now = int(found.number[0]), age + frames * hop
        assert set(np.flatnonzero(decoded.end[frame] > 1.5e-4)) <= set(found.labels[0, :number])
        for label, score, (start, end) in zip(
            *(column[0, :number] for column in (found.labels, found.scores, found.segments)), strict=True
        ):
            assert abs(score - decoded.end[frame, label]) <= 1.001e-4
            assert abs(start + now - decoded.end_from[frame]) <= 1
            assert abs(end + now - decoded.end_at[frame]) <= 1


def test_its_exponential_is_as_good_as_single_precision_goes() -> None:
    x = np.linspace(-87, 88, 100_001, dtype=np.float32)
    found = np.empty_like(x)
    exponential(x, found)
    np.testing.assert_allclose(found, np.exp(x.astype(np.float64)), rtol=3e-7)
    low, zero = np.array([-1e9, -np.inf, 0], np.float32), np.empty(3, np.float32)
    exponential(low, zero)
    assert (zero[:2] < 1e-37).all()
    assert zero[2] == 1


def test_probabilities_come_in_steps() -> None:
    x = np.array([-np.inf, -1e30, -10, -9, 0, 2, 60, np.inf, np.nan], np.float32)
    expected = np.array([0, 0, 0, 1e-4, 0.5, 0.8808, 1, 1, 0], np.float32)
    np.testing.assert_array_equal(probability(x), expected)


# ------------------------------------------------------------------------------------------------- candidates


def test_of_equal_scores_the_lower_class_and_then_the_earlier_moment_stays() -> None:
    scores = np.full((1, 4, 3), 0.5, np.float32)
    spans = np.array([[[i * 10, i * 10 + 5] for i in range(4)]], np.float32)
    found = keep(scores, spans, np.zeros((1, 1), np.float32), NmsSettings(hop=0, top_k=6, max_segments=5))
    assert found.labels[0].tolist() == [0, 0, 0, 0, 1]
    assert found.segments[0, :, 0].tolist() == [0, 10, 20, 30, 0]


def test_what_has_no_finite_or_no_long_enough_segment_is_no_candidate() -> None:
    found = one(
        (0, 5, 0.9), (9, 8, 0.9), (20, np.inf, 0.9), (np.nan, 40, 0.9), (-3e38, 3e38, 0.9), (50, 54, 0.9),
        min_length=5,
    )  # fmt: skip
    assert found.number.tolist() == [1]
    assert found.segments[0, :2].tolist() == [[0, 5], [0, 0]]
    assert found.labels[0, :2].tolist() == [0, -1]


def test_what_is_no_score_is_no_candidate() -> None:
    found = one((0, 1, np.nan), (5, 6, np.inf), (9, 10, -1), (12, 13, 0), (15, 16, 0.3), score_threshold=0.0)
    assert found.segments[0, : found.number[0]].tolist() == [[15, 16]]


def test_half_precision_counts_as_what_it_widens_to() -> None:
    for case in random_cases(5, 40):
        wide = [array.astype(np.float32) for array in case[:2]]
        assert_equal(keep(*case[:3], case.settings), keep(*wide, case.memory, case.settings))


def test_a_stream_does_not_depend_on_its_companions() -> None:
    for case in random_cases(3, 60):
        together = keep(*case[:3], case.settings)
        for row in range(len(case.scores)):
            alone = keep(*(array[row : row + 1] for array in case[:3]), case.settings)
            assert_equal(alone, Kept(*(column[row : row + 1] for column in together)))


@pytest.mark.parametrize(
    "shapes",
    [
        ((1, 2), (1, 2, 2), (1, 1)),
        ((1, 0, 2), (1, 0, 2), (1, 1)),
        ((1, 3, 2), (1, 2, 2), (1, 1)),
        ((1, 3, 2), (1, 3, 2), (2, 1)),
        ((1, 3, 2), (1, 3, 2), (1, 3)),
        ((1, 3, 2), (1, 3, 2), (1, 0)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(EngineError, match="do not fit"):
        keep(*(np.zeros(shape, np.float32) for shape in shapes), NmsSettings(hop=0))


def test_a_chunk_of_more_samples_than_single_precision_counts_is_refused() -> None:
    arrays = (np.zeros(shape, np.float32) for shape in ((1, 257, 1), (1, 257, 2), (1, 1)))
    with pytest.raises(EngineError, match="up to 2"):
        keep(*arrays, NmsSettings(hop=2**16))


# ----------------------------------------------------------------------------------------------------- memory


def test_what_was_emitted_suppresses_what_comes() -> None:
    memory = np.array([[1000, *[0] * 6]], np.float32)
    first = online([[1.0, -9.0]], [[inverse(2), np.log(3)]], memory, method="hard")
    assert first.segments[0, 0].tolist() == [-50, -20]
    assert first.memory[0].tolist() == [1010, -50, -20, 1, 0, 0, 0]
    again = [[inverse(3), np.log(3)]]  # the same segment, ten samples later, and with a better score
    assert online([[9.0, -9.0]], again, first.memory, method="hard").number[0] == 0
    other = online([[-9.0, 9.0]], again, first.memory, method="hard")
    assert other.memory[0].tolist() == [1020, -60, -30, 2, -60, -30, 1]
    soft = online([[9.0, -9.0]], again, first.memory, method="soft")
    assert soft.scores[0, 0] == pytest.approx(np.exp(-1 / 0.5), abs=1e-3)


def test_what_comes_never_suppresses_what_was_emitted() -> None:
    memory = np.array([[500, -30, -20, 1, 0, 0, 0]], np.float32)
    found = online([[9.0]], [[inverse(0.5), np.log(30)]], memory, method="hard", iou_threshold=0.5)
    assert found.number[0] == 1
    assert found.memory[0].tolist() == [510, *found.segments[0, 0], 1, -40, -30, 1]


def test_the_memory_keeps_the_newest_and_forgets_what_is_out_of_reach() -> None:
    memory = np.array([[2**24 - 5, 5 - 2**24, -90, 1, 0, 0, 0, 10 - 2**24, -80, 1]], np.float32)
    found = online([[-20.0]], [[0.0, 0.0]], memory)
    assert found.memory[0].tolist() == [2**24, -(2**24), -90, 1, *[0] * 6]
    spans = [(0.0, 5.0, 0.9), (10.0, 15.0, 0.8), (20.0, 25.0, 0.7)]
    full = one(*spans, memory=np.array([[0, 90, 95, 1, 80, 85, 1]], np.float32))
    assert full.memory[0].tolist() == [0, 0, 5, 1, 10, 15, 1]
    half = one(spans[0], memory=np.array([[0, 90, 95, 1, 80, 85, 1]], np.float32))
    assert half.memory[0].tolist() == [0, 0, 5, 1, 90, 95, 1]


def test_zeros_are_a_new_stream_whose_past_is_empty() -> None:
    found = online([[-9.0], [9.0]], [[0, 0], [0.0, 9.0]], np.zeros((1, 4), np.float32))
    assert found.segments[0, 0].tolist() == [-20, -7]  # it began with these two frames of ten samples
    assert found.memory[0].tolist() == [20, -20, -7, 1]
