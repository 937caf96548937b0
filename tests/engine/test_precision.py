"""Half precision in the graph: what takes it, what does not, and what it costs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from engine import BundleError, read_bundle
from engine.precision import PRODUCTS, in_precision

HALVES = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
# Of fp16 products, over 200 steps of noise through the shipped bundle: 7e-4 was seen of probabilities, and of
# offsets 4e-3. Each product rounds by 2^-11, and thirty follow each other. A wrong pass is far beyond.
BOUND = 2e-2


@pytest.fixture(scope="module")
def graph(hapt_bundle: Path) -> bytes:
    return read_bundle(hapt_bundle)[1]


def steps(graph: bytes, count: int) -> list[dict[str, np.ndarray]]:
    """Outputs of two streams of noise. ONNX Runtime rounds to half where the graph says so."""
    run = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [node.name for node in run.get_outputs()]
    shapes = {node.name: (2, *node.shape[1:]) for node in run.get_inputs()}
    random = np.random.default_rng(0)
    feed = {"mask": np.ones(shapes["mask"], np.float32), "state": np.zeros(shapes["state"], np.float32)}
    heard = []
    for _ in range(count):
        feed["samples"] = random.standard_normal(shapes["samples"]).astype(np.float32)
        heard.append(dict(zip(names, run.run(names, feed), strict=True)))
        feed["state"] = heard[-1]["next_state"]
    return heard


def types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=False)
    values = (*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input)
    return {v.name: v.type.tensor_type.elem_type for v in values} | {
        t.name: t.data_type for t in inferred.graph.initializer
    }


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_products_alone_are_in_half_precision(graph: bytes, precision: Any) -> None:
    model = onnx.load_model_from_string(in_precision(graph, precision))
    onnx.checker.check_model(model)
    of, seen = types(model), Counter[str]()
    for node in model.graph.node:
        floats = {of.get(name) for name in (*node.input, *node.output)} & {
            onnx.TensorProto.FLOAT,
            *HALVES.values(),
        }
        if node.op_type in PRODUCTS:
            assert floats == {HALVES[precision]}, node.name
            seen[node.op_type] += 1
        elif node.op_type != "Cast":
            assert not floats & set(HALVES.values()), node.name
    original = Counter(n.op_type for n in onnx.load_model_from_string(graph).graph.node)
    assert seen == Counter({kind: original[kind] for kind in PRODUCTS if original[kind]})


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_inputs_outputs_and_state_stay_as_they_are(graph: bytes, precision: Any) -> None:
    before, after = (onnx.load_model_from_string(g) for g in (graph, in_precision(graph, precision)))
    for kind in ("input", "output"):
        assert list(getattr(after.graph, kind)) == list(getattr(before.graph, kind))


def test_weights_of_products_take_half_the_space(graph: bytes) -> None:
    assert len(in_precision(graph, "fp16")) < 0.75 * len(graph)


def test_what_fp16_says_stays_near_what_fp32_says(graph: bytes) -> None:
    worst = Counter[str]()
    for exact, half in zip(steps(graph, 200), steps(in_precision(graph, "fp16"), 200), strict=True):
        for name in exact.keys() - {"next_state"}:
            worst[name] = max(
                worst[name], float(np.abs(probability(exact, name) - probability(half, name)).max())
            )
    assert max(worst.values()) < BOUND, worst
    assert max(worst.values()) > 0, "nothing was rounded"


def probability(outputs: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Logits as probabilities; offsets as they are."""
    return outputs[name] if "offset" in name else 1 / (1 + np.exp(-outputs[name].astype(np.float64)))


def test_bf16_weights_are_rounded_to_the_nearest() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -3.1415927, 1e38, 0.0], np.float32)
    weights = onnx.numpy_helper.from_array(values.reshape(2, 3), "w")
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
            "g",
            [onnx.helper.make_tensor_value_info("x", 1, ["B", 2])],
            [onnx.helper.make_tensor_value_info("y", 1, ["B", 3])],
            [weights],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 16)],
    )
    (found,) = onnx.load_model_from_string(in_precision(model.SerializeToString(), "bf16")).graph.initializer
    widened = (np.frombuffer(found.raw_data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    # Ties go to the even neighbour: 1 + 2^-8 down to 1, 1 + 3 2^-8 up to 1 + 2^-6.
    np.testing.assert_array_equal(
        widened, np.array([1.0, 1.0, 1.015625, -3.140625, widened[4], 0.0], np.float32)
    )
    assert abs(widened[4] / 1e38 - 1) < 2**-8


def test_weights_beyond_fp16_are_refused(graph: bytes) -> None:
    model = onnx.load_model_from_string(graph)
    for node in model.graph.node:
        for tensor in model.graph.initializer:
            if node.op_type == "MatMul" and tensor.name in node.input:
                values = onnx.numpy_helper.to_array(tensor) + np.float32(1e5)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    with pytest.raises(BundleError, match="beyond the 65504 of fp16; use bf16 or fp32"):
        in_precision(model.SerializeToString(), "fp16")
