"""The law on a real TensorRT, against ONNX Runtime; plans, CUDA graphs, and OnsetNMS inside of a plan.

The shipped bundle, and those of ONSET_BUNDLES (folders with `:` between) beside it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import (
    ConfigError,
    OnnxSession,
    Session,
    read_bundle,
    tensorrt_api,
    write_bundle,
)
from engine.manifest import Nms
from engine.nms_reference import keep, logits_there
from engine.plans import PlanCache
from engine.session import SEGMENTS
from engine.tensorrt_session import TensorRtSession
from tests.gpu import driver

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
BUNDLES = [
    ROOT / "deploy" / "demo" / "bundle",
    *map(Path, filter(None, os.environ.get("ONSET_BUNDLES", "").split(":"))),
]
# float32 against float32, both summing in an order of their own: rounding errors of 6e-8 of logits of 10 or
# so, grown by some thirty layers, each of which may amplify them. In fp16 each product rounds by 2^-11, which
# is 5e-4, and thirty follow each other. Of offsets, which have no bound, that holds relative to their size.
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2}


def missing() -> str | None:
    if not driver.is_there():
        return "there is no GPU"
    try:
        tensorrt_api.version()
    except ConfigError as problem:
        return str(problem)
    return None


@pytest.fixture(scope="module", autouse=True)
def _needs_tensorrt() -> None:
    if problem := missing():
        pytest.skip(f"needs an NVIDIA GPU with TensorRT: {problem}")


@pytest.fixture(scope="module", params=BUNDLES, ids=lambda path: path.parent.name)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without plans, and with a place for them that is not the repository's."""
    folder = tmp_path_factory.mktemp("bundle") / "b"
    return Path(shutil.copytree(request.param, folder, ignore=shutil.ignore_patterns("plans")))


def walk(session: Session, seed: int, rounds: int = 60) -> list[dict[str, np.ndarray]]:
    """Streams that begin and end, in any company, and take over each other's slots: the same by each seed."""
    pytest.importorskip("onnxruntime", reason="needs onnxruntime to compare with")
    manifest, random = session.manifest, np.random.default_rng(seed)
    slots = [session.open() for _ in range(session.capacity)]
    heard = []
    for number in range(rounds):
        chosen = random.permutation(len(slots))[: random.integers(1, len(slots) + 1)]
        samples = random.standard_normal((len(chosen), manifest.chunk_samples, manifest.frame.channels))
        mask = random.random((len(chosen), manifest.chunk)) > 0.1
        outputs = session.step([slots[i] for i in chosen], samples.astype(np.float32), mask)
        heard.append({name: value.copy() for name, value in outputs.items()})
        if number % 7 == 6:
            ended = int(random.integers(len(slots)))
            session.close(slots[ended])
            slots[ended] = session.open()
    return heard


