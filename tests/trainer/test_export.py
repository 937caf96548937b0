"""The exported graph is one that every TensorRT from 8.5 on can read."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from tests.tiny import random_detector, write_bundle_of
from trainer.detector import DetectorShape
from trainer.pyramid import PyramidShape

OPSET_OF_8_5 = 17
# What the parser of TensorRT 8.5 imports of all that we might come to use (onnx-tensorrt, branch
# release/8.5-GA, docs/operators.md). LayerNormalization is not among them: that came with 8.6. OneHot that
# page denies, and of pools it grants 2-D ones alone, but the source beside it (builtin_op_importers.cpp,
# onnx2trt_utils.cpp) imports OneHot, and makes 1-D pools 2-D.
READ_BY_8_5 = """
    Abs Add And ArgMax AveragePool Cast Ceil Clip Concat Constant ConstantOfShape Conv Div Equal Erf Exp
    Expand Flatten Floor Gather GatherElements Gemm Greater GreaterOrEqual Identity LeakyRelu Less
    LessOrEqual Log MatMul Max MaxPool Min Mul Neg Not OneHot Or Pad Pow Range Reciprocal ReduceMax
    ReduceMean ReduceMin ReduceSum Relu Reshape Round Shape Sigmoid Sign Slice Softmax Softplus Split
    Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze Where Xor
"""
FLOAT, INTEGERS = (
    onnx.TensorProto.FLOAT,
    (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL),
)


@pytest.mark.parametrize("beats", [0, 2])
@pytest.mark.parametrize("hop", [0, 4])
@pytest.mark.parametrize("relative", [False, True])
def test_the_graph_holds_nothing_that_tensorrt_8_5_cannot_read(
    tmp_path: Path, hop: int, relative: bool, beats: int
) -> None:
    pyramid = PyramidShape(16, 2, 5, 4, chunk=2, stem=1, embed=1, relative=relative, expansion=2)
    shape = DetectorShape(3, 3, pyramid, hop=hop, stem_width=8, beats=beats if hop else 0, sample_rate=50.0)
    check(onnx.load(str(write_bundle_of(random_detector(shape), tmp_path / "b") / "model.onnx")))


def test_nor_does_that_of_the_shipped_bundle(hapt_bundle: Path) -> None:
    check(onnx.load(str(hapt_bundle / "model.onnx")))


def check(model: onnx.ModelProto) -> None:
    (opset,) = model.opset_import
    assert opset.domain == ""
    assert opset.version <= OPSET_OF_8_5
    assert {node.op_type for node in model.graph.node} - set(READ_BY_8_5.split()) == set()
    # Of Slice and Unsqueeze, the axes have to be known when the graph is read.
    known = {t.name for t in model.graph.initializer}
    known |= {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
    for node in model.graph.node:
        if node.op_type in ("Slice", "Unsqueeze"):
            axes = node.input[3 if node.op_type == "Slice" else 1]
            assert axes in known, f"{node.name}: axes {axes} are computed"
    types = {t.data_type for t in model.graph.initializer}
    types |= {n.attribute[0].t.data_type for n in model.graph.node if n.op_type == "Constant"}
    assert types <= {FLOAT, *INTEGERS}
