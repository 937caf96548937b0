"""The ending of a bundle, `nms.onnx`: an OnsetNMS node behind the step, see `engine.manifest.Nms`.

Written with onnx's own helpers: a model whose nodes read what the step gives, and which has no name and no
version of its own, so that merged with the step, which it follows, it takes nothing from it.
"""

from __future__ import annotations

from onnx import ModelProto, TensorProto, helper

from engine.manifest import Decoding, Frame, Nms
from engine.nms_reference import FAR, LARGEST_TIME, MAX_HOP, Kept, NmsSettings

DOMAIN = "onset"
REMEMBERED = 64


def ending(decoding: Decoding, frame: Frame, chunk: int, classes: int) -> tuple[Nms, bytes] | None:
    """What keeps the ends that `decoding` lets pass, and the file; None where frames are too long for it.

    Hard suppression, so that no two segments of a class that were given out overlap by `nms_tiou`. It decides
    on each chunk at once: what `gate` and `end_threshold` ask for is asked for, but nothing is held back.
    """
    if frame.hop > MAX_HOP or chunk * frame.hop > LARGEST_TIME:
        return None
    settings = NmsSettings(
        hop=frame.hop,
        score_threshold=max(decoding.end_threshold, decoding.gate),
        min_length=min(max(1, round(decoding.min_duration * frame.sample_rate)), LARGEST_TIME),
        method="hard",
        iou_threshold=max(decoding.nms_tiou, 1e-6),
        max_segments=min(64, chunk * classes),
    )
    model = _model(settings, chunk, classes).SerializeToString()
    digest = Nms.digest(settings, REMEMBERED, model)
    return Nms(settings=settings, remembered=REMEMBERED, sha256=digest), model


def _model(settings: NmsSettings, chunk: int, classes: int) -> ModelProto:
    # As `logits_there`: 0 is added for a frame that is there.
    constants = {"one": 1.0, "far": float(FAR)}
    names = {name: f"nms/{name}" for name in (*constants, "axes", "missing", "off", "each", "scores")}
    nodes = [
        helper.make_node("Sub", ["mask", names["one"]], [names["missing"]]),
        helper.make_node("Mul", [names["missing"], names["far"]], [names["off"]]),
        helper.make_node("Unsqueeze", [names["off"], names["axes"]], [names["each"]]),
        helper.make_node("Add", ["end", names["each"]], [names["scores"]]),
        helper.make_node(
            "OnsetNMS",
            [names["scores"], "end_offsets", "memory"],
            outputs := [*Kept._fields[:-1], "next_memory"],
            domain=DOMAIN,
            **settings.attributes(),
        ),
    ]
    model = ModelProto()
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    graph = model.graph
    graph.node.extend(nodes)
    for name, value in constants.items():
        graph.initializer.append(helper.make_tensor(names[name], TensorProto.FLOAT, [1], [value]))
    graph.initializer.append(helper.make_tensor(names["axes"], TensorProto.INT64, [1], [2]))
    memory = ["B", 1 + 3 * REMEMBERED]
    most = settings.max_segments
    shapes = ["B", most, 2], ["B", most], ["B", most], ["B"], memory
    types = TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT32, TensorProto.FLOAT
    graph.input.append(helper.make_tensor_value_info("memory", TensorProto.FLOAT, memory))
    graph.value_info.append(
        helper.make_tensor_value_info(names["scores"], TensorProto.FLOAT, ["B", chunk, classes])
    )
    for name, kind, shape in zip(outputs, types, shapes, strict=True):
        graph.output.append(helper.make_tensor_value_info(name, kind, shape))
    return model
