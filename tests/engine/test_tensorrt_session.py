"""The session on TensorRT, around its step: batches, CUDA graphs, plans, memory. TensorRT is a fake."""

from __future__ import annotations

import errno
import gc
import logging
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from engine import BundleError, ConfigError, EngineError, OnnxSession
from engine.compiler import compile_bundle
from engine.tensorrt_session import TensorRtSession
from tests.engine.fake_driver import FakeDriver
from tests.engine.fake_tensorrt import RELEASES, FakeTensorRt, install
from tests.engine.test_session import rewrite


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver) -> FakeTensorRt:
    return install(monkeypatch, driver)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """One without plans."""
    for name in ("bundle.json", "model.onnx", "nms.onnx"):
        (tmp_path / "b").mkdir(exist_ok=True)
        shutil.copy(tiny_bundle / name, tmp_path / "b" / name)
    return tmp_path / "b"


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that TensorRT takes: all that is seen of the real one, whose kernel takes a GPU."""
    return library(
        tmp_path_factory.mktemp("plugin"),
        "int onset_nms_register(void) { return 0; }",
    )


def library(folder: Path, source: str) -> Path:
    (folder / "plugin.c").write_text(source)
    subprocess.run(["cc", "-shared", "-o", "plugin.so", "plugin.c"], cwd=folder, check=True)
    (folder / "plugin.so").chmod(0o755)  # whatever the umask: others may not write it
    return folder / "plugin.so"


def chunks(count: int, rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, rows, 8, 3)).astype(np.float32)


def mask(rows: int) -> np.ndarray:
    return np.ones((rows, 2), bool)


@pytest.mark.parametrize("release", RELEASES)
def test_each_release_of_tensorrt_says_what_onnx_runtime_says(
    monkeypatch: pytest.MonkeyPatch, driver: FakeDriver, bundle: Path, release: str
) -> None:
    install(monkeypatch, driver, release)
    session, other = TensorRtSession(bundle, slots=3), OnnxSession(bundle, slots=3, threads=1)
    slots, theirs = [session.open() for _ in range(3)], [other.open() for _ in range(3)]
    for samples in chunks(5, 3):
        found, expected = session.step(slots, samples, mask(3)), other.step(theirs, samples, mask(3))
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("release", RELEASES)
def test_the_segments_of_each_release_are_those_of_the_oracle(
    monkeypatch: pytest.MonkeyPatch, driver: FakeDriver, bundle: Path, plugin: Path, release: str
) -> None:
    """Streams that come and go, more than a batch holds; what each emitted is remembered in its slot."""
    install(monkeypatch, driver, release)
    session = TensorRtSession(bundle, slots=5, streams=(2, 3), plugin=plugin)
    other = OnnxSession(bundle, slots=5, threads=1, segments=True)
    slots, theirs = [session.open() for _ in range(5)], [other.open() for _ in range(5)]
    random, kept = np.random.default_rng(0), 0
    for number, samples in enumerate(chunks(30, 5)):
        chosen = random.permutation(5)[: random.integers(1, 6)]
        there = random.random((len(chosen), 2)) > 0.2
        found = session.step([slots[i] for i in chosen], samples[: len(chosen)], there)
        expected = other.step([theirs[i] for i in chosen], samples[: len(chosen)], there)
        kept += int(expected["number"].sum())
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name].dtype == expected[name].dtype
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-4)
        if number % 7 == 6:
            session.close(slots[0])
            other.close(theirs[0])
            slots[0], theirs[0] = session.open(), other.open()
    assert kept > 10


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("int onset_nms_register(void) { return 2; }", "does not take the plugin"),
        ("int onset_nms_launch(void) { return 0; }", "has the kernel alone"),
        (None, "No such file"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_refused(
    trt: FakeTensorRt, bundle: Path, tmp_path: Path, source: str | None, sentence: str
) -> None:
    path = library(tmp_path, source) if source else tmp_path / "plugin.so"
    with pytest.raises(ConfigError, match=sentence):
        TensorRtSession(bundle, slots=1, plugin=path)
    TensorRtSession(bundle, slots=1)  # moments take none


def test_plans_with_segments_are_others_than_those_without(
    trt: FakeTensorRt, bundle: Path, plugin: Path
) -> None:
    for given, built in ((None, 1), (plugin, 2), (None, 2), (plugin, 2)):
        compile_bundle(bundle, streams=(2,), plugin=given)
        assert len(trt.built) == built
    TensorRtSession(bundle, slots=2, streams=(2,), plugin=plugin)
    assert len(trt.built) == 2


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8])
def test_a_step_of_any_number_of_streams_fills_up_or_divides(
    trt: FakeTensorRt, bundle: Path, rows: int
) -> None:
    """With batches of 2 and 3: up to 2 streams, 3, and more than the largest holds."""
    session, other = TensorRtSession(bundle, slots=8, streams=(2, 3)), OnnxSession(bundle, slots=8, threads=1)
    slots, theirs = [session.open() for _ in range(8)], [other.open() for _ in range(8)]
    random = np.random.default_rng(rows)
    for samples in chunks(6, rows):
        chosen = random.permutation(8)[:rows]
        found = session.step([slots[i] for i in chosen], samples, mask(rows))
        expected = other.step([theirs[i] for i in chosen], samples, mask(rows))
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5)


def test_with_and_without_cuda_graphs_the_outputs_are_the_same(
    trt: FakeTensorRt, driver: FakeDriver, bundle: Path
) -> None:
    heard = []
    for cuda_graphs in (True, False):
        session = TensorRtSession(bundle, slots=2, cuda_graphs=cuda_graphs)
        slots, before = [session.open() for _ in range(2)], driver.launched_graphs
        heard.append([session.step(slots, samples, mask(2)) for samples in chunks(4, 2)])
        assert driver.launched_graphs - before == (4 if cuda_graphs else 0)
    for one, other in zip(*heard, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_rows_to_spare_touch_no_stream(trt: FakeTensorRt, bundle: Path) -> None:
    session = TensorRtSession(bundle, slots=2, streams=(4,))
    first, second = session.open(), session.open()
    samples = chunks(6, 1)
    alone = [session.step([first], x, mask(1))["ongoing"] for x in samples]
    later = [session.step([second], x, mask(1))["ongoing"] for x in samples]
    np.testing.assert_array_equal(alone, later)


def test_what_was_given_out_does_not_change_with_the_next_step(trt: FakeTensorRt, bundle: Path) -> None:
    session = TensorRtSession(bundle, slots=1)
    slot, samples = session.open(), chunks(2, 1)
    first = session.step([slot], samples[0], mask(1))
    kept = {name: value.copy() for name, value in first.items()}
    session.step([slot], samples[1], mask(1))
    for name in kept:
        np.testing.assert_array_equal(first[name], kept[name])


def test_a_step_takes_the_smallest_batch_that_holds_it(trt: FakeTensorRt, bundle: Path) -> None:
    session = TensorRtSession(bundle, slots=9, streams=(1, 4, 2))
    slots = [session.open() for _ in range(9)]
    ran = []
    for rows in (1, 2, 3, 4, 5, 9):
        trt.ran.clear()
        session.step(slots[:rows], chunks(1, rows)[0], mask(rows))
        ran.append(list(trt.ran))
    assert ran == [[1], [2], [4], [4], [4, 1], [4, 4, 1]]


def test_who_takes_over_a_slot_begins_from_zeros(trt: FakeTensorRt, bundle: Path) -> None:
    session, samples = TensorRtSession(bundle, slots=1), chunks(5, 1)
    heard = []
    for _ in range(2):
        slot = session.open()
        heard.append([session.step([slot], x, mask(1))["ongoing"] for x in samples])
        session.close(slot)
    np.testing.assert_array_equal(*heard)


def test_another_thread_may_take_over(trt: FakeTensorRt, bundle: Path) -> None:
    session = TensorRtSession(bundle, slots=1)
    slot = session.open()
    heard: list[object] = []
    thread = threading.Thread(target=lambda: heard.append(session.step([slot], chunks(1, 1)[0], mask(1))))
    thread.start()
    thread.join()
    assert heard


def test_a_session_that_is_dropped_gives_all_memory_back_at_once(
    trt: FakeTensorRt, driver: FakeDriver, bundle: Path
) -> None:
    gc.disable()
    try:
        session = TensorRtSession(bundle, slots=4)
        session.step([session.open()], chunks(1, 1)[0], mask(1))
        assert driver.blocks
        del session
        assert not driver.blocks
    finally:
        gc.enable()


def test_too_little_memory_is_a_sentence_and_is_given_back(trt: FakeTensorRt, bundle: Path) -> None:
    trt.driver.free = 100_000
    with pytest.raises(EngineError, match=r"not to be had on Fake GPU.*fewer streams"):
        TensorRtSession(bundle, slots=1000)
    assert not trt.driver.blocks


def test_plans_are_built_once(trt: FakeTensorRt, bundle: Path) -> None:
    TensorRtSession(bundle, slots=4, streams=(1, 4))
    assert [sorted(c._shapes["samples"]) for c in trt.built] == [[1, 3, 8], [3, 4, 8]]
    TensorRtSession(bundle, slots=4, streams=(1, 4))
    assert len(trt.built) == 2
    TensorRtSession(bundle, slots=4, streams=(1, 2))
    assert len(trt.built) == 3


@pytest.mark.parametrize(
    ("release", "driver", "precision"),
    [
        (RELEASES[2], FakeDriver(), "fp32"),
        (RELEASES[3], FakeDriver(capability=(8, 7)), "fp32"),
        (RELEASES[3], FakeDriver(device="Fake GPU 2/../x"), "fp32"),
        (RELEASES[3], FakeDriver(), "fp16"),
    ],
)
def test_another_release_gpu_or_precision_has_plans_of_its_own(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, release: str, driver: FakeDriver, precision: str
) -> None:
    install(monkeypatch, FakeDriver(), RELEASES[3])
    TensorRtSession(bundle, slots=1)
    trt = install(monkeypatch, driver, release)
    TensorRtSession(bundle, slots=1, precision=precision)  # type: ignore[arg-type]
    assert len(trt.built) == 1
    trt = install(monkeypatch, FakeDriver(), RELEASES[3])
    TensorRtSession(bundle, slots=1)
    assert not trt.built, "it took the place of the first"


def test_a_plan_of_another_gpu_under_the_same_file_name_is_not_run(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, FakeDriver(device="NVIDIA H100 80GB"))
    TensorRtSession(bundle, slots=1)
    trt = install(monkeypatch, FakeDriver(device="NVIDIA H100-80GB"))
    TensorRtSession(bundle, slots=1)
    assert "of another bundle or machine" in caplog.text
    assert len(trt.built) == 1
    (path,) = (bundle / "plans").glob("*.plan")
    assert "-sm_90-NVIDIA-H100-80GB-fp32-b1" in path.name


def cut(plan: bytes) -> bytes:
    return plan[:-10]


def flip(plan: bytes) -> bytes:
    return plan[:-10] + bytes([plan[-10] ^ 1]) + plan[-9:]


@pytest.mark.parametrize(
    "damage", [cut, flip, lambda plan: b"", lambda plan: b"onset plan 1\n[[[", lambda p: b"x" * 99]
)
def test_a_damaged_plan_never_reaches_tensorrt_and_is_built_anew(
    trt: FakeTensorRt, bundle: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    TensorRtSession(bundle, slots=1)
    (path,) = (bundle / "plans").glob("*.plan")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING):
        TensorRtSession(bundle, slots=1)
    assert "a new plan takes its place" in caplog.text
    assert path.read_bytes() == whole


def test_the_plan_of_another_bundle_under_this_name_is_not_run(
    trt: FakeTensorRt, bundle: Path, other_bundle: Path, tmp_path: Path
) -> None:
    TensorRtSession(bundle, slots=1)
    (mine,) = (bundle / "plans").glob("*.plan")
    shutil.copytree(other_bundle, tmp_path / "o")
    TensorRtSession(tmp_path / "o", slots=1)
    (theirs,) = (p for p in (tmp_path / "o" / "plans").glob("*-b1.plan") if p.name[:12] != mine.name[:12])
    content = mine.read_bytes()
    mine.write_bytes(theirs.read_bytes())
    TensorRtSession(bundle, slots=1)
    assert mine.read_bytes() == content


def test_a_plan_that_tensorrt_refuses_is_built_anew(
    trt: FakeTensorRt, bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    TensorRtSession(bundle, slots=1)
    refuse = [True, False]
    original = trt.Runtime.deserialize_cuda_engine  # type: ignore[attr-defined]
    monkeypatch.setattr(
        trt.Runtime, "deserialize_cuda_engine", lambda s, c: None if refuse.pop(0) else original(s, c)
    )
    TensorRtSession(bundle, slots=1)
    assert "refuses the plan" in caplog.text
    assert len(trt.built) == 2


def test_where_plans_cannot_be_kept_the_session_runs_and_says_so(
    trt: FakeTensorRt, bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (bundle / "plans").write_text("a file is in the way")
    session = TensorRtSession(bundle, slots=1)
    session.step([session.open()], chunks(1, 1)[0], mask(1))
    assert "each start will build them" in caplog.text


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("stat", errno.EACCES),
        ("open", errno.EIO),
        ("write_bytes", errno.ENOSPC),
        ("replace", errno.EACCES),
        ("mkdir", errno.EROFS),
        ("unlink", errno.EIO),
    ],
)
def test_nothing_that_the_machine_says_of_the_cache_stops_a_start(
    trt: FakeTensorRt,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
    code: int,
) -> None:
    """Each call that the cache makes of a file is refused: by rights, by a disk, by a share that is gone."""
    TensorRtSession(bundle, slots=1)
    real, streams = getattr(Path, call), 1 if call in ("stat", "open") else 2

    def refused(path: Path, *arguments: Any, **options: Any) -> Any:
        if bundle / "plans" in (path, path.parent):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, call, refused)
    session = TensorRtSession(bundle, slots=1, streams=(streams,))
    session.step([session.open()], chunks(1, 1)[0], mask(1))
    assert str(bundle / "plans") in caplog.text
    assert os.strerror(code) in caplog.text
    assert len(trt.built) == 2


def test_a_graph_that_cannot_be_built_is_refused_with_the_words_of_tensorrt(
    trt: FakeTensorRt, bundle: Path
) -> None:
    trt.break_build = "Could not find any implementation for node X"
    with pytest.raises(BundleError, match=r"for 1 streams: Could not find any implementation.*--workspace"):
        TensorRtSession(bundle, slots=1)


def test_each_build_that_fails_is_told_in_its_own_words(trt: FakeTensorRt, bundle: Path) -> None:
    """TensorRT keeps the first logger of a process: later ones would hear nothing."""
    for words in ("no tactic for X", "no tactic for Y"):
        trt.break_build = words
        with pytest.raises(BundleError, match=words):
            TensorRtSession(bundle, slots=1)


def test_what_an_earlier_build_said_is_not_told_of_a_later_one(
    trt: FakeTensorRt, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt.break_build = "no tactic for X"
    with pytest.raises(BundleError):
        TensorRtSession(bundle, slots=1)
    monkeypatch.setattr(trt.Builder, "build_serialized_network", lambda self, network, config: None)
    with pytest.raises(BundleError, match="it does not say why"):
        TensorRtSession(bundle, slots=1)


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("Builder", "create_network"),
        ("OnnxParser", "parse"),
        ("IBuilderConfig", "set_timing_cache"),
        ("Builder", "build_serialized_network"),
        ("Runtime", "deserialize_cuda_engine"),
        ("ICudaEngine", "create_execution_context"),
        ("IExecutionContext", "set_input_shape"),
        ("IExecutionContext", "set_tensor_address"),
        ("IExecutionContext", "execute_async_v3"),
    ],
)
def test_whatever_the_bindings_raise_is_an_error_that_a_swap_survives(
    trt: FakeTensorRt,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    call: str,
) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("out of order")

    monkeypatch.setattr(getattr(trt, kind), call, broken)
    with pytest.raises((BundleError, EngineError), match="RuntimeError: out of order"):
        TensorRtSession(bundle, slots=1)
    gc.collect()  # tracebacks point to what failed
    assert not trt.driver.blocks


@pytest.mark.parametrize(
    "call", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphLaunch"]
)
def test_where_the_driver_refuses_a_cuda_graph_steps_are_launched_without(
    trt: FakeTensorRt,
    driver: FakeDriver,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
) -> None:
    expected = TensorRtSession(bundle, slots=2, cuda_graphs=False)
    status = driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED  # type: ignore[attr-defined]

    def refuse(*arguments: Any, **options: Any) -> tuple[Any, ...]:
        if call == "cuStreamEndCapture":  # the real one ends the capture all the same
            driver.capture = None
        return status, None

    monkeypatch.setattr(driver, call, refuse)
    session = TensorRtSession(bundle, slots=2)
    assert f"no CUDA graph: {call} failed with CUDA_ERROR_STREAM_CAPTURE_INVALIDATED" in caplog.text
    slots, theirs = [session.open() for _ in range(2)], [expected.open() for _ in range(2)]
    for samples in chunks(4, 2):
        one, other = session.step(slots, samples, mask(2)), expected.step(theirs, samples, mask(2))
        for name in other:
            np.testing.assert_array_equal(one[name], other[name])
    assert driver.graphs == 0
    del session, expected
    assert not driver.blocks


def test_where_tensorrt_cannot_be_captured_steps_are_launched_without(
    trt: FakeTensorRt,
    driver: FakeDriver,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    original = trt.IExecutionContext.execute_async_v3  # type: ignore[attr-defined]
    monkeypatch.setattr(
        trt.IExecutionContext,
        "execute_async_v3",
        lambda self, stream: driver.capture is None and original(self, stream),
    )
    session = TensorRtSession(bundle, slots=1)
    session.step([session.open()], chunks(1, 1)[0], mask(1))
    assert "no CUDA graph: TensorRT could not run the step" in caplog.text
    assert driver.launched_graphs == driver.graphs == 0


def test_a_graph_that_answers_nan_to_silence_is_refused(
    trt: FakeTensorRt, tiny_bundle: Path, tmp_path: Path
) -> None:
    def poison(model: onnx.ModelProto) -> None:
        for weight in model.graph.initializer:
            values = onnx.numpy_helper.to_array(weight)
            if values.dtype == np.float32 and values.ndim == 2:
                weight.CopyFrom(onnx.numpy_helper.from_array(np.full_like(values, np.nan), weight.name))

    with pytest.raises(BundleError, match="NaN or Inf"):
        TensorRtSession(rewrite(tiny_bundle, tmp_path / "nan", poison), slots=1)


def test_a_machine_without_a_gpu_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    install(monkeypatch, FakeDriver(devices=0))
    with pytest.raises(ConfigError, match=r"no NVIDIA GPU can be used.*NO_DEVICE.*onset doctor"):
        TensorRtSession(bundle, slots=1)


def test_a_gpu_that_is_not_there_is_refused(trt: FakeTensorRt, bundle: Path) -> None:
    with pytest.raises(ConfigError, match="there is no GPU 1, this machine has 1"):
        TensorRtSession(bundle, slots=1, gpu=1)


def test_tensorrt_before_8_5_is_refused(trt: FakeTensorRt, bundle: Path) -> None:
    del trt.IExecutionContext.execute_async_v3  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"expected 8\.5 or newer"):
        TensorRtSession(bundle, slots=1)
