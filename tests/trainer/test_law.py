"""The law in torch: however a stream is cut into chunks, the step says what the whole sequence says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import random_detector
from trainer.blocks import Dropout
from trainer.detector import OUTPUTS, Detector, DetectorShape
from trainer.pyramid import PyramidShape


@st.composite
def shapes(draw: st.DrawFn) -> DetectorShape:
    """Random configurations: levels, windows, chunks, fronts, position biases."""
    heads = draw(st.sampled_from([1, 2, 4]))
    pyramid = PyramidShape(
        width=heads * draw(st.sampled_from([4, 6])),
        heads=heads,
        window=draw(st.integers(1, 20)),
        levels=draw(st.integers(1, 6)),
        stem=draw(st.integers(0, 2)),
        embed=draw(st.integers(0, 2)),
        expansion=2,
        chunk=draw(st.sampled_from([1, 2, 4, 8, 16])),
        relative=draw(st.booleans()),
    )
    return DetectorShape(
        channels=draw(st.integers(1, 5)),
        classes=draw(st.integers(1, 4)),
        pyramid=pyramid,
        hop=(hop := draw(st.sampled_from([0, 1, 4, 6, 10]))),
        stem_width=8,
        beats=draw(st.sampled_from([0, 0, 1, 3])) if hop else 0,
        sample_rate=draw(st.sampled_from([15.0, 50.0])),
    )


def stream_of(detector: Detector, frames: int, batch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(
        batch, frames * detector.hop, detector.shape.channels, generator=generator, dtype=torch.float64
    )
    mask = (torch.rand(batch, frames, generator=generator) > 0.1).double()
    return samples, mask


def step_through(detector: Detector, samples: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    chunk, hop = detector.chunk, detector.hop
    state = detector.zero_state(samples.shape[0])
    sizes = {name: value.shape for name, value in state.items()}
    parts = []
    for first in range(0, mask.shape[1], chunk):
        outputs, state = detector.step(
            samples[:, first * hop : (first + chunk) * hop], mask[:, first : first + chunk], state
        )
        assert {name: value.shape for name, value in state.items()} == sizes, "the state's size is constant"
        parts.append(outputs)
    return {name: torch.cat([part[name] for part in parts], dim=1) for name in OUTPUTS}


@torch.no_grad()
@settings(max_examples=60, deadline=None)
@given(
    shape=shapes(), seed=st.integers(0, 2**31), chunks=st.integers(1, 40), batch=st.integers(1, 3),
    smaller=st.sampled_from([0, 0, 1, 2]),
)  # fmt: skip
def test_steps_equal_the_whole_sequence(
    shape: DetectorShape, seed: int, chunks: int, batch: int, smaller: int
) -> None:
    detector = random_detector(shape, seed).double()
    detector.chunk = max(1, shape.pyramid.chunk >> smaller)  # as where one training serves several latencies
    samples, mask = stream_of(detector, chunks * detector.chunk, batch, seed)
    whole, steps = detector(samples, mask), step_through(detector, samples, mask)
    for name in OUTPUTS:
        torch.testing.assert_close(steps[name], whole[name], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_stream_of_more_than_ten_thousand_frames_keeps_to_the_law() -> None:
    shape = DetectorShape(3, 2, PyramidShape(8, 2, 7, 6, chunk=4, relative=True, expansion=2), hop=2)
    detector = random_detector(shape).double()
    samples, mask = stream_of(detector, 10_240, 1, 1)
    whole, steps = detector(samples, mask), step_through(detector, samples, mask)
    for name in OUTPUTS:
        torch.testing.assert_close(steps[name], whole[name], rtol=1e-9, atol=1e-9)


@torch.no_grad()
@settings(max_examples=30, deadline=None)
@given(shape=shapes(), seed=st.integers(0, 2**31), data=st.data())
def test_no_output_depends_on_what_comes_after_its_chunk(
    shape: DetectorShape, seed: int, data: st.DataObject
) -> None:
    detector = random_detector(shape, seed).double()
    chunk = shape.pyramid.chunk
    samples, mask = stream_of(detector, 12 * chunk, 1, seed)
    cut = data.draw(st.integers(1, 11)) * chunk
    changed = samples.clone()
    changed[:, cut * detector.hop :] += 3.0
    before, after = detector(samples, mask), detector(changed, mask)
    for name in OUTPUTS:
        torch.testing.assert_close(after[name][:, :cut], before[name][:, :cut], rtol=1e-9, atol=1e-9)
    assert (
        any(not torch.equal(after[n][:, cut:], before[n][:, cut:]) for n in OUTPUTS)
        or not mask[:, cut:].any()
        or shape.beats  # what came after may hold no beat
    )


@torch.no_grad()
@pytest.mark.parametrize(("hop", "beats"), [(0, 0), (4, 0), (4, 2)])
def test_what_missing_frames_hold_is_not_seen(hop: int, beats: int) -> None:
    shape = DetectorShape(
        3, 2, PyramidShape(8, 2, 5, 4, chunk=2, expansion=2), hop=hop, beats=beats, sample_rate=20.0
    )
    detector = random_detector(shape).double()
    samples, mask = stream_of(detector, 64, 1, 3)
    junk = samples + 100.0 * (1 - mask.repeat_interleave(detector.hop, dim=1))[..., None]
    whole, other = detector(samples, mask), detector(junk, mask)
    for name in OUTPUTS:
        torch.testing.assert_close(other[name], whole[name], rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("beats", [0, 2])
def test_the_receptive_field_is_all_that_a_state_remembers(beats: int) -> None:
    from trainer.export import receptive_field

    shape = DetectorShape(
        2, 2, PyramidShape(8, 2, 3, 3, chunk=2, expansion=2), hop=2, beats=beats, sample_rate=20.0
    )
    detector = random_detector(shape).double()
    reach = receptive_field(detector)
    samples, mask = stream_of(detector, 2 * reach, 1, 5)
    other = samples.clone()
    other[:, : reach * detector.hop] = 7.0
    a, b = detector(samples, mask), detector(other, mask)
    for name in OUTPUTS:
        torch.testing.assert_close(a[name][:, -1], b[name][:, -1], rtol=1e-9, atol=1e-9)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    x = torch.ones(64, 50, 33)
    dropout = Dropout(0.1)
    y = dropout(x)
    dropped = (y == 0).double()
    assert abs(float(dropped.mean()) - 26 / 256) < 0.005
    assert abs(float(y.double().mean()) - 1) < 0.005
    for place in range(8):  # each byte of a word as often as the others
        assert abs(float(dropped.flatten()[place::8].mean()) - 26 / 256) < 0.01
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
