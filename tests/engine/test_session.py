"""Sessions: the law with slots, batches and age; and what a session refuses.

All hold for each engine. TensorRT and the CUDA driver are fakes here, which run the step on ONNX Runtime:
what is tested is everything around it. tests/gpu has the same law for the real ones.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from engine import BundleError, EngineError, OnnxSession, Session, Slot, read_bundle
from engine.tensorrt_session import TensorRtSession
from tests.engine.fake_driver import FakeDriver
from tests.engine.fake_tensorrt import install
from tests.tiny import random_detector, write_bundle_of
from trainer.detector import OUTPUTS, Detector, DetectorShape
from trainer.pyramid import PyramidShape

# float32 against the same model in float64. Sums of up to 4 x 16 products, through some twenty layers that
# each
# renormalise: rounding errors of 6e-8 grow to a few 1e-5 on logits of magnitude 10, and some layers' softmax
# amplifies them. 2e-4 leaves that room and is far below the 1e-4 steps in which probabilities are decided on.
TOLERANCE = 2e-4
# No shrinking: each example exports a model, and minutes of that would hide the failure.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
ENGINES = ("onnxruntime", "tensorrt")


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeDriver())


def session_of(engine: str, bundle: Path, slots: int = 16) -> Session:
    return (
        OnnxSession(bundle, slots, threads=1) if engine == "onnxruntime" else TensorRtSession(bundle, slots)
    )


@st.composite
def shapes(draw: st.DrawFn) -> DetectorShape:
    pyramid = PyramidShape(
        16, 2, draw(st.integers(1, 12)), draw(st.integers(1, 5)), chunk=draw(st.sampled_from([1, 2, 4, 8])),
        stem=1, embed=1, expansion=2, relative=draw(st.booleans()),
    )  # fmt: skip
    return DetectorShape(
        draw(st.integers(1, 4)), 3, pyramid, hop=draw(st.sampled_from([0, 2, 6])), stem_width=8
    )


def whole(detector: Detector, samples: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    with torch.no_grad():
        outputs = detector.double()(
            torch.from_numpy(samples).double()[None], torch.from_numpy(mask).double()[None]
        )
    detector.float()
    return {name: value[0].numpy() for name, value in outputs.items()}


@settings(
    max_examples=8, deadline=None, phases=PHASES, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(shape=shapes(), seed=st.integers(0, 2**31), data=st.data())
def test_any_schedule_of_streams_and_slots_keeps_to_the_law(
    tmp_path_factory: pytest.TempPathFactory, shape: DetectorShape, seed: int, data: st.DataObject
) -> None:
    """Streams begin and end at any time, step in any company and order, and take over each other's slots."""
    detector = random_detector(shape, seed, spread=0.1)
    bundle = write_bundle_of(detector, tmp_path_factory.mktemp("law"))
    chunk, hop = shape.pyramid.chunk, detector.hop
    random = np.random.default_rng(seed)
    streams = []
    for _ in range(5):
        chunks = int(random.integers(1, 20))
        streams.append(
            (
                random.standard_normal((chunks * chunk * hop, shape.channels)).astype(np.float32),
                random.random(chunks * chunk) > 0.1,
            )
        )
    expected = [whole(detector, samples, mask) for samples, mask in streams]
    for engine in ENGINES:
        session = session_of(engine, bundle, slots=3)
        waiting, running, heard = list(range(5)), {}, {i: [] for i in range(5)}
        while waiting or running:
            while waiting and len(running) < 3:
                running[waiting.pop()] = (session.open(), 0)
            chosen = data.draw(st.permutations(sorted(running)))[: data.draw(st.integers(1, len(running)))]
            outputs = session.step(
                [running[i][0] for i in chosen],
                np.stack([streams[i][0][running[i][1] * chunk * hop :][: chunk * hop] for i in chosen]),
                np.stack([streams[i][1][running[i][1] * chunk :][:chunk] for i in chosen]),
            )
            for row, i in enumerate(chosen):
                heard[i].append({name: value[row] for name, value in outputs.items()})
                slot, step = running[i]
                running[i] = (slot, step + 1)
                if (step + 1) * chunk == len(streams[i][1]):
                    session.close(running.pop(i)[0])
        for i, parts in heard.items():
            for name in ("ongoing", "start", "end"):
                found = np.concatenate([part[name] for part in parts])
                np.testing.assert_allclose(found, expected[i][name], rtol=0, atol=TOLERANCE, err_msg=engine)


