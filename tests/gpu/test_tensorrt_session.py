"""The law on a real TensorRT, against ONNX Runtime; plans, CUDA graphs, and OnsetNMS inside of a plan.

The shipped bundle, and those of ONSET_BUNDLES (folders with `:` between) beside it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import ConfigError, OnnxSession, Session, read_bundle, tensorrt_api
from engine.gpu import Gpu
from engine.nms_reference import NmsSettings, keep
from engine.plans import PlanCache
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


def test_onset_nms_inside_of_a_plan_agrees_with_its_oracle(bundle: Path) -> None:
    """The step with an OnsetNMS node behind it keeps what the oracle keeps of the plan's own moments."""
    onnx = pytest.importorskip("onnx")
    library = Path(os.environ.get("ONSET_NMS_LIBRARY", "build/libonset_nms.so"))
    if not library.is_file():
        pytest.skip(f"needs {library}: make plugin")
    plugin = ctypes.CDLL(str(library.resolve()))
    tensorrt_api.version()  # loads TensorRT, whose registry the plugin is entered into
    if not hasattr(plugin, "onset_nms_register") or plugin.onset_nms_register() == 1:
        pytest.skip("needs the adapter of this TensorRT: TENSORRT_INCLUDE=FOLDER make plugin")
    manifest, graph = read_bundle(bundle)
    settings = NmsSettings(hop=manifest.frame.hop, score_threshold=0.01, max_segments=8, top_k=64)
    rows, memory_size = 4, 1 + 3 * 16
    kept_names = ["segments", "scores", "labels", "number", "next_memory"]
    model = onnx.load_model_from_string(graph)
    attributes = settings.model_dump(exclude={"method"}) | {"soft": int(settings.method == "soft")}
    model.graph.node.append(
        onnx.helper.make_node(
            "OnsetNMS", ["end", "end_offsets", "memory"], kept_names, domain="onset", **attributes
        )
    )
    float32, int32 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
    value = onnx.helper.make_tensor_value_info
    model.graph.input.append(value("memory", float32, ["B", memory_size]))
    most = settings.max_segments
    for name, kind, shape in zip(
        kept_names,
        (float32, float32, int32, int32, float32),
        (["B", most, 2], ["B", most], ["B", most], ["B"], ["B", memory_size]),
        strict=True,
    ):
        model.graph.output.append(value(name, kind, shape))
    model.opset_import.append(onnx.helper.make_opsetid("onset", 1))
    content, _ = tensorrt_api.build(
        model.SerializeToString(), rows, "fp32", 2**30, b"", lambda doing, done: None
    )
    plan, gpu = tensorrt_api.Plan(content, rows), Gpu()
    pinned = {name: gpu.pin(4 * int(np.prod(t.shape))) for name, t in plan.tensors.items()}
    arrays = {n: p.view(plan.tensors[n].dtype).reshape(plan.tensors[n].shape) for n, p in pinned.items()}
    addresses = {name: gpu.allocate(block.nbytes) for name, block in pinned.items()}
    for name, address in addresses.items():
        plan.bind(name, address)

    def run() -> None:
        for name in ("samples", "mask", "state", "memory"):
            gpu.upload(addresses[name], pinned[name])
        plan.enqueue(gpu.stream)
        for name in addresses.keys() - {"samples", "mask", "state", "memory"}:
            gpu.download(pinned[name], addresses[name])

    random = np.random.default_rng(4)
    for name in ("state", "memory"):
        arrays[name][:] = 0
    arrays["mask"][:] = 1
    found, replay = 0, run
    for number in range(40):
        arrays["samples"][:] = random.standard_normal(arrays["samples"].shape)
        replay()
        gpu.wait()
        expected = keep(arrays["end"], arrays["end_offsets"], arrays["memory"], settings)
        for name, array in zip(kept_names, expected, strict=True):
            np.testing.assert_array_equal(arrays[name], array)
        found += int(expected.number.sum())
        arrays["state"][:], arrays["memory"][:] = arrays["next_state"], arrays["next_memory"]
        if number == 0:
            replay = gpu.captured(run)
    assert found, "nothing was kept, so nothing was shown"
