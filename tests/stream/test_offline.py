"""Decisions on recorded outputs: the very events that the network's own run gives."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from engine import DataError, Decoding, OnnxSession, read_bundle
from engine.manifest import write_bundle
from stream.offline import AT_ONCE, Recorded, detect_recorded, detect_streams, record_streams

DECODINGS = (
    Decoding(),
    Decoding(start_threshold=0.0, end_threshold=0.0, gate=0.0, confident=0.0, hold=0.0),
    Decoding(start_threshold=0.05, end_threshold=0.4, gate=0.05, confident=0.9, hold=0.5),
    Decoding(start_threshold=0.3, end_threshold=0.1, confident=0.2, hold=1.0, min_duration=0.1),
)


def streams() -> dict[str, np.ndarray]:
    """More than run at once: whole, with a tail that fills no frame, with gaps that are filled, with gaps
    that end a segment, beginning and ending in NaN, and with values that overflow the network."""
    found = {}
    for seed in range(AT_ONCE + 4):
        random = np.random.default_rng(seed)
        samples = 0.3 * np.cumsum(random.normal(size=(300 + 13 * seed, 3)), axis=0)
        if seed % 5 == 1:
            samples[:5], samples[40:44], samples[100:240] = np.nan, np.inf, np.nan
        if seed % 5 == 2:
            samples[-21:] = np.nan
        if seed % 5 == 3:
            samples[150:152] = 3e38
        found[f"r{seed}"] = samples.astype(np.float32)
    return found


@pytest.fixture(scope="module")
def recorded(tiny_bundle: Path) -> Recorded:
    return record_streams(tiny_bundle, [(n, partial(np.copy, s)) for n, s in streams().items()], threads=1)


@pytest.mark.parametrize("decoding", DECODINGS)
def test_events_of_recorded_outputs_are_those_of_the_network(
    tiny_bundle: Path, tmp_path: Path, recorded: Recorded, decoding: Decoding
) -> None:
    named = [(name, partial(np.copy, samples)) for name, samples in streams().items()]
    manifest, graph = read_bundle(tiny_bundle)
    write_bundle(tmp_path / "bundle", manifest.model_copy(update={"decoding": decoding}), graph)
    counters = detect_streams(tmp_path / "bundle", named, tmp_path / "a.jsonl", threads=1)
    again = detect_recorded(recorded, tmp_path / "b.jsonl", decoding)
    events = (tmp_path / "a.jsonl").read_bytes()
    assert (tmp_path / "b.jsonl").read_bytes() == events
    assert again.snapshot() == counters.snapshot()
    for part in (b"action.ended", b"gap of", b"outputs are not finite", b"end of stream"):
        assert events.count(part) > 2, part


def test_the_network_runs_once_and_no_samples_are_kept(
    tiny_bundle: Path, tmp_path: Path, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("the network ran again")

    monkeypatch.setattr(OnnxSession, "__init__", refused)
    monkeypatch.setattr(OnnxSession, "step", refused)
    for decoding in DECODINGS:
        detect_recorded(recorded, tmp_path / "events.jsonl", decoding)
    assert {there.dtype for _, there in recorded.streams} == {np.dtype(bool)}
    assert not list(tmp_path.glob("*.partial"))


def test_a_recording_that_does_not_fit_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(DataError, match="r: 2 channels, the bundle expects 3"):
        record_streams(tiny_bundle, [("r", lambda: np.zeros((9, 2), np.float32))], threads=1)
