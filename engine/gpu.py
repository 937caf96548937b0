"""One GPU: memory, one stream, CUDA graphs, and moving rows, on the interface of the CUDA driver.

The one module that imports `cuda.bindings`. It needs the driver and nothing else: no toolkit, no compiler, no
CUDA runtime (`rows.ptx` says how rows are moved). Knows nothing of TensorRT, bundles or streams of samples.
Work is enqueued on one stream and done in that order; `wait` waits for it. Not thread-safe, but a thread may
take over from another: `activate` first.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError, EngineError

Bytes = NDArray[np.uint8]
# What `rows.ptx` takes: two addresses of numbers, one of indices, and the numbers in a row.
_ROW_TYPES = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32)
_BLOCK = 256


class Gpu:
    """The GPU of number `ordinal`; what it allocates lives as long as it."""

    def __init__(self, ordinal: int = 0) -> None:
        """Raises ConfigError when there is no driver, no such GPU, or no `cuda-bindings`."""
        self._driver = _driver()
        try:
            _do(self._driver, "cuInit", 0)
            count = _do(self._driver, "cuDeviceGetCount")
        except EngineError as problem:
            raise ConfigError(
                f"no NVIDIA GPU can be used: {problem}; `onset doctor` says what to do"
            ) from None
        if not 0 <= ordinal < count:
            raise ConfigError(f"there is no GPU {ordinal}, this machine has {count}; they count from 0")
        self._device = self._do("cuDeviceGet", ordinal)
        # The primary context is the one that TensorRT uses, too.
        self._context = self._do("cuDevicePrimaryCtxRetain", self._device)
        self._owned: list[Callable[[], object]] = []
        weakref.finalize(self, _release, self._driver, self._device, self._context, self._owned)
        self.activate()
        # One that does not wait for the default stream, which other libraries in the process may use.
        self._stream = self._do("cuStreamCreate", self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value)
        self._own("cuStreamDestroy", self._stream)
        # A C string: the driver looks for the zero at its end.
        module = self._do("cuModuleLoadData", Path(__file__).with_name("rows.ptx").read_bytes() + b"\0")
        self._own("cuModuleUnload", module)
        self._gather = self._do("cuModuleGetFunction", module, b"gather")
        self._scatter = self._do("cuModuleGetFunction", module, b"scatter")

    @property
    def name(self) -> str:
        """What NVIDIA calls it."""
        return bytes(self._do("cuDeviceGetName", 256, self._device)).split(b"\0")[0].decode(errors="replace")

    @property
    def capability(self) -> tuple[int, int]:
        """Its compute capability, (9, 0) for example."""
        kinds = self._driver.CUdevice_attribute
        major, minor = (
            self._do("cuDeviceGetAttribute", kind, self._device)
            for kind in (
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        return int(major), int(minor)

    @property
    def architecture(self) -> str:
        """The compute capability as compilers write it: `sm_90`."""
        return "sm_{}{}".format(*self.capability)

    @property
    def driver_version(self) -> str:
        """The newest CUDA that the driver knows: `12.6`."""
        number = int(self._do("cuDriverGetVersion"))
        return f"{number // 1000}.{number % 1000 // 10}"

    @property
    def stream(self) -> int:
        """The stream, as libraries take it: a cudaStream_t."""
        return int(self._stream)

    def activate(self) -> None:
        """Make this the GPU of the calling thread."""
        self._do("cuCtxSetCurrent", self._context)

    def allocate(self, size: int) -> int:
        """The address of `size` bytes on the GPU, a multiple of 256; they hold zeros."""
        try:
            address = int(self._do("cuMemAlloc", size))
        except EngineError as problem:
            raise EngineError(
                f"{size / 2**20:.0f} MiB are not to be had on {self.name}: {problem}; "
                "take fewer streams (`max_streams`) or a smaller batch (`engine.streams`)"
            ) from None
        self._own("cuMemFree", address)
        self.zero(address, size)
        return address

    def pin(self, size: int) -> Bytes:
        """`size` bytes of the host that the GPU reads and writes by itself. Valid as long as this object."""
        address = int(self._do("cuMemAllocHost", size))
        self._own("cuMemFreeHost", address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def zero(self, address: int, size: int) -> None:
        """Enqueue: zeros from `address` on."""
        self._do("cuMemsetD8Async", address, 0, size, self._stream)

    def upload(self, address: int, pinned: Bytes) -> None:
        """Enqueue: pinned bytes to the GPU."""
        self._do("cuMemcpyHtoDAsync", address, pinned.ctypes.data, pinned.nbytes, self._stream)

    def download(self, pinned: Bytes, address: int) -> None:
        """Enqueue: bytes of the GPU to pinned ones."""
        self._do("cuMemcpyDtoHAsync", pinned.ctypes.data, address, pinned.nbytes, self._stream)

    def gather(self, dense: int, table: int, index: int, rows: int, size: int) -> None:
        """Enqueue: row r of `dense` becomes row index[r] (int32) of `table`; rows of `size` float32."""
        self._launch(self._gather, dense, table, index, rows, size)

    def scatter(self, dense: int, table: int, index: int, rows: int, size: int) -> None:
        """Enqueue: row index[r] (int32) of `table` becomes row r of `dense`; rows of `size` float32."""
        self._launch(self._scatter, dense, table, index, rows, size)

    def wait(self) -> None:
        """Until all that was enqueued is done. Raises EngineError if some of it failed."""
        self._do("cuStreamSynchronize", self._stream)

    def captured(self, work: Callable[[], None]) -> Callable[[], None]:
        """What enqueues, as one CUDA graph, what `work` enqueues; its addresses stay as they are now.

        Raises EngineError where `work` does, or where the driver refuses; the stream is as before then.
        """
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._do("cuStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            # The stream would stay in capture. What was captured so far, or that nothing was, is of no use.
            with contextlib.suppress(EngineError):
                self._do("cuGraphDestroy", self._do("cuStreamEndCapture", self._stream))
            raise
        graph = self._do("cuStreamEndCapture", self._stream)
        try:
            executable = self._do("cuGraphInstantiate", graph, 0)
        finally:
            self._do("cuGraphDestroy", graph)
        self._own("cuGraphExecDestroy", executable)
        return partial(_do, self._driver, "cuGraphLaunch", executable, self._stream)

    def _launch(self, kernel: Any, dense: int, table: int, index: int, rows: int, size: int) -> None:
        blocks = -(-size // _BLOCK)
        values = ((dense, table, index, size), _ROW_TYPES)
        self._do("cuLaunchKernel", kernel, blocks, rows, 1, _BLOCK, 1, 1, 0, self._stream, values, 0)

    def _own(self, destroy: str, *arguments: object) -> None:
        self._owned.append(partial(_do, self._driver, destroy, *arguments))

    def _do(self, call: str, *arguments: object) -> Any:
        return _do(self._driver, call, *arguments)


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except Exception as problem:  # whatever its modules raise where they find no library that they can use
        raise ConfigError(
            f"`cuda-bindings` cannot be used, which TensorRT needs beside it ({problem}): "
            "`pip install '.[tensorrt]'`"
        ) from None
    return driver


def _do(driver: Any, call: str, *arguments: object) -> Any:
    """A call of the driver; what it returns beside its status. Raises EngineError unless it succeeds."""
    try:
        status, *values = getattr(driver, call)(*arguments)
    except (RuntimeError, AttributeError):  # so the bindings say that they, or the driver, lack this call
        raise EngineError(f"the driver is missing, or too old for {call}") from None
    if status != driver.CUresult.CUDA_SUCCESS:
        raise EngineError(f"{call} failed with {status.name}")
    return values[0] if values else None


def _release(driver: Any, device: Any, context: Any, owned: list[Callable[[], object]]) -> None:
    """Give back, newest first, what a Gpu held. At the end of a process the driver may be gone before us."""
    try:
        _do(driver, "cuCtxSetCurrent", context)
        _do(driver, "cuCtxSynchronize")  # work that is under way may still write there
        while owned:
            owned.pop()()
        _do(driver, "cuDevicePrimaryCtxRelease", device)
    except EngineError:
        return
