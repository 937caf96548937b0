"""Small random detectors and bundles of them."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.manifest import Decoding, Frame, Training, write_bundle
from trainer.detector import Detector, DetectorShape
from trainer.export import manifest_of, step_graph
from trainer.pyramid import PyramidShape


def random_detector(shape: DetectorShape, seed: int = 0, spread: float = 0.3) -> Detector:
    """Random weights that make every part matter: fresh ones leave biases and scales at zero and one."""
    torch.manual_seed(seed)
    detector = Detector(shape).eval()
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return detector


def write_bundle_of(detector: Detector, folder: Path, sample_rate: float = 50.0, name: str = "tiny") -> Path:
    """Export a detector whose classes are a, b, c, ..."""
    graph, states = step_graph(detector)
    manifest, end = manifest_of(
        detector,
        graph,
        states,
        name=name,
        classes=tuple("abcdefghijklmnopqrstuvwxyz"[: detector.shape.classes]),
        frame=Frame(sample_rate=sample_rate, hop=detector.hop, channels=detector.shape.channels),
        decoding=Decoding(),
        training=Training(),
    )
    write_bundle(folder, manifest, graph, end)
    return folder


def write_tiny_bundle(folder: Path, seed: int = 0) -> Path:
    """50 Hz, hop 4, chunk 2, 3 channels, classes a, b, c."""
    shape = DetectorShape(
        3, 3, PyramidShape(16, 2, 5, 4, chunk=2, relative=True, expansion=2), hop=4, prior=0.3
    )
    return write_bundle_of(random_detector(shape, seed), folder)
