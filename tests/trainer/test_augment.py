"""Augmentation: labels stay on a signal that is warped, and what is off changes nothing."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from tests.trainer.synthetic import write_data_set
from trainer.config import AugmentConfig, Config, read_config
from trainer.data import (
    SPEEDS,
    Corpus,
    Sampler,
    Track,
    augment,
    channel_groups,
    load_corpus,
    resampled,
    triads_of,
)

PLAIN: dict[str, object] = {"noise": 0.0, "scale": 0.0, "shift": 0.0, "splice": 0.0, "drop": 0.0}
PLAIN |= {"rotate": 0.0, "warp": 0.0, "channel_drop": 0.0}
ROTATED: dict[str, object] = {"rotate": 15.0, "triads": ((0, 1, 2),)}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return read_config(write_data_set(tmp_path_factory.mktemp("synthetic"), steps=1))


@pytest.fixture(scope="module")
def corpus(config: Config) -> Corpus:
    return load_corpus(config.data, "train")


def sampler_of(corpus: Corpus, config: Config, hop: int, frames: int, **values: object) -> Sampler:
    """A sampler of crops of `frames` frames; `values` replace those of the configuration's `augment`."""
    changed = AugmentConfig.model_validate({**config.augment.model_dump(), **values})
    return Sampler(corpus, config.model_copy(update={"augment": changed}), hop, frames)


def timed(length: int, segments: list[list[float]] | None = None) -> Corpus:
    """One recording [length, 1] whose samples say when they are: the centres of their periods."""
    times = np.arange(length, dtype=np.float32)[:, None] + 0.5
    found = np.array(segments or [], np.float64).reshape(-1, 2)
    return Corpus((Track("timed", times, found, np.zeros(len(found), np.int64)),), ("a",), 25.0)


# Recorded before there was `warp` or `channel_drop`: the digest of eight crops in a row, and what the
# generator says after them. The data set and the crops are draws of NumPy's generators.
BEFORE: list[tuple[dict[str, object], int, str, int]] = [
    ({}, 64, "351f31a3dea96bc2", 2363810676),
    ({}, 400, "20322c3db6277e00", 2470173224),  # longer than the recordings: with masks
    (PLAIN, 64, "2ff57b86f9287f04", 4218807095),
    ({"splice": 0.99, "drop": 0.9}, 64, "6ef587bcfc1e7476", 1154032630),
    ({"splice": 0.99, "drop": 0.9}, 400, "0e7850f5f28fd26b", 3372734984),
    ({"rotate": 15.0}, 64, "351f31a3dea96bc2", 2363810676),  # without triads there is nothing to rotate
    # A matrix product's last bit is the processor's: of these, the masks and the targets alone.
    (ROTATED, 64, "2eb7f9d4e475c1b7", 729897852),
    (ROTATED, 400, "67f3de9c396a3473", 3864156146),
]


@pytest.mark.parametrize(("values", "frames", "digest", "after"), BEFORE)
def test_what_is_off_changes_no_bit(
    config: Config, corpus: Corpus, values: dict[str, object], frames: int, digest: str, after: int
) -> None:
    sampler = sampler_of(corpus, config, 5, frames, **values)
    generator, found = np.random.default_rng(11), hashlib.sha256()
    for _ in range(8):
        crop = sampler.draw(generator)
        found.update(crop.mask.tobytes())
        for field in dataclasses.fields(crop.targets):
            found.update(getattr(crop.targets, field.name).tobytes())
        if "triads" not in values:
            found.update(crop.samples.tobytes())
    assert found.hexdigest()[:16] == digest
    assert generator.integers(1 << 32) == after


@pytest.mark.parametrize("warp", [0.1, 3.0])
def test_labels_lie_on_a_warped_signal_whatever_was_spliced(
    config: Config, corpus: Corpus, warp: float
) -> None:
    sampler = sampler_of(corpus, config, 5, 64, warp=warp)
    agree = []
    for seed in range(20):
        crop = sampler.draw(np.random.default_rng(seed))
        np.testing.assert_array_equal(crop.samples, sampler.draw(np.random.default_rng(seed)).samples)
        level = crop.samples.reshape(64, 5, -1).mean(axis=1)
        there = crop.mask > 0
        agree.append(((level[there, :2] > 1.5) == (crop.targets.ongoing[there] > 0.5)).mean())
    assert np.mean(agree) > 0.95


