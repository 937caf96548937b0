"""The ending that a bundle's graph can have: one graph with it, read by a parser that knows nothing of us."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from engine import BundleError, Decoding, Frame, OnnxSession, read_bundle
from engine.choice import EngineSettings
from engine.manifest import Nms, with_nms
from engine.nms_reference import NmsSettings, keep
from engine.session import SEGMENTS, state_size
from tests.trainer.test_export import READ_BY_8_5
from trainer.ending import ending


class OnsetNMS(OpRun):
    """The node, for onnx's own evaluator: its attributes come from the graph, all it does from the oracle."""

    op_domain = "onset"

    def _run(self, scores: Any, offsets: Any, memory: Any, **attributes: Any) -> tuple[Any, ...]:
        method = "soft" if attributes.pop("soft") else "hard"
        return tuple(keep(scores, offsets, memory, NmsSettings(**attributes, method=method)))


def whole(bundle: Path) -> onnx.ModelProto:
    return onnx.load_model_from_string(with_nms(bundle, *read_bundle(bundle)))


def test_one_file_after_the_other_is_one_graph_that_ends_in_the_node(tiny_bundle: Path) -> None:
    model, step = whole(tiny_bundle), onnx.load(str(tiny_bundle / "model.onnx"))
    onnx.checker.check_model(model)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 16), ("onset", 1)]
    assert (model.ir_version, model.producer_name) == (step.ir_version, step.producer_name)
    *before, node = model.graph.node
    assert [n.op_type for n in before[: len(step.graph.node)]] == [n.op_type for n in step.graph.node]
    assert {n.op_type for n in before} <= set(READ_BY_8_5.split())
    assert (node.domain, node.op_type) == ("onset", "OnsetNMS")
    nms = read_bundle(tiny_bundle)[0].nms
    assert nms is not None
    found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert found == pytest.approx(nms.settings.attributes())


def test_the_graph_with_it_gives_the_segments_that_a_session_gives(tiny_bundle: Path) -> None:
    """onnx's evaluator on the whole graph, ONNX Runtime with the oracle behind; some frames are missing."""
    manifest, _ = read_bundle(tiny_bundle)
    assert manifest.nms is not None
    evaluator = ReferenceEvaluator(whole(tiny_bundle), new_ops=[OnsetNMS])
    session = OnnxSession(tiny_bundle, slots=3, threads=1, segments=True)
    slots = [session.open() for _ in range(3)]
    random = np.random.default_rng(0)
    state = np.zeros((3, state_size(manifest)), np.float32)
    memory, kept = np.zeros((3, manifest.nms.memory_size), np.float32), 0
    names = [output.name for output in evaluator.proto_.graph.output]
    for _ in range(40):
        samples = random.standard_normal((3, manifest.chunk_samples, 3)).astype(np.float32)
        mask = random.random((3, manifest.chunk)) > 0.3
        feed = {"samples": samples, "mask": mask.astype(np.float32), "state": state, "memory": memory}
        whole_step = dict(zip(names, evaluator.run(None, feed), strict=True))
        state, memory = whole_step.pop("next_state"), whole_step.pop("next_memory")
        found = session.step(slots, samples, mask)
        assert found.keys() == whole_step.keys()
        for name in found:
            np.testing.assert_allclose(found[name], whole_step[name], rtol=0, atol=2e-4, err_msg=name)
        kept += int(found["number"].sum())
    assert kept > 10


def test_of_a_frame_that_is_missing_nothing_is_kept(tiny_bundle: Path) -> None:
    session = OnnxSession(tiny_bundle, slots=1, threads=1, segments=True)
    slot, random = session.open(), np.random.default_rng(1)
    for _ in range(20):
        samples = random.standard_normal((1, 8, 3)).astype(np.float32)
        assert session.step([slot], samples, np.zeros((1, 2), bool))["number"] == 0


def test_what_a_stream_emitted_suppresses_until_its_slot_is_given_to_another(tiny_bundle: Path) -> None:
    session = OnnxSession(tiny_bundle, slots=1, threads=1, segments=True)
    nms = session.manifest.nms
    assert nms is not None
    random = np.random.default_rng(2)
    chunks = random.standard_normal((60, 1, 8, 3)).astype(np.float32)

    def segments() -> list[tuple[int, float, float]]:
        slot, found = session.open(), []
        for number, samples in enumerate(chunks, start=1):
            step = session.step([slot], samples, np.ones((1, 2), bool))
            for place in range(int(step["number"][0])):
                start, end = step["segments"][0, place] + 8 * number
                found.append((int(step["labels"][0, place]), float(start), float(end)))
        session.close(slot)
        return found

    first = segments()
    assert len(first) > 10
    for number, (label, start, end) in enumerate(first):
        assert 0 <= start <= end <= 480
        for other, start_of_other, end_of_other in first[:number]:
            inter = min(end, end_of_other) - max(start, start_of_other)
            union = max(end, end_of_other) - min(start, start_of_other)
            assert other != label or inter / union <= nms.settings.iou_threshold
    assert segments() == first


