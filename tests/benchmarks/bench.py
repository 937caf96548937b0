"""`make bench`: how small and fast the shipped bundle is, on this machine, in one run.

Every figure is a ratio to a floor or a peer timed beside it, in turn: a machine that drifts hits both.

- the floor of a step: reading its weights once, here as a copy of as many bytes;
- the peer of carrying a state: the same model over a whole window again for each new chunk, which is what
  "online" means to most published code.

Writes bench.json and bench.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from engine import OnnxSession
from stream.offline import detect_recordings
from trainer.detector import Detector, DetectorShape
from trainer.pyramid import PyramidShape

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo"
WINDOW = 320  # frames that the peer runs again: a training crop


def paired(
    first: Callable[[], object], second: Callable[[], object], rounds: int
) -> tuple[float, float, float]:
    """Median seconds of each, and the median of the pairwise ratio first / second."""
    times = np.empty((rounds, 2))
    for function in (first, second):
        function()
    for row in times:
        for column, function in enumerate((first, second)):
            begin = time.perf_counter()
            function()
            row[column] = time.perf_counter() - begin
    return (
        float(np.median(times[:, 0])),
        float(np.median(times[:, 1])),
        float(np.median(times[:, 0] / times[:, 1])),
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("bench"))
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []

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

    step, copy, ratio = paired(one, lambda: np.copyto(target, weights), 500)
    rows.append(row("step, one stream", step, "reading the weights once", copy, ratio))
    many, alone, ratio = paired(lambda: session.step(slots, samples, mask), one, 100)
    rows.append(row("step, 64 streams", many, "step, one stream", alone, ratio))

    values = manifest.training.config
    assert "width: 96" in values, "the peer below is built to the shipped bundle's size"
    shape = PyramidShape(96, 4, 16, 6, expansion=2, chunk=2, relative=True)
    detector = Detector(DetectorShape(6, 12, shape, hop=manifest.frame.hop, stem_width=48)).eval()
    window, there = torch.zeros(1, WINDOW * manifest.frame.hop, 6), torch.ones(1, WINDOW)
    with torch.no_grad():
        again, step, ratio = paired(lambda: detector(window, there), one, 50)
    rows.append(row(f"{WINDOW}-frame window again for each chunk", again, "step, one stream", step, ratio))

    recordings = sorted((DEMO / "recordings").glob("*.npy"))
    lengths = [len(np.load(path, mmap_mode="r")) for path in recordings]
    steps = sum(lengths) // manifest.chunk_samples

    def detect() -> None:
        with tempfile.TemporaryDirectory() as folder:
            detect_recordings(DEMO / "bundle", recordings, Path(folder) / "e.jsonl", threads=1)

    def bare() -> None:
        for _ in range(steps // len(recordings)):
            session.step(slots[: len(recordings)], samples[: len(recordings)], mask[: len(recordings)])

    whole, bare_time, ratio = paired(detect, bare, 5)
    rows.append(row("onset detect, three recordings, one core", whole, "their steps alone", bare_time, ratio))
    frames = sum(lengths) / manifest.frame.hop
    facts = {
        "frames_per_second_detect_one_core": round(frames / whole),
        "times_real_time": round(frames / whole / manifest.frame.rate),
        "bundle_bytes": sum(path.stat().st_size for path in (DEMO / "bundle").iterdir()),
        "state_bytes_per_stream": session.state_bytes,
        "machine": f"{platform.machine()}, {platform.python_version()}, one core",
    }
    (output / "bench.json").write_text(json.dumps({"rows": rows, **facts}, indent=2) + "\n")
    lines = ["| what | ms | against | ms | ratio |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['what']} | {r['ms']} | {r['against']} | {r['against_ms']} | {r['ratio']} |" for r in rows
    ]
    lines += ["", "| fact | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())]
    (output / "bench.md").write_text("\n".join(lines) + "\n")


def row(what: str, seconds: float, against: str, other: float, ratio: float) -> dict[str, object]:
    """One line of the table."""
    return {
        "what": what,
        "ms": round(1000 * seconds, 3),
        "against": against,
        "against_ms": round(1000 * other, 3),
        "ratio": round(ratio, 2),
    }


if __name__ == "__main__":
    main()
