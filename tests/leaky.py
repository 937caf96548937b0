"""A bundle made without torch, whose step is a leaky sum of its samples: small, quick, and a real graph."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engine import Frame, Manifest, Tensor, write_bundle

_WIDTHS = {"ongoing": 0, "start": 0, "start_offset": 1, "end": 0, "end_offsets": 2}  # 0: one for each class


def write_leaky_bundle(
    folder: Path,
    *,
    rate: float,
    channels: int,
    hop: int,
    chunk: int,
    levels: int,
    classes: int,
    seed: int = 0,
) -> Path:
    """Random weights; classes are a, b, c, ..."""
    random = np.random.default_rng(seed)
    outputs = {name: width or classes for name, width in _WIDTHS.items()}
    weights: dict[str, np.ndarray] = {
        "frames": np.array([0, chunk, hop * channels]),
        "column": np.array([1]),
        "in": random.normal(0, 1.5 / np.sqrt(hop * channels), (hop * channels, channels)).astype(np.float32),
        "leak": np.array(0.9, np.float32),
    }
    nodes = [
        helper.make_node("Reshape", ["samples", "frames"], ["rows"]),
        helper.make_node("MatMul", ["rows", "in"], ["features"]),
        helper.make_node("Unsqueeze", ["mask", "two"], ["there"]),
        helper.make_node("Mul", ["features", "there"], ["heard"]),
        helper.make_node("ReduceMean", ["heard"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("Mul", ["state", "leak"], ["kept"]),
        helper.make_node("Add", ["kept", "mean"], ["next_state"]),
        helper.make_node("Unsqueeze", ["next_state", "column"], ["before"]),
        helper.make_node("Add", ["heard", "before"], ["sum"]),
    ]
    weights["two"] = np.array([2])
    for name, width in outputs.items():
        weights[f"w_{name}"] = random.normal(0, 1, (channels, width)).astype(np.float32)
        nodes.append(helper.make_node("MatMul", ["sum", f"w_{name}"], [name]))
    graph = helper.make_graph(
        nodes,
        "leaky",
        [
            _value("samples", chunk * hop, channels),
            _value("mask", chunk),
            _value("state", channels),
        ],
        [*(_value(name, chunk, width) for name, width in outputs.items()), _value("next_state", channels)],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    data = model.SerializeToString()
    manifest = Manifest(
        name="leaky",
        graph_sha256=hashlib.sha256(data).hexdigest(),
        classes=tuple("abcdefghijklmnopqrstuvwxyz"[:classes]),
        frame=Frame(sample_rate=rate, hop=hop, channels=channels),
        chunk=chunk,
        levels=levels,
        window=1,
        receptive_field=64,
        inputs=(
            Tensor(name="samples", shape=(chunk * hop, channels)),
            Tensor(name="mask", shape=(chunk,)),
        ),
        states=(Tensor(name="sum", shape=(channels,)),),
        outputs=tuple(Tensor(name=name, shape=(chunk, width)) for name, width in outputs.items()),
    )
    write_bundle(folder, manifest, data)
    return folder


def _value(name: str, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["streams", *shape])