def test_what_decoding_asks_of_an_end_the_node_is_told() -> None:
    frame = Frame(sample_rate=50, hop=4, channels=3)
    decoding = Decoding(end_threshold=0.3, gate=0.4, nms_tiou=0.25, min_duration=1.5)
    found = ending(decoding, frame, chunk=2, classes=3)
    assert found is not None
    settings = found[0].settings
    assert (settings.hop, settings.method, settings.max_segments) == (4, "hard", 6)
    assert (settings.score_threshold, settings.iou_threshold, settings.min_length) == (0.4, 0.25, 75)


def test_frames_too_long_for_the_node_have_no_ending() -> None:
    assert ending(Decoding(), Frame(sample_rate=1e5, hop=2**17, channels=1), chunk=1, classes=1) is None
    assert ending(Decoding(), Frame(sample_rate=1e5, hop=2**16, channels=1), chunk=512, classes=1) is None
    assert ending(Decoding(), Frame(sample_rate=1e5, hop=2**16, channels=1), chunk=256, classes=1)


@pytest.mark.parametrize(
    ("ruin", "sentence"),
    [
        (lambda bundle: (bundle / "nms.onnx").unlink(), "nms.onnx: not readable"),
        (lambda bundle: (bundle / "nms.onnx").write_bytes(b""), "is not the file"),
        (lambda bundle: (bundle / "nms.onnx").write_bytes(bytes(2**20)), "larger than 65536 bytes"),
        (lambda bundle: forget(bundle), "has no nms.onnx"),
        (
            lambda bundle: change(bundle, lambda nms: nms["settings"].update(score_threshold=0.001)),
            "was changed",
        ),
        (lambda bundle: change(bundle, lambda nms: nms.update(remembered=7)), "was changed"),
    ],
    ids=["missing", "another", "huge", "never had", "other settings", "another memory"],
)
def test_without_its_ending_a_bundle_gives_moments_and_refuses_segments(
    tiny_bundle: Path, tmp_path: Path, ruin: Any, sentence: str
) -> None:
    for name in ("bundle.json", "model.onnx", "nms.onnx"):
        (tmp_path / name).write_bytes((tiny_bundle / name).read_bytes())
    ruin(tmp_path)
    OnnxSession(tmp_path, slots=1)
    with pytest.raises(BundleError, match=sentence):
        OnnxSession(tmp_path, slots=1, segments=True)


def forget(bundle: Path) -> None:
    """As exported before there were endings."""
    values = json.loads((bundle / "bundle.json").read_text())
    del values["nms"]
    (bundle / "bundle.json").write_text(json.dumps(values))


def change(bundle: Path, what: Callable[[dict[str, Any]], None]) -> None:
    """The manifest says something else than the node does."""
    values = json.loads((bundle / "bundle.json").read_text())
    what(values["nms"])
    (bundle / "bundle.json").write_text(json.dumps(values))


def test_its_memory_is_bounded_in_the_manifest() -> None:
    with pytest.raises(ValueError, match="remembered"):
        Nms(settings=NmsSettings(hop=1), remembered=10**6, sha256="0" * 64)


def test_the_page_on_tensorrt_shows_the_tensors_and_settings_that_there_are() -> None:
    root = Path(__file__).resolve().parents[2]
    page, graph = (
        (root / "engine" / "TENSORRT.md").read_text(),
        whole(root / "deploy" / "demo" / "bundle").graph,
    )
    shapes = {
        tensor.name: ", ".join(str(d.dim_param or d.dim_value) for d in tensor.type.tensor_type.shape.dim)
        for tensor in (*graph.input, *graph.output)
    }
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (B[B\d, ]*) \|", page, flags=re.M)
    shown = {name: shape for names, shape in rows for name in re.findall(r"\w+", names)}
    told = {tensor.name for tensor in graph.input} | set(SEGMENTS)
    assert shown == {name: shapes[name] for name in told}
    trtexec = re.findall(r"(\w+):([\dx]+)", page[page.index("--shapes=") :])
    assert dict(trtexec) == {t.name: shapes[t.name].replace("B", "1").replace(", ", "x") for t in graph.input}
    (settings,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.S)
    assert EngineSettings.model_validate(yaml.safe_load(settings)["engine"]).streams == (1, 8, 64)
