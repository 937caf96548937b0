"""A fake of the CUDA driver, as `cuda.bindings.driver` offers it: what `engine.gpu` calls, and no more.

Strict where the real one is cruel. Memory is the host's, filled with NaN, and only what was allocated may be
touched; work waits in its stream until somebody waits for it; a graph replays addresses, not values; each
thread needs its context. `rows.ptx` itself is run, instruction by instruction, the threads of a launch side
by side.
"""

from __future__ import annotations

import ctypes
import enum
import json
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

LISTINGS = Path(__file__).with_name("bindings")
_TYPES = {"u32": np.uint32, "b32": np.uint32, "u64": np.uint64, "b64": np.uint64}


def listing(name: str) -> dict[str, Any]:
    """What `list_bindings` found in a release."""
    return json.loads((LISTINGS / f"{name}.json").read_text())  # type: ignore[no-any-return]


class FakeDriver:
    """Stands in for the module `cuda.bindings.driver`."""

    def __init__(
        self,
        devices: int = 1,
        capability: tuple[int, int] = (9, 0),
        memory: int = 2**40,
        device: str = "Fake GPU",
    ) -> None:
        self.devices, self.capability, self.free, self.device = devices, capability, memory, device
        for name, values in listing("cuda-12.9.10")["enums"].items():
            setattr(self, name, enum.IntEnum(name, values))
        self.blocks: dict[int, ctypes.Array[Any]] = {}  # by address, of GPU and host
        self.pinned: set[int] = set()
        self.pending: list[Callable[[], None]] = []
        self.capture: list[Callable[[], None]] | None = None
        self.launched_graphs = self.graphs = 0  # the latter: those that are not destroyed
        self.context = threading.local()
        self._kept: list[object] = []

    def enqueue(self, work: Callable[[], None]) -> None:
        """Do it when the stream is waited for, or when the graph that is being captured is launched."""
        (self.pending if self.capture is None else self.capture).append(work)

    def array(self, address: int, count: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
        """Memory as an array; AssertionError unless all of it was allocated."""
        size = count * np.dtype(dtype).itemsize
        start = max((base for base in self.blocks if base <= address), default=-1)
        inside = start >= 0 and address + size <= start + len(self.blocks[start])
        assert inside, "touches what is not allocated"
        return np.frombuffer(self.blocks[start], dtype, count, address - start)

    def cuInit(self, Flags: int) -> tuple[Any, ...]:
        return (self._status("CUDA_SUCCESS" if self.devices else "CUDA_ERROR_NO_DEVICE"),)

    def cuDeviceGetCount(self) -> tuple[Any, ...]:
        return self._ok(self.devices)

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        return self._ok(ordinal)

    def cuDeviceGetName(self, length: int, dev: int) -> tuple[Any, ...]:
        return self._ok(self.device.encode().ljust(length, b"\0"))

    def cuDeviceGetAttribute(self, attrib: Any, dev: int) -> tuple[Any, ...]:
        return self._ok(self.capability[attrib.name.endswith("MINOR")])

    def cuDriverGetVersion(self) -> tuple[Any, ...]:
        return self._ok(12060)

    def cuDevicePrimaryCtxRetain(self, dev: int) -> tuple[Any, ...]:
        return self._ok("context")

    def cuDevicePrimaryCtxRelease(self, dev: int) -> tuple[Any, ...]:
        return self._ok()

    def cuCtxSetCurrent(self, ctx: Any) -> tuple[Any, ...]:
        self.context.current = ctx
        return self._ok()

    def cuCtxSynchronize(self) -> tuple[Any, ...]:
        return self.cuStreamSynchronize(7)

    def cuStreamCreate(self, Flags: int) -> tuple[Any, ...]:
        return self._ok(7)

    def cuStreamDestroy(self, hStream: int) -> tuple[Any, ...]:
        return self._ok()

    def cuStreamSynchronize(self, hStream: int) -> tuple[Any, ...]:
        self._ready(hStream)
        assert self.capture is None, "waits while it captures"
        while self.pending:
            self.pending.pop(0)()
        return self._ok()

    def cuMemAlloc(self, bytesize: int) -> tuple[Any, ...]:
        assert self.capture is None, "allocates while it captures"
        if bytesize > self.free:
            return (self._status("CUDA_ERROR_OUT_OF_MEMORY"), None)
        self.free -= bytesize
        return self._ok(self._block(bytesize))

    def cuMemFree(self, dptr: int) -> tuple[Any, ...]:
        self.free += len(self.blocks.pop(dptr))
        return self._ok()

    def cuMemAllocHost(self, bytesize: int) -> tuple[Any, ...]:
        address = self._block(bytesize)
        self.pinned.add(address)
        return self._ok(address)

    def cuMemFreeHost(self, p: int) -> tuple[Any, ...]:
        self.pinned.remove(p)
        del self.blocks[p]
        return self._ok()

    def cuMemsetD8Async(self, dstDevice: int, uc: int, N: int, hStream: int) -> tuple[Any, ...]:
        self._ready(hStream)
        self.enqueue(lambda: self.array(dstDevice, N, np.uint8).fill(uc))
        return self._ok()

    def cuMemcpyHtoDAsync(
        self, dstDevice: int, srcHost: int, ByteCount: int, hStream: int
    ) -> tuple[Any, ...]:
        assert srcHost in self.pinned, "uploads what is not pinned"
        return self._copy(dstDevice, srcHost, ByteCount, hStream)

    def cuMemcpyDtoHAsync(
        self, dstHost: int, srcDevice: int, ByteCount: int, hStream: int
    ) -> tuple[Any, ...]:
        assert dstHost in self.pinned, "downloads to what is not pinned"
        return self._copy(dstHost, srcDevice, ByteCount, hStream)

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, ...]:
        assert image.endswith(b"\0"), "a module is a C string"
        return self._ok(image[:-1].decode())

    def cuModuleUnload(self, hmod: Any) -> tuple[Any, ...]:
        return self._ok()

    def cuModuleGetFunction(self, hmod: str, name: bytes) -> tuple[Any, ...]:
        return self._ok(Kernel(hmod, name.decode()))

    def cuLaunchKernel(
        self, f: Kernel, gridDimX: int, gridDimY: int, gridDimZ: int,
        blockDimX: int, blockDimY: int, blockDimZ: int, sharedMemBytes: int, hStream: int,
        kernelParams: tuple[tuple[int, ...], tuple[Any, ...]], extra: int,
    ) -> tuple[Any, ...]:  # fmt: skip
        self._ready(hStream)
        values = [kind(value).value for value, kind in zip(*kernelParams, strict=True)]
        assert max(gridDimY, gridDimZ) <= 65535, "a grid is that high at most"
        assert blockDimX <= 1024, "a block has that many threads at most"
        self.enqueue(lambda: f.run(self, gridDimX, gridDimY, blockDimX, values))
        return self._ok()

    def cuStreamBeginCapture(self, hStream: int, mode: Any) -> tuple[Any, ...]:
        self._ready(hStream)
        self.capture = []
        return self._ok()

    def cuStreamEndCapture(self, hStream: int) -> tuple[Any, ...]:
        graph, self.capture = self.capture, None
        self.graphs += 1
        return self._ok(graph)

    def cuGraphInstantiate(self, hGraph: list[Callable[[], None]], flags: int) -> tuple[Any, ...]:
        return self._ok(list(hGraph))

    def cuGraphDestroy(self, hGraph: list[Callable[[], None]]) -> tuple[Any, ...]:
        hGraph.clear()
        self.graphs -= 1
        return self._ok()

    def cuGraphExecDestroy(self, hGraphExec: list[Callable[[], None]]) -> tuple[Any, ...]:
        hGraphExec.clear()
        return self._ok()

    def cuGraphLaunch(self, hGraphExec: list[Callable[[], None]], hStream: int) -> tuple[Any, ...]:
        self._ready(hStream)
        self.launched_graphs += 1
        for work in hGraphExec:
            self.enqueue(work)
        return self._ok()

    def _copy(self, to: int, source: int, size: int, stream: int) -> tuple[Any, ...]:
        self._ready(stream)
        self.enqueue(lambda: np.copyto(self.array(to, size, np.uint8), self.array(source, size, np.uint8)))
        return self._ok()

    def _block(self, size: int) -> int:
        memory = (ctypes.c_uint8 * (size + 256))()
        address = -(-ctypes.addressof(memory) // 256) * 256
        self._kept.append(memory)  # never freed, so that no later block takes its address
        self.blocks[address] = (ctypes.c_uint8 * size).from_buffer(memory, address - ctypes.addressof(memory))
        self.array(address, size, np.uint8).fill(0xFF)
        return address

    def _ready(self, stream: int) -> None:
        assert stream == 7, "not the stream that was made"
        assert getattr(self.context, "current", None) == "context", "this thread has no context"

    def _ok(self, *values: Any) -> tuple[Any, ...]:
        return (self._status("CUDA_SUCCESS"), *values)

    def _status(self, name: str) -> Any:
        return self.CUresult[name]  # type: ignore[attr-defined]


class Kernel:
    """One entry of a PTX module, of the dozen instructions that `rows.ptx` uses."""

    def __init__(self, module: str, name: str) -> None:
        found = re.search(rf"\.entry {name}\((.*?)\)\s*{{(.*?)}}", module, re.DOTALL)
        assert found, f"the module has no {name}"
        self.parameters = [word.split()[-1] for word in found[1].split(",")]
        lines = [line.split("//")[0].strip() for line in found[2].split(";")]
        self.code = [line for line in lines if line and not line.startswith(".reg")]

    def run(self, driver: FakeDriver, blocks: int, rows: int, threads: int, values: Sequence[int]) -> None:
        """All threads of a grid (blocks, rows), as arrays."""
        y, x, tid = (a.ravel() for a in np.mgrid[:rows, :blocks, :threads].astype(np.uint32))
        at: dict[str, Any] = {"%ctaid.x": x, "%ctaid.y": y, "%tid.x": tid}
        at["%ntid.x"] = np.full(len(x), threads, np.uint32)
        given = dict(zip(self.parameters, values, strict=True))
        alive = np.ones(len(x), bool)
        for line in self.code:
            if line == "ret":
                return
            if line.startswith("@"):
                alive &= ~at[line.split()[0][1:]]
                at = {name: value[alive] for name, value in at.items()}
                alive = np.ones(int(alive.sum()), bool)
                continue
            code, _, rest = line.partition(" ")
            to, *words = [word.strip(" []") for word in rest.split(",")]
            operation, kind = code.split(".")[0], _TYPES[code.split(".")[-1]]
            if operation == "ld" and ".param." in code:
                at[to] = np.full(len(alive), given[words[0]], kind)
                continue
            if operation == "st":
                self._memory(driver, at[to])[0][self._memory(driver, at[to])[1]] = at[words[0]]
                continue
            a, *others = [at[word] if word in at else kind(int(word)) for word in words]
            if operation == "ld":
                memory, place = self._memory(driver, a)
                at[to] = memory[place].astype(kind)
            elif operation == "mul":  # wide: two halves, one whole
                at[to] = a.astype(np.uint64) * np.uint64(others[0])
            else:
                at[to] = {
                    "mov": lambda a: a,
                    "cvt": lambda a: a.astype(np.uint64),
                    "add": np.add,
                    "shl": np.left_shift,
                    "mad": lambda a, b, c: a * b + c,
                    "setp": np.greater_equal,
                }[operation](a, *others)

    @staticmethod
    def _memory(driver: FakeDriver, addresses: np.ndarray[Any, Any]) -> tuple[Any, Any]:
        """The 32-bit words from the lowest to the highest address, of one block; the places in them."""
        low, high = int(addresses.min()), int(addresses.max())
        assert not (addresses % 4).any(), "not aligned"
        memory = driver.array(low, (high - low) // 4 + 1, np.uint32)
        return memory, ((addresses - np.uint64(low)) >> np.uint64(2)).astype(np.int64)