def far(found: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]]) -> float:
    """The largest difference: of probabilities, and of offsets relative to their size from 1 on."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        for name in other:
            a, b = one[name].astype(np.float64), other[name].astype(np.float64)
            if "offset" in name:
                difference = np.abs(a - b) / np.maximum(1, np.abs(b))
            else:
                difference = np.abs(1 / (1 + np.exp(-a)) - 1 / (1 + np.exp(-b)))
            worst = max(worst, float(difference.max()))
    return worst


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_law_holds_to_its_tolerance(bundle: Path, precision: Any) -> None:
    session = TensorRtSession(bundle, slots=8, precision=precision, streams=(1, 2, 8))
    expected = walk(OnnxSession(bundle, slots=8, threads=8), 0)
    assert far(walk(session, 0), expected) < TOLERANCE[precision]


def test_an_old_stream_keeps_to_the_law(bundle: Path) -> None:
    session = TensorRtSession(bundle, slots=1, streams=(1,))
    expected = walk(OnnxSession(bundle, slots=1, threads=8), 1, rounds=1000)
    assert far(walk(session, 1, rounds=1000), expected) < TOLERANCE["fp32"]


def test_with_and_without_cuda_graphs_every_bit_is_the_same(bundle: Path) -> None:
    graphs, plain = (
        TensorRtSession(bundle, slots=8, streams=(1, 2, 8), cuda_graphs=cuda_graphs)
        for cuda_graphs in (True, False)
    )
    for one, other in zip(walk(graphs, 2), walk(plain, 2), strict=True):
        for name in other:
            np.testing.assert_array_equal(one[name], other[name])


def test_with_one_batch_a_row_does_not_depend_on_its_companions(bundle: Path) -> None:
    session = TensorRtSession(bundle, slots=9, streams=(8,))
    manifest, random = session.manifest, np.random.default_rng(3)
    chunk = manifest.chunk_samples, manifest.frame.channels
    slots = [session.open() for _ in range(9)]
    samples = random.standard_normal((20, *chunk)).astype(np.float32)
    mask = np.ones((8, manifest.chunk), bool)
    alone = [session.step([slots[8]], x[None], mask[:1]) for x in samples]
    for number, x in enumerate(samples):
        rows = 1 + number % 8
        place = int(random.integers(rows))
        order = [slots[0] if row == place else slots[row + 1 if row < place else row] for row in range(rows)]
        batch = random.standard_normal((rows, *chunk)).astype(np.float32)
        batch[place] = x
        outputs = session.step(order, batch, mask[:rows])
        for name in outputs:
            np.testing.assert_array_equal(outputs[name][place], alone[number][name][0])


def test_plans_are_built_once(bundle: Path) -> None:
    TensorRtSession(bundle, slots=1, streams=(1,))
    before = {path: path.stat().st_mtime_ns for path in PlanCache(bundle).folder.glob("*.plan")}
    TensorRtSession(bundle, slots=1, streams=(1,))
    assert {path: path.stat().st_mtime_ns for path in PlanCache(bundle).folder.glob("*.plan")} == before


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_onset_nms_inside_of_a_plan_agrees_with_its_oracle(bundle: Path, precision: Any) -> None:
    """What a plan keeps is, to the last bit, what the oracle keeps of the moments that the plan says."""
    library = Path(os.environ["ONSET_NMS_LIBRARY"])
    try:
        tensorrt_api.load_plugin(library)
    except ConfigError as problem:
        pytest.skip(f"needs the NMS plugin: {problem}")
    eager(bundle)
    session = TensorRtSession(bundle, slots=9, precision=precision, streams=(4,), plugin=library)
    manifest, random = session.manifest, np.random.default_rng(4)
    assert manifest.nms is not None
    slots = [session.open() for _ in range(9)]
    memory, found = np.zeros((9, manifest.nms.memory_size), np.float32), 0
    for _ in range(60):
        chosen = random.permutation(9)[: random.integers(1, 10)]
        samples = random.standard_normal((len(chosen), manifest.chunk_samples, manifest.frame.channels))
        mask = random.random((len(chosen), manifest.chunk)) > 0.1
        step = session.step([slots[i] for i in chosen], samples.astype(np.float32), mask)
        scores = logits_there(step["end"], mask)
        kept = keep(scores, step["end_offsets"], memory[chosen], manifest.nms.settings)
        memory[chosen] = kept.memory
        for name, expected in zip(SEGMENTS, kept, strict=False):
            np.testing.assert_array_equal(step[name], expected, err_msg=name)
        found += int(kept.number.sum())
    assert found, "nothing was kept, so nothing was shown"


def eager(bundle: Path) -> None:
    """Noise says little that is worth keeping: an ending that asks for next to nothing."""
    onnx = pytest.importorskip("onnx")
    manifest, graph = read_bundle(bundle)
    assert manifest.nms is not None
    ending = onnx.load_model_from_string((bundle / "nms.onnx").read_bytes())
    (asked,) = [a for a in ending.graph.node[-1].attribute if a.name == "score_threshold"]
    asked.f = 0.01
    content = ending.SerializeToString()
    settings = manifest.nms.settings.model_copy(update={"score_threshold": 0.01})
    digest = Nms.digest(settings, manifest.nms.remembered, content)
    nms = manifest.nms.model_copy(update={"settings": settings, "sha256": digest})
    write_bundle(bundle, manifest.model_copy(update={"nms": nms}), graph, content)
