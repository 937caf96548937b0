"""What the real bindings of TensorRT and of the CUDA driver offer, for the fakes to be made of.

Run beside each release whose names are to be known, and keep what it prints:

    python tests/engine/list_bindings.py tensorrt > tests/engine/bindings/tensorrt-8.5.3.1.json
    python tests/engine/list_bindings.py cuda > tests/engine/bindings/cuda-12.9.10.json

It needs no GPU. PyPI's `tensorrt-cu13-bindings` comes without the libraries that it is linked to: shared
objects that define its undefined C functions, whatever they do, are enough to import it.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from typing import Any

CLASSES = [
    "Builder",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILayer",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProgressMonitor",
    "ITensor",
    "ITimingCache",
    "OnnxParser",
    "ParserError",
    "Runtime",
]
ENUMS = [
    "BuilderFlag",
    "DataType",
    "LayerType",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "TacticSource",
    "TensorIOMode",
]
CALLS = r"cu(Ctx|Device|Driver|GetErr|Graph(Destroy|Exec|Inst|Launch)|Init|Launch|Mem|Module|Stream)"
CUDA_ENUMS = ("CUresult", "CUstreamCaptureMode", "CUstream_flags")


def parameters(doc: str | None, name: str) -> list[list[str]]:
    """The parameters of each overload that a docstring opens with, without `self`; [] if it does not."""
    found = re.findall(rf"^(?:\d+\. )?{name}\((.*)\)", doc or "", re.MULTILINE)
    names = [
        re.findall(r"(\w+)(?:: [^,=]*)?(?:=[^,]*)?(?:, |$)", text) for text in found if "*args" not in text
    ]
    return [[word for word in words if word != "self"] for words in names]


def members(kind: Any) -> dict[str, int]:
    return {name: int(getattr(value, "value", value)) for name, value in kind.__members__.items()}


def tensorrt(module: Any) -> dict[str, Any]:
    classes = {name: getattr(module, name) for name in CLASSES if hasattr(module, name)}
    return {
        "version": module.__version__,
        "classes": {
            name: {
                member: parameters(getattr(kind, member).__doc__, member)
                for member in dir(kind)
                if not member.startswith("_") or member == "__init__"
            }
            for name, kind in classes.items()
        },
        "enums": {name: members(getattr(module, name)) for name in ENUMS},
        "severity": members(module.ILogger.Severity),
    }


def cuda(module: Any) -> dict[str, Any]:
    attributes = {n: v for n, v in members(module.CUdevice_attribute).items() if "COMPUTE_CAPABILITY" in n}
    return {
        "calls": {
            name: [
                [part.split(":")[0].split()[-1] for part in text.split(", ") if part]
                for text in re.findall(rf"^{name}\((.*)\)", getattr(module, name).__doc__ or "")
            ]
            for name in dir(module)
            if re.match(CALLS, name) and callable(getattr(module, name))
        },
        "enums": {name: members(getattr(module, name)) for name in CUDA_ENUMS}
        | {"CUdevice_attribute": attributes},
    }


if __name__ == "__main__":
    if sys.argv[1] == "cuda":
        listing = cuda(importlib.import_module("cuda.bindings.driver"))
    else:
        listing = tensorrt(importlib.import_module(sys.argv[1]))
    sys.stdout.write(json.dumps(listing, indent=1, sort_keys=True) + "\n")
