"""The setting that chooses an engine, and the session that it opens."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engine import ConfigError, OnnxSession
from engine.choice import EngineSettings, open_session
from engine.schema import parse
from engine.tensorrt_session import TensorRtSession
from tests.engine.fake_driver import FakeDriver
from tests.engine.fake_tensorrt import install


def test_without_a_word_it_is_onnx_runtime(tiny_bundle: Path) -> None:
    session = open_session(tiny_bundle, 3, 1, EngineSettings())
    assert isinstance(session, OnnxSession)
    assert session.capacity == 3


def test_tensorrt_is_opened_as_the_settings_say(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, tmp_path: Path
) -> None:
    trt = install(monkeypatch, FakeDriver())
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "b", ignore=shutil.ignore_patterns("plans")))
    values = {
        "kind": "tensorrt",
        "precision": "fp16",
        "streams": [1, 4],
        "cuda_graphs": False,
        "workspace": 32,
    }
    session = open_session(bundle, 3, None, parse(EngineSettings, values, "here"))
    assert isinstance(session, TensorRtSession)
    assert session.capacity == 3
    assert sorted(path.name.split("-", 2)[2] for path in (bundle / "plans").glob("*.plan")) == [
        "sm_90-Fake-GPU-fp16-b1.plan",
        "sm_90-Fake-GPU-fp16-b4.plan",
    ]
    assert {config._workspace for config in trt.built} == {32 * 2**20}
    assert not trt.driver.launched_graphs


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "tensort"}, "kind"),
        ({"kind": "tensorrt", "precison": "fp16"}, "did you mean `precision`"),
        ({"kind": "tensorrt", "precision": "int8"}, "precision"),
        ({"kind": "tensorrt", "streams": [0]}, "streams.0"),
        ({"kind": "tensorrt", "streams": [5000]}, "streams.0"),
        ({"kind": "tensorrt", "gpu": -1}, "gpu"),
    ],
)
def test_a_wrong_setting_is_named(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(EngineSettings, values, "engine")