def test_warped_labels_are_right_to_the_sample(config: Config) -> None:
    segments = [[100.25, 131.5], [300.5, 390.25], [700.75, 801.0]]
    sampler = sampler_of(timed(1000, segments), config, 1, 200, **{**PLAIN, "warp": 0.2})
    seen = 0
    for seed in range(200):
        crop = sampler.draw(np.random.default_rng(seed))
        assert crop.mask.all()
        time = crop.samples[:, 0].astype(np.float64)
        speed = (time[-2] - time[1]) / 197
        clear = np.abs(time[:, None] - np.array(segments).ravel()).min(axis=1) > 0.01
        there = np.any([(time >= first) & (time < last) for first, last in segments], axis=0)
        np.testing.assert_array_equal(crop.targets.ongoing[clear, 0] > 0, there[clear])
        # An offset looks back from the end of its frame, in frames: in the recording, `speed` times as far.
        known = np.flatnonzero(crop.targets.start_mask[1:-1]) + 1
        back = time[known] + (0.5 - crop.targets.start_offset[known]) * speed
        starts = np.array(segments)[:, 0]
        assert (np.abs(back[:, None] - starts).min(axis=1, initial=np.inf) < 0.01).all()
        ended = np.flatnonzero(crop.targets.end_mask[1:-1]) + 1
        pair = time[ended, None] + (0.5 - crop.targets.end_offsets[ended]) * speed
        assert (np.abs(pair[:, None] - np.array(segments)).max(axis=2).min(axis=1) < 0.01).all()
        seen += len(known) + len(ended)
    assert seen > 2500


def test_a_warped_piece_brings_no_segment_from_beyond_its_border(config: Config) -> None:
    """One that only began after the cut would be left with no length, and still be news."""
    segments = [[at, at + 9.5] for at in np.arange(3.25, 990, 20).tolist()]
    sampler = sampler_of(timed(1000, segments), config, 1, 200, **{**PLAIN, "warp": 0.3, "splice": 0.99})
    for seed in range(50):
        targets = sampler.draw(np.random.default_rng(seed)).targets
        length = (targets.end_offsets[:, 0] - targets.end_offsets[:, 1])[targets.end_mask > 0]
        assert (length > 1e-3).all()


def test_speeds_are_log_normal_and_clipped(config: Config) -> None:
    def speeds(warp: float) -> NDArray[np.float64]:
        sampler = sampler_of(timed(1000), config, 1, 20, **{**PLAIN, "warp": warp})
        generator = np.random.default_rng(3)
        crops = [sampler.draw(generator).samples[:, 0].astype(np.float64) for _ in range(400)]
        return np.array([(crop[-2] - crop[1]) / 17 for crop in crops])

    some = np.log(speeds(0.1))
    assert abs(some.mean()) < 0.02
    assert some.std() == pytest.approx(0.1, rel=0.15)
    wild = speeds(3.0)
    assert (wild.min(), wild.max()) == pytest.approx(SPEEDS, rel=1e-3)


@pytest.mark.parametrize("length", [1, 7, 90, 100, 139, 140])
def test_masks_say_where_a_warped_recording_ends(config: Config, length: int) -> None:
    sampler = sampler_of(timed(length), config, 1, 100, **{**PLAIN, "warp": 0.3})
    for seed in range(40):
        crop = sampler.draw(np.random.default_rng(seed))
        present = int(crop.mask.sum())
        assert crop.mask[:present].all()
        assert not crop.samples[present:].any()
        time = crop.samples[:present, 0]
        # Every sample that is there is one of the recording; those at its borders may repeat the outermost.
        assert (np.diff(time) >= 0).all()
        assert ((time >= 0.5) & (time <= length - 0.5)).all()
        if 5 < present < 100:
            speed = float(time[-2] - time[1]) / (present - 3)
            assert present == pytest.approx(length / speed, abs=1.01)
        assert present >= min(100, int(length / SPEEDS[1]))
    unwarped = sampler_of(timed(length), config, 1, 100, **PLAIN).draw(np.random.default_rng(0))
    assert unwarped.mask.sum() == min(length, 100)


def test_a_resampled_line_is_a_line() -> None:
    line = np.stack([np.arange(50.0), -3 * np.arange(50.0)], axis=1).astype(np.float32)
    np.testing.assert_array_equal(resampled(line, 10, 1.0, 20), line[10:30])
    faster = resampled(line, 10, 1.25, 20)
    assert faster.dtype == np.float32
    np.testing.assert_allclose(faster[:, 0], 10 + 1.25 * (np.arange(20) + 0.5) - 0.5, rtol=1e-6)
    np.testing.assert_allclose(faster[:, 1], -3 * faster[:, 0], rtol=1e-6)
    slower = resampled(line, 0, 50 / 64, 64)
    assert (slower[0, 0], slower[-1, 0]) == (0.0, 49.0)
    assert resampled(line, 49, 1.4, 0).shape == (0, 2)


