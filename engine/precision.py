"""Half precision in the graph: which operations take it, as a pass over ONNX.

For strongly typed TensorRT, where a network computes in the types that its graph writes down. The rule is
short: products (`PRODUCTS`) take and give half precision, everything else stays in float32. Products are
where the arithmetic and the weights are, and what tensor cores are for. What stays:

- norms (ReduceMean, Sub, Pow, Sqrt, Div): the square of an activation leaves the range of fp16 from 256 on,
  and a variance is a mean of differences of near numbers;
- Softmax, Erf, Exp and other curves: they amplify what their input lost;
- Add: the residual stream is a sum over all layers, whose rounding would add up;
- positions, phases and ages (Floor, Range, Equal, Cast): not all integers beyond 2048 (fp16) or 256 (bf16)
  can be told apart;
- the state, whose values are kept for a whole receptive field; and all inputs and outputs, so that a session
  feeds the same types whatever the precision.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from engine.errors import BundleError, ConfigError

PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})
_LARGEST_HALF = 65504.0


def in_precision(graph: bytes, precision: Literal["fp16", "bf16"]) -> bytes:
    """The graph with its products in half precision; inputs, outputs and state are float32 as before.

    Raises ConfigError without the `onnx` package, BundleError for weights that fp16 cannot hold.
    """
    try:
        import onnx
    except ImportError:
        raise ConfigError(
            f"`onnx` is not installed, which {precision} takes to compile (not to run): `pip install onnx`; "
            "fp32 does without"
        ) from None
    try:
        model = onnx.load_model_from_string(graph)
    except Exception as problem:  # of the protobuf that is installed
        raise BundleError(f"the graph is not ONNX that can be read: {problem}; export it again") from None
    half = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.BFLOAT16
    constants = _constants(onnx, model.graph)
    nodes: list[Any] = []
    halved: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type not in PRODUCTS:
            nodes.append(node)
            continue
        for place, name in enumerate(node.input):
            if name and name not in halved:
                halved[name] = f"{name}/{precision}"
                if name in constants:
                    model.graph.initializer.append(_halved(onnx, constants[name], halved[name], half))
                else:
                    nodes.append(onnx.helper.make_node("Cast", [name], [halved[name]], to=half))
            node.input[place] = halved.get(name, name)
        result = node.output[0]
        node.output[0] = f"{result}/{precision}"
        nodes += [node, onnx.helper.make_node("Cast", [node.output[0]], [result], to=onnx.TensorProto.FLOAT)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _drop_unread(model.graph)
    return bytes(model.SerializeToString())


def _constants(onnx: Any, graph: Any) -> dict[str, Any]:
    """Float weights by name, whether initializers or the output of a Constant."""
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return {name: tensor for name, tensor in found.items() if tensor.data_type == onnx.TensorProto.FLOAT}


def _halved(onnx: Any, tensor: Any, name: str, half: int) -> Any:
    values = np.asarray(onnx.numpy_helper.to_array(tensor))
    if half == onnx.TensorProto.FLOAT16 and np.abs(values).max(initial=0.0) > _LARGEST_HALF:
        raise BundleError(
            f"the weights `{tensor.name}` reach {np.abs(values).max():.3g}, beyond the {_LARGEST_HALF:g} "
            "of fp16; use bf16 or fp32"
        )
    if half == onnx.TensorProto.FLOAT16:
        return onnx.numpy_helper.from_array(values.astype(np.float16), name)
    return onnx.helper.make_tensor(name, half, values.shape, _bfloat16(values).tobytes(), raw=True)


def _bfloat16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The upper half of each float32, rounded to nearest, ties to even, as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _drop_unread(graph: Any) -> None:
    """Without the float32 weights that only products read."""
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
