"""`onset doctor` and `onset compile`: on this machine as it is, and on machines that are made up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import BundleError, ConfigError, compiler
from engine.compiler import compile_bundle
from engine.doctor import Finding, diagnose, machine
from engine.gpu import Gpu
from engine.plans import PlanCache
from tests.engine.fake_driver import FakeDriver
from tests.engine.fake_tensorrt import RELEASES, install

ROOT = Path(__file__).resolve().parents[2]


def onset(
    *arguments: str, isolated: bool = False, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    hidden = (
        "import sys; sys.modules.update(onnxruntime=None, tensorrt=None, cuda=None); " if isolated else ""
    )
    at = f"import sys; sys.path[0] = {str(ROOT)!r}; "  # as the command `onset` has no working directory there
    code = f"{at}{hidden}import onset; sys.argv = ['onset', *sys.argv[1:]]; onset.main()"
    command = [sys.executable, "-c", code, *arguments]
    known = os.environ | environment
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=known)


def trap(folder: Path, name: str) -> Path:
    """A library in `folder` that leaves `sprung` in the working directory and says so when it is loaded."""
    folder.mkdir()
    (folder / "trap.c").write_text(
        "#include <stdio.h>\n__attribute__((constructor)) static void spring(void)"
        '{ fclose(fopen("sprung", "w")); fputs("sprung!", stderr); }'
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", name, "trap.c"], cwd=folder, check=True)
    for place in (folder, folder / name):
        place.chmod(0o755)
    return folder / name


def finding(what: str, bundle: Path | None = None) -> Finding:
    return next(f for f in diagnose(bundle).findings if f.what == what)


def test_this_machine_can_run_a_bundle_and_the_exit_status_says_so() -> None:
    done = onset("doctor")
    assert done.returncode == 0, done.stderr
    assert "ok      onnxruntime" in done.stdout


def test_a_machine_with_nothing_is_told_what_to_install() -> None:
    done = onset("doctor", isolated=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for words in ("pip install '.[cpu]'", "pip install '.[tensorrt]'", "no engine can run a bundle here"):
        assert words in done.stdout


def test_an_engine_that_is_asked_for_has_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert onset("doctor", "--engine", "tensorrt", isolated=True).returncode == 1
    done = onset("doctor", "--engine", "tensort")
    assert done.returncode == 2
    assert "expected onnxruntime or tensorrt" in done.stderr


def test_a_machine_with_a_gpu_shows_it_with_its_plans(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, tmp_path: Path
) -> None:
    install(monkeypatch, FakeDriver(), RELEASES[1])
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "b", ignore=shutil.ignore_patterns("plans")))
    assert diagnose(bundle).engines == ("onnxruntime", "tensorrt")
    assert finding("GPU").found == "Fake GPU (sm_90), driver for CUDA 12.6"
    assert finding("TensorRT").found == RELEASES[1]
    assert "onset compile" in finding("plans", bundle).advice
    compile_bundle(bundle, "fp16", (1, 8))
    assert finding("plans", bundle).found == "fp16 for 1 streams, fp16 for 8 streams"
    install(monkeypatch, FakeDriver(capability=(8, 9)), RELEASES[1])
    assert "2 in" in finding("plans", bundle).found
    assert finding("plans", bundle).good is None


def test_a_gpu_that_is_too_old_is_not_called_good(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeDriver(capability=(6, 1)))
    assert diagnose(None).engines == ("onnxruntime",)
    assert "too old" in finding("GPU").advice


def test_a_plugin_that_cannot_be_loaded_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "libonset_nms.so"
    path.write_bytes(b"not a library")
    path.chmod(0o644)
    found = next(f for f in diagnose(None, path).findings if f.what == "NMS plugin")
    assert found.good is False
    assert "build it on this machine" in found.advice


def test_nothing_is_loaded_from_where_one_happens_to_stand(tmp_path: Path) -> None:
    """Neither by a name of its own, nor because a path of the environment says so without a word."""
    trap(tmp_path / "build", "libonset_nms.so")
    done = onset("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "sprung").exists()
    assert "no --plugin was given" in done.stdout
    done = onset("doctor", cwd=tmp_path, LD_LIBRARY_PATH=":/opt/cuda/lib", PYTHONPATH="")
    assert "LD_LIBRARY_PATH: ':/opt/cuda/lib' has an empty or relative part" in done.stdout
    assert "PYTHONPATH:" not in done.stdout


def test_a_plugin_that_is_named_is_shown_and_then_loaded(tmp_path: Path) -> None:
    library = trap(tmp_path / "build", "libonset_nms.so")
    done = onset("doctor", "--plugin", "build/libonset_nms.so", cwd=tmp_path)
    shown = "".join(done.stderr.split())
    assert f"loading{library}intothisprocess" in shown, done.stderr
    assert shown.index(str(library)) < shown.index("sprung!"), "its code ran before it was named"


def test_compile_with_segments_takes_a_plugin_that_is_named(tiny_bundle: Path) -> None:
    for given in (["--segments"], ["--plugin", "libonset_nms.so"]):
        done = onset("compile", str(tiny_bundle), *given)
        assert done.returncode == 2
        assert "--segments and --plugin go together" in done.stderr


@pytest.mark.parametrize(
    ("release", "name"),
    [
        ("# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref", "JetPack 5.1"),
        ("# R36 (release), REVISION: 4.3", "JetPack 6"),
        ("# R38 (release), REVISION: 2.0", "JetPack 7"),
        ("# R32 (release), REVISION: 7.1", "Jetson Linux 32"),
        ("", "Jetson Linux unknown"),
    ],
)
def test_a_jetson_is_known_by_its_release(tmp_path: Path, release: str, name: str) -> None:
    (tmp_path / "release").write_text(release)
    assert machine(tmp_path / "release") == name


@pytest.mark.parametrize(
    ("here", "words"),
    [
        ("JetPack 5.1", "move to JetPack 6"),
        ("JetPack 6", "apt install tensorrt"),
        ("JetPack 7", "apt install tensorrt"),
        ("x86_64", "pip install '.[tensorrt]'"),
    ],
)
def test_what_to_install_depends_on_the_machine(
    monkeypatch: pytest.MonkeyPatch, here: str, words: str
) -> None:
    monkeypatch.setattr("engine.doctor.machine", lambda: here)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert words in finding("TensorRT").advice


def test_compile_builds_what_is_lacking_and_shows_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, tmp_path: Path
) -> None:
    trt = install(monkeypatch, FakeDriver())
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "b", ignore=shutil.ignore_patterns("plans")))
    said: list[tuple[str, float | None]] = []
    compile_bundle(bundle, streams=(1, 4), report=lambda doing, done: said.append((doing, done)))
    assert ("1 streams: building", 1.0) in said
    assert ("4 streams: reading the graph", None) in said
    assert len(trt.built) == 2
    plans = compile_bundle(bundle, streams=(1, 4, 8), workspace=64)
    assert len(trt.built) == 3
    assert trt.built[-1]._workspace == 64 * 2**20
    assert all(plan.is_file() for plan in plans)


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [flip, lambda c: c[:-1], lambda c: b"", lambda c: b"..."])
def test_a_timing_cache_grows_from_build_to_build_and_one_that_is_damaged_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
    tiny_bundle: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[bytes], bytes],
) -> None:
    install(monkeypatch, FakeDriver())
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "b", ignore=shutil.ignore_patterns("plans")))
    compile_bundle(bundle, streams=(1, 2, 4))
    (timing,) = (bundle / "plans").glob("*.timing")
    whole = timing.read_bytes()
    assert whole.endswith(b"}\n...")
    timing.write_bytes(damage(whole))
    compile_bundle(bundle, streams=(8,))
    assert "tactics are timed anew" in caplog.text
    assert timing.read_bytes().endswith(b"}\n.")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"of another GPU", "refuses"),
        (b"??", "refuses"),
        (b"..!", "a timing that no tactic has; it is tried"),
    ],
)
def test_a_timing_cache_that_tensorrt_refuses_or_cannot_build_with_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
    tiny_bundle: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    content: bytes,
    words: str,
) -> None:
    install(monkeypatch, FakeDriver())
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "b", ignore=shutil.ignore_patterns("plans")))
    cache, key = PlanCache(bundle), compiler.key_of(b"", Gpu(), "fp32", 1)
    cache.keep_timing(key, content)
    compile_bundle(bundle, streams=(8,))
    assert words in caplog.text
    assert cache.timing(key) == b"."


def test_a_report_that_fails_in_a_thread_of_tensorrt_goes_no_further(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """There the bindings make of a Python exception a C++ one that nobody catches."""
    install(monkeypatch, FakeDriver())
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "b", ignore=shutil.ignore_patterns("plans")))
    compile_bundle(bundle, streams=(1,), report=lambda doing, done: done and 1 / 0)
    assert "progress of the build cannot be told: ZeroDivisionError" in caplog.text


def test_plans_that_cannot_be_kept_are_no_success_of_compile(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, tmp_path: Path
) -> None:
    install(monkeypatch, FakeDriver())
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "b", ignore=shutil.ignore_patterns("plans")))
    (bundle / "plans").write_text("a file is in the way")
    with pytest.raises(ConfigError, match="plans cannot be kept there"):
        compile_bundle(bundle, streams=(1,))


@pytest.mark.parametrize("release", RELEASES)
def test_fp32_means_fp32(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, tmp_path: Path, release: str
) -> None:
    trt = install(monkeypatch, FakeDriver(), release)
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "b", ignore=shutil.ignore_patterns("plans")))
    compile_bundle(bundle, streams=(1,))
    assert trt.built[0]._flags == set()


def test_before_tensorrt_10_the_builder_is_told_what_must_not_be_in_half_precision(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, tmp_path: Path
) -> None:
    trt = install(monkeypatch, FakeDriver(), "8.5.3.1")
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "b", ignore=shutil.ignore_patterns("plans")))
    compile_bundle(bundle, "fp16", (1,))
    (config,) = trt.built
    flags = trt.BuilderFlag  # type: ignore[attr-defined]
    assert config._flags == {flags.FP16, flags.OBEY_PRECISION_CONSTRAINTS}
    assert config._sources == 0b11000  # neither cuBLAS, nor cuBLASLt, nor cuDNN
    kinds = {layer.kind: layer.precision for layer in config._network._layers}
    assert kinds["MatMul"] is None
    assert kinds["Softmax"] == kinds["ReduceMean"] == kinds["Add"] == trt.DataType.FLOAT  # type: ignore[attr-defined]
    assert kinds["Shape"] is None, "what counts integers has no such precision"
    with pytest.raises(ConfigError, match="does not know bf16"):
        compile_bundle(bundle, "bf16", (1,))


def test_what_cannot_be_compiled_is_refused_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, tmp_path: Path
) -> None:
    install(monkeypatch, FakeDriver(capability=(7, 5)))
    with pytest.raises(ConfigError, match="calibration"):
        compile_bundle(tiny_bundle, "int8")
    with pytest.raises(ConfigError, match="expected fp32, fp16, bf16"):
        compile_bundle(tiny_bundle, "fp64")
    with pytest.raises(ConfigError, match="expected numbers from 1 to 4096"):
        compile_bundle(tiny_bundle, streams=(0, 1))
    with pytest.raises(ConfigError, match="sm_80 and newer do"):
        compile_bundle(tiny_bundle, "bf16", (1,))
    with pytest.raises(BundleError, match="not a bundle"):
        compile_bundle(tmp_path)


def test_compile_without_a_gpu_is_one_sentence_and_status_2(tiny_bundle: Path) -> None:
    done = onset("compile", str(tiny_bundle), isolated=True)
    assert done.returncode == 2
    assert "cuda-bindings" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bundle_that_lost_its_ending_is_still_looked_at(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, tmp_path: Path
) -> None:
    install(monkeypatch, FakeDriver(), RELEASES[1])
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "b", ignore=shutil.ignore_patterns("plans")))
    (bundle / "nms.onnx").unlink()
    compile_bundle(bundle, streams=(2,))
    assert finding("plans", bundle).found == "fp32 for 2 streams"
    assert finding("segments", bundle).good is False
    assert "nms.onnx: not readable" in finding("segments", bundle).found
