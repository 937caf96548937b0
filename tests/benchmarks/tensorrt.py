"""What a step costs on TensorRT: 1, 8, 64 and 512 streams, with and without CUDA graphs, against its floor.

The floor is the longer of two times: the products' operations at the rate that one large product reaches on
this GPU in this precision, and the bytes that have to move (the weights once, each stream's state in and out,
its inputs and outputs) at the bandwidth that a gather of 1 GiB reaches. Transfers are timed alone: as many
bytes from pinned memory and back. Writes what it measured, with GPU, versions and date, to
--output/GPU-DATE.json.

    python -m tests.benchmarks.tensorrt --output tests/benchmarks/results [BUNDLE ...]
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from engine import ConfigError, Manifest, read_bundle, tensorrt_api
from engine.gpu import Gpu
from engine.precision import PRODUCTS, in_precision
from engine.session import FloatArray, state_size
from engine.tensorrt_api import Plan, Precision
from engine.tensorrt_session import TensorRtSession

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo" / "bundle"
STREAMS = (1, 8, 64, 512)
WIDTH = {"fp32": 4, "fp16": 2, "bf16": 2}


def seconds(
    work: Callable[[], object], wait: Callable[[], None] = lambda: None, repeats: int = 200
) -> dict[str, float]:
    """Median, tenth and ninetieth percentile of one call and its `wait`, after some to warm up."""
    times = []
    for number in range(repeats + 20):
        start = time.perf_counter()
        work()
        wait()
        if number >= 20:
            times.append(time.perf_counter() - start)
    low, middle, high = np.percentile(times, [10, 50, 90])
    return {"median": float(middle), "p10": float(low), "p90": float(high)}


def cost(graph: bytes) -> tuple[int, int, int]:
    """Operations of all products, two for each multiplication: of any step, and for each stream.

    Third, the numbers in all weights. Found by running the step for one stream and for two: shapes that are
    computed are not known otherwise.
    """
    model = onnx.load_model_from_string(graph)
    products = [node for node in model.graph.node if node.op_type in PRODUCTS]
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    declared = {value.name for value in model.graph.output}
    used = {name for node in products for name in (*node.input, *node.output)}
    names = sorted(used - weights.keys())
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names if n not in declared)
    run = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = []
    for streams in (1, 2):
        feed = {n.name: np.zeros((streams, *n.shape[1:]), np.float32) for n in run.get_inputs()}
        values = weights | dict(zip(names, run.run(names, feed), strict=True))
        total = 0
        for node in products:
            first, second = (values[name].shape for name in node.input[:2])
            depth = int(np.prod(second[1:])) if node.op_type == "Conv" else first[-1]
            total += 2 * values[node.output[0]].size * depth
        found.append(total)
    each = found[1] - found[0]
    return found[0] - each, each, sum(value.size for value in weights.values())


def product_rate(gpu: Gpu, precision: Precision, size: int = 8192) -> float:
    """Operations a second of one product of two matrices [size, size]."""
    value = onnx.helper.make_tensor_value_info
    weights = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    graph = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
            "product",
            [value("x", 1, ["B", size])],
            [value("y", 1, ["B", size])],
            [onnx.numpy_helper.from_array(weights, "w")],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 16)],
        ir_version=8,
    ).SerializeToString()
    if precision != "fp32" and tensorrt_api.is_strongly_typed():
        graph = in_precision(graph, precision)
    content, _ = tensorrt_api.build(graph, size, precision, 2**30, b"", lambda doing, done: None)
    plan = Plan(content, size)
    for name, tensor in plan.tensors.items():
        plan.bind(name, gpu.allocate(4 * int(np.prod(tensor.shape))))
    took = seconds(lambda: plan.enqueue(gpu.stream), gpu.wait, 20)
    return float(2 * size**3 / took["p10"])


def bandwidth(gpu: Gpu, rows: int = 1024, size: int = 2**18) -> float:
    """Bytes a second that a gather of 1 GiB reads and writes."""
    table, dense = gpu.allocate(4 * rows * size), gpu.allocate(4 * rows * size)
    index = gpu.pin(4 * rows)
    index.view(np.int32)[:] = np.arange(rows)
    where = gpu.allocate(index.nbytes)
    gpu.upload(where, index)
    took = seconds(lambda: gpu.gather(dense, table, where, rows, size), gpu.wait, 20)
    return float(2 * 4 * rows * size / took["p10"])


def transfers(gpu: Gpu, manifest: Manifest, streams: int) -> dict[str, float]:
    """The inputs of a step to the GPU, and its outputs back."""
    sizes = [
        4 * streams * sum(int(np.prod(tensor.shape)) for tensor in tensors)
        for tensors in (manifest.inputs, manifest.outputs)
    ]
    (fed, heard), (to, back) = [gpu.pin(size) for size in sizes], [gpu.allocate(size) for size in sizes]

    def both() -> None:
        gpu.upload(to, fed)
        gpu.download(heard, back)

    return seconds(both, gpu.wait)


def step(
    bundle: Path, precision: Precision, streams: int, cuda_graphs: bool, samples: FloatArray, mask: Any
) -> dict[str, float]:
    """One step of so many streams, from its samples to its outputs."""
    session = TensorRtSession(
        bundle, streams, precision=precision, streams=(streams,), cuda_graphs=cuda_graphs
    )
    slots = [session.open() for _ in range(streams)]
    return seconds(lambda: session.step(slots, samples, mask))


def steps(bundle: Path, precision: Precision, rates: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each number of streams, with and without CUDA graphs."""
    manifest, graph = read_bundle(bundle)
    (once, each, weights), random, rows = cost(graph), np.random.default_rng(0), []
    for streams in STREAMS:
        samples = random.standard_normal((streams, manifest.chunk_samples, manifest.frame.channels))
        samples, mask = samples.astype(np.float32), np.ones((streams, manifest.chunk), bool)
        operations = once + each * streams
        inside = 2 * state_size(manifest) + sum(
            int(np.prod(t.shape)) for t in (*manifest.inputs, *manifest.outputs)
        )
        moved = WIDTH[precision] * weights + 4 * streams * inside
        floor = max(operations / rates["operations"], moved / rates["bytes"])
        for cuda_graphs in (True, False):
            took = step(bundle, precision, streams, cuda_graphs, samples, mask)
            moving = transfers(Gpu(), manifest, streams)
            rows.append(
                {
                    "streams": streams, "cuda_graphs": cuda_graphs, "step": took, "transfers": moving,
                    "transfers_share": moving["median"] / took["median"], "operations": operations,
                    "bytes": moved, "floor": floor, "floor_share": floor / took["median"],
                }
            )  # fmt: skip
            sys.stderr.write(
                f"{manifest.name} {precision} {streams} streams, CUDA graphs {cuda_graphs}: "
                f"{1e3 * took['median']:.3f} ms, floor {1e3 * floor:.3f} ms\n"
            )
    return rows