def test_groups_of_channels_are_triads_and_what_is_in_none() -> None:
    assert [group.tolist() for group in channel_groups(3, ())] == [[0], [1], [2]]
    assert [group.tolist() for group in channel_groups(7, ((0, 1, 2), (5, 4, 3)))] == [
        [0, 1, 2],
        [3, 4, 5],
        [6],
    ]
    assert channel_groups(3, ((0, 1, 2),)) == channel_groups(1, ()) == []
    with pytest.raises(IndexError):
        channel_groups(5, ((3, 4, 5),))


@pytest.mark.parametrize("triads", [(), ((0, 1, 2), (3, 4, 5))])
def test_a_dropped_group_rests_at_its_mean(triads: tuple[tuple[int, int, int], ...]) -> None:
    settings = AugmentConfig(channel_drop=0.5, triads=triads)
    generator = np.random.default_rng(0)
    mean, std = generator.normal(size=(2, 6)).astype(np.float32)
    groups = {tuple(group) for group in channel_groups(6, triads)}
    dropped = []
    for _ in range(400):
        crop = augment(
            generator.normal(size=(30, 6)).astype(np.float32), mean, np.abs(std), settings, generator
        )
        assert crop.dtype == np.float32
        resting = np.flatnonzero((crop == mean).all(axis=0))
        if len(resting):
            dropped.append(tuple(resting.tolist()))
    assert set(dropped) == groups
    assert len(dropped) / 400 == pytest.approx(0.5, abs=0.1)


def test_all_channels_at_once_never_drop() -> None:
    signal = np.random.default_rng(1).normal(size=(30, 3)).astype(np.float32)
    mean, std = np.zeros(3, np.float32), np.ones(3, np.float32)
    settings = AugmentConfig.model_validate({**PLAIN, "channel_drop": 0.99, "triads": [[0, 1, 2]]})
    for seed in range(20):
        crop = augment(signal.copy(), mean, std, settings, np.random.default_rng(seed))
        np.testing.assert_array_equal(crop, signal)


@pytest.mark.parametrize("values", [{"warp": -0.1}, {"channel_drop": 1.0}, {"channel_drop": -0.1}])
def test_impossible_values_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        AugmentConfig.model_validate(values)


def test_balance_shows_rare_classes_as_often_as_the_others(tmp_path: Path) -> None:
    """One recording in ten has class b, for two of its 60 seconds; laid over actions, crops show it."""
    rng = np.random.default_rng(0)
    tracks = []
    for number in range(10):
        segments, labels = [[100.0, 400.0], [600.0, 1100.0]], [0, 0]
        if number == 0:
            segments, labels = [*segments, [1200.0, 1250.0]], [*labels, 1]
        samples = rng.normal(size=(1500, 2)).astype(np.float32)
        tracks.append(Track(f"r{number}", samples, np.array(segments), np.array(labels)))
    corpus = Corpus(tuple(tracks), ("a", "b"), 25.0)
    seen = {}
    for balance in (0.0, 0.9):
        config = read_config(write_data_set(tmp_path, steps=1))
        augment = config.augment.model_copy(update={"balance": balance, "splice": 0.0})
        sampler = Sampler(corpus, config.model_copy(update={"augment": augment}), hop=5, frames=40)
        crops = [sampler.draw(np.random.default_rng(seed)) for seed in range(200)]
        seen[balance] = np.mean([crop.targets.ongoing[:, 1].any() for crop in crops])
    assert seen[0.0] < 0.05
    assert 0.3 < seen[0.9] < 0.6


@pytest.mark.parametrize(
    ("names", "triads"),
    [
        (("acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z"), ((0, 1, 2), (3, 4, 5))),
        (
            ("acc1_x", "acc1_y", "acc1_z", "gyr1_x", "gyr1_y", "acc2_x", "acc2_y", "acc2_z"),
            ((0, 1, 2), (5, 6, 7)),
        ),
        (("acc_x_g", "acc_y_g", "acc_z_g", "temperature"), ((0, 1, 2),)),
        (("AccX", "AccY", "AccZ", "heart rate"), ((0, 1, 2),)),
        (("time", "x", "y", "z"), ((1, 2, 3),)),
        (("lead0_mV", "lead1_mV"), ()),
        (("left_x", "right_y", "left_z"), ()),
        ((), ()),
    ],
)
def test_triads_are_known_by_their_names(names: tuple[str, ...], triads: tuple[tuple[int, ...], ...]) -> None:
    assert triads_of(names) == triads
