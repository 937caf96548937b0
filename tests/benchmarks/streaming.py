"""How small and fast the shipped bundle is.

- the floor of a step: reading its weights once, here as a copy of as many bytes;
- the peer of carrying a state: the same model over a whole window again for each new chunk, which is what
  "online" means to most published code.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from engine import OnnxSession
from stream.offline import detect_recordings
from tests.benchmarks.pairs import Row, paired
from tests.tiny import random_detector, write_bundle_of
from trainer.detector import Detector, DetectorShape
from trainer.pyramid import PyramidShape

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo"
WINDOW = 320  # frames that the peer runs again: a training crop


def measure() -> tuple[list[Row], dict[str, object]]:
    """The rows, and what else is worth knowing."""
    session = OnnxSession(DEMO / "bundle", slots=64, threads=1)
    manifest = session.manifest
    slots = [session.open() for _ in range(64)]
    random = np.random.default_rng(0)
    samples = random.standard_normal((64, manifest.chunk_samples, manifest.frame.channels)).astype(np.float32)
    mask = np.ones((64, manifest.chunk), bool)
    weights = np.ones((DEMO / "bundle" / "model.onnx").stat().st_size // 4, np.float32)
    target = np.empty_like(weights)

    def one() -> object:
        return session.step(slots[:1], samples[:1], mask[:1])

    def copy() -> None:
        np.copyto(target, weights)

    def many() -> object:
        return session.step(slots, samples, mask)

    rows = [
        paired("step, one stream", one, "reading the weights once", copy, 500),
        paired("step, 64 streams", many, "step, one stream", one, 100),
    ]

    assert "width: 96" in manifest.training.config, "the peer below is built to the shipped bundle's size"
    shape = PyramidShape(96, 4, 16, 6, expansion=2, chunk=2, relative=True)
    detector = Detector(DetectorShape(6, 12, shape, hop=manifest.frame.hop, stem_width=48)).eval()
    window, there = torch.zeros(1, WINDOW * manifest.frame.hop, 6), torch.ones(1, WINDOW)

    def again() -> object:
        with torch.no_grad():
            return detector(window, there)

    rows.append(paired(f"{WINDOW}-frame window again for each chunk", again, "step, one stream", one, 50))

    rows.append(_fronts())

    recordings = sorted((DEMO / "recordings").glob("*.npy"))
    lengths = [len(np.load(path, mmap_mode="r")) for path in recordings]
    steps = sum(lengths) // manifest.chunk_samples

    def detect() -> None:
        with tempfile.TemporaryDirectory() as folder:
            detect_recordings(DEMO / "bundle", recordings, Path(folder) / "e.jsonl", threads=1)

    def bare() -> None:
        for _ in range(steps // len(recordings)):
            session.step(slots[: len(recordings)], samples[: len(recordings)], mask[: len(recordings)])

    whole = paired("onset detect, three recordings, one core", detect, "their steps alone", bare, 5)
    frames_per_second = 1000 * sum(lengths) / manifest.frame.hop / whole.ms
    return [*rows, whole], {
        "frames_per_second_detect_one_core": round(frames_per_second),
        "times_real_time": round(frames_per_second / manifest.frame.rate),
        "bundle_bytes": sum(path.stat().st_size for path in (DEMO / "bundle").iterdir()),
        "state_bytes_per_stream": session.state_bytes,
    }


def _fronts() -> Row:
    """A step of one ECG stream (120 Hz, two leads) with the front that sees beats, against the usual one."""
    shape = PyramidShape(96, 4, 16, 6, expansion=2, chunk=2, relative=True)
    steps = []
    with tempfile.TemporaryDirectory() as folder:
        for beats in (16, 0):
            detector = random_detector(
                DetectorShape(2, 6, shape, hop=24, stem_width=48, beats=beats, sample_rate=120.0)
            )
            bundle = write_bundle_of(detector, Path(folder) / str(beats), sample_rate=120.0)
            session = OnnxSession(bundle, slots=1, threads=1)
            slot = session.open()
            samples = np.random.default_rng(0).standard_normal((1, 48, 2)).astype(np.float32)
            steps.append(partial(session.step, [slot], samples, np.ones((1, 2), bool)))
    return paired("step, one stream, front beats", steps[0], "the same, front signal", steps[1], 200)