def thumos(folder: Path) -> list[Path]:
    """A random bundle of ActionFormer's size on THUMOS14; none where there is no torch to make it with."""
    try:
        from tests.tiny import random_detector, write_bundle_of
        from trainer.detector import DetectorShape
        from trainer.pyramid import PyramidShape
    except ImportError as problem:
        sys.stderr.write(
            f"without a bundle of THUMOS14's size ({problem}); give one that was made elsewhere\n"
        )
        return []

    pyramid = PyramidShape(512, 4, 19, 6, chunk=4, stem=2, embed=2, expansion=4, relative=True)
    detector = random_detector(DetectorShape(2048, 20, pyramid), spread=0.0)
    return [write_bundle_of(detector, folder, 7.5, "thumos")]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="*", help="default: the shipped, and one as for THUMOS14")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--precision", action="append", choices=list(WIDTH), help="default: fp32 and fp16")
    options = parser.parse_args()
    try:
        gpu, version = Gpu(), tensorrt_api.version()
    except ConfigError as problem:
        sys.stderr.write(f"nothing measured, this needs an NVIDIA GPU with TensorRT: {problem}\n")
        return
    today = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    about = {
        "gpu": gpu.name, "architecture": gpu.architecture, "cuda_of_driver": gpu.driver_version,
        "tensorrt": version, "python": platform.python_version(), "date": today, "unit": "seconds",
    }  # fmt: skip
    results: dict[str, Any] = {**about, "rates": {}, "bundles": {}}
    with tempfile.TemporaryDirectory() as name:
        bundles = options.bundles or [DEMO, *thumos(Path(name) / "thumos")]
        for precision in options.precision or ("fp32", "fp16"):
            rates = {"operations": product_rate(Gpu(), precision), "bytes": bandwidth(Gpu())}
            results["rates"][precision] = rates
            for number, bundle in enumerate(bundles):
                # A copy, so that plans are not left beside what was measured.
                copy = Path(name) / f"{number}"
                shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns("plans"), dirs_exist_ok=True)
                rows = steps(copy, precision, rates)
                results["bundles"].setdefault(read_bundle(copy)[0].id, {})[precision] = rows
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{gpu.name.replace(' ', '-')}-{today[:10]}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    sys.stderr.write(f"{path}\n")


if __name__ == "__main__":
    main()