def test_an_old_stream_keeps_to_the_law(tmp_path: Path) -> None:
    shape = DetectorShape(
        3, 3, PyramidShape(16, 2, 7, 6, chunk=4, expansion=2, relative=True), hop=2, stem_width=8
    )
    detector = random_detector(shape, 1, spread=0.1)
    session = OnnxSession(write_bundle_of(detector, tmp_path / "b"), slots=1, threads=1)
    random = np.random.default_rng(2)
    samples, mask = random.standard_normal((10_240 * 2, 3)).astype(np.float32), random.random(10_240) > 0.05
    slot = session.open()
    parts = [
        session.step([slot], samples[None, k * 2 : k * 2 + 8], mask[None, k : k + 4])
        for k in range(0, 10_240, 4)
    ]
    expected = whole(detector, samples, mask)
    for name in ("ongoing", "start", "end"):
        found = np.concatenate([part[name][0] for part in parts])
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=TOLERANCE)


def test_a_row_does_not_depend_on_its_companions(hapt_bundle: Path) -> None:
    """Bit for bit: alone (with the session's idle companion), among few, among many, in any place."""
    random = np.random.default_rng(0)
    one = OnnxSession(hapt_bundle, slots=1, threads=1)
    chunk = one.manifest.chunk_samples, one.manifest.frame.channels
    x = random.standard_normal((12, *chunk)).astype(np.float32)
    mask = np.ones((1, one.manifest.chunk), bool)
    slot = one.open()
    alone = [one.step([slot], x[k : k + 1], mask) for k in range(12)]
    for rows in (2, 3, 5, 8, 13, 32):
        many = OnnxSession(hapt_bundle, slots=rows, threads=2)
        slots = [many.open() for _ in range(rows)]
        for place in {0, rows // 2, rows - 1}:
            for other in slots:
                many.close(other)
            slots = [many.open() for _ in range(rows)]
            for k in range(12):
                batch = random.standard_normal((rows, *chunk)).astype(np.float32)
                batch[place] = x[k]
                outputs = many.step(slots, batch, np.repeat(mask, rows, axis=0))
                for name in OUTPUTS:
                    np.testing.assert_array_equal(outputs[name][place], alone[k][name][0])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_closed_slot_is_nobodys(tiny_bundle: Path, engine: str) -> None:
    session = session_of(engine, tiny_bundle, slots=1)
    slot = session.open()
    with pytest.raises(EngineError, match="all 1 slots are taken"):
        session.open()
    session.close(slot)
    again = session.open()
    assert again.index == slot.index
    samples, mask = np.zeros((1, 8, 3), np.float32), np.ones((1, 2), bool)
    for stale in (slot, Slot(7, 1)):
        with pytest.raises(EngineError, match="not open"):
            session.step([stale], samples, mask)
        with pytest.raises(EngineError, match="not open"):
            session.close(stale)
    session.step([again], samples, mask)


@pytest.mark.parametrize("engine", ENGINES)
def test_wrong_shapes_are_refused_and_change_nothing(tiny_bundle: Path, engine: str) -> None:
    session = session_of(engine, tiny_bundle, slots=2)
    slot, twin = session.open(), session.open()
    samples, mask = np.ones((1, 8, 3), np.float32), np.ones((1, 2), bool)
    for bad in (np.ones((1, 7, 3)), np.ones((2, 8, 3)), np.ones((1, 8, 4)), np.ones((8, 3))):
        with pytest.raises(EngineError, match=r"expected \[1, 8, 3\]"):
            session.step([slot], bad.astype(np.float32), mask)
    with pytest.raises(EngineError, match="twice"):
        session.step([slot, slot], np.ones((2, 8, 3), np.float32), np.ones((2, 2), bool))
    first, second = session.step([slot], samples, mask), session.step([twin], samples, mask)
    np.testing.assert_array_equal(first["ongoing"], second["ongoing"])


def edit(bundle: Path, folder: Path, **changes: object) -> Path:
    folder.mkdir()
    values = json.loads((bundle / "bundle.json").read_text())
    values.update(changes)
    (folder / "bundle.json").write_text(json.dumps(values))
    (folder / "model.onnx").write_bytes((bundle / "model.onnx").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": 99}, "bundle version 99, this Onset reads version 1"),
        ({"version": None}, "bundle version None"),
        ({"graph_sha256": "0" * 64}, "changed or damaged"),
        ({"chunk": 3}, "power of two"),
        ({"chunk": 4}, "inputs"),
        ({"classes": ["a", "b"]}, "outputs"),
        ({"clases": []}, "did you mean `classes`"),
        ({"classes": ["a", "b", "\ud800"]}, "not printable"),
        ({"states": [{"name": "s", "shape": [10**13]}]}, "would take more than"),
        ({"decoding": {"max_duration": 1e15}}, "max_duration"),
        ({"frame": {"sample_rate": 1e12, "hop": 4, "channels": 3}}, "sample_rate"),
        ({"states": [{"name": "phase", "shape": [1, 1]}]}, "tensor `next_state`"),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_bundle_that_does_not_fit_is_refused(
    tiny_bundle: Path, tmp_path: Path, changes: dict[str, object], sentence: str, engine: str
) -> None:
    with pytest.raises(BundleError, match=sentence):
        session_of(engine, edit(tiny_bundle, tmp_path / "b", **changes))


def test_a_tampered_or_missing_graph_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = edit(tiny_bundle, tmp_path / "b")
    graph = bytearray((bundle / "model.onnx").read_bytes())
    graph[len(graph) // 2] ^= 1
    (bundle / "model.onnx").write_bytes(bytes(graph))
    with pytest.raises(BundleError, match="changed or damaged"):
        OnnxSession(bundle)
    (bundle / "model.onnx").unlink()
    with pytest.raises(BundleError, match="not readable"):
        OnnxSession(bundle)
    with pytest.raises(BundleError, match="not a bundle"):
        OnnxSession(tmp_path / "nothing")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=200))
def test_junk_for_a_manifest_is_refused(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    folder = tmp_path_factory.mktemp("junk")
    (folder / "bundle.json").write_bytes(junk)
    with pytest.raises(BundleError):
        OnnxSession(folder)


def rewrite(bundle: Path, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """The bundle with another graph, and a manifest that vouches for it."""
    model = onnx.load(str(bundle / "model.onnx"))
    change(model)
    graph = model.SerializeToString()
    edit(bundle, folder, graph_sha256=hashlib.sha256(graph).hexdigest())
    (folder / "model.onnx").write_bytes(graph)
    return folder


def test_a_graph_that_diverged_or_takes_one_stream_only_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    def poison(model: onnx.ModelProto) -> None:
        for weight in model.graph.initializer:
            values = onnx.numpy_helper.to_array(weight)
            if values.dtype == np.float32 and values.ndim == 2:
                weight.CopyFrom(onnx.numpy_helper.from_array(np.full_like(values, np.nan), weight.name))

    def fix_batch(model: onnx.ModelProto) -> None:
        for tensor in (*model.graph.input, *model.graph.output):
            tensor.type.tensor_type.shape.dim[0].dim_value = 1

    with pytest.raises(BundleError, match="NaN or Inf"):
        OnnxSession(rewrite(tiny_bundle, tmp_path / "nan", poison))
    with pytest.raises(BundleError, match="fails with 2 streams"):
        OnnxSession(rewrite(tiny_bundle, tmp_path / "one", fix_batch))


FILES = ("bundle.json", "model.onnx")


def _directory(path: Path) -> None:
    path.mkdir()


def _broken_link(path: Path) -> None:
    path.symlink_to(path.with_name("gone"))


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [_directory, _broken_link, _loop, _pipe])
def test_a_bundle_whose_files_are_no_files_is_refused(
    tiny_bundle: Path, tmp_path: Path, name: str, change: Callable[[Path], None]
) -> None:
    bundle = edit(tiny_bundle, tmp_path / "b")
    (bundle / name).unlink()
    change(bundle / name)
    with pytest.raises(BundleError, match=r"not readable|not a bundle"):
        OnnxSession(bundle)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "problem", [errno.EACCES, errno.EIO, errno.ENOENT, errno.ESTALE, errno.EMFILE, errno.ENOTDIR]
)
def test_a_bundle_that_the_machine_does_not_give_is_refused(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, problem: int
) -> None:
    """At whatever moment: a file may be there at one look, and gone at the next."""
    bundle, real = edit(tiny_bundle, tmp_path / "b"), os.open

    def refusing(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path).name == name:
            raise OSError(problem, os.strerror(problem), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(BundleError, match=r"not readable|not a bundle"):
        read_bundle(bundle)


def test_a_manifest_that_comes_and_goes_under_reading_is_read_or_refused(tmp_path: Path) -> None:
    """The reader looks at any moment, also between two of its own."""
    stop, manifest, away = threading.Event(), tmp_path / "bundle.json", tmp_path / "away"
    manifest.write_text("{}")

    def move() -> None:
        while not stop.is_set():
            manifest.rename(away)
            away.rename(manifest)

    thread, interval = threading.Thread(target=move), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    seen = set()
    try:
        for _ in range(20_000):
            with pytest.raises(BundleError) as refused:
                read_bundle(tmp_path)
            seen.add("not a bundle" in str(refused.value))
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert seen == {True, False}, "it was there, and it was away"


def test_whatever_onnx_runtime_raises_is_a_bundle_that_is_refused(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    junk = edit(tiny_bundle, tmp_path / "b", graph_sha256=hashlib.sha256(b"junk").hexdigest())
    (junk / "model.onnx").write_bytes(b"junk")
    with pytest.raises(BundleError, match="refuses the graph"):
        OnnxSession(junk)

    def failing(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(onnxruntime, "InferenceSession", failing)
    with pytest.raises(BundleError, match="refuses the graph"):
        OnnxSession(tiny_bundle)


@pytest.mark.parametrize("place", ["weights.bin", "/etc/passwd", "../weights.bin"])
def test_weights_outside_of_the_graph_are_refused(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """ONNX lets a graph name other files as its weights; nothing would vouch for what is in them."""
    monkeypatch.chdir(tmp_path)  # in which ONNX Runtime would look

    def point_outside(model: onnx.ModelProto) -> None:
        weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        for path in (tmp_path / "weights.bin", tmp_path / "b" / "weights.bin"):
            path.write_bytes(weight.raw_data)
        onnx.external_data_helper.set_external_data(weight, place, length=len(weight.raw_data))
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL

    (tmp_path / "b").mkdir()
    model = onnx.load(str(tiny_bundle / "model.onnx"))
    point_outside(model)
    graph = model.SerializeToString()
    values = json.loads((tiny_bundle / "bundle.json").read_text())
    values["graph_sha256"] = hashlib.sha256(graph).hexdigest()
    (tmp_path / "b" / "bundle.json").write_text(json.dumps(values))
    (tmp_path / "b" / "model.onnx").write_bytes(graph)
    with pytest.raises(BundleError, match="refuses the graph"):
        OnnxSession(tmp_path / "b")
