"""The few calls of the CUDA driver that tests need, through ctypes: a GPU does not come without a driver."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

DRIVER = "libcuda.so.1"


def is_there() -> bool:
    """Is there an NVIDIA GPU, and a driver?"""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return False
    number = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(number)) == 0 and number.value > 0


def name() -> str:
    """What NVIDIA calls the first GPU."""
    text = ctypes.create_string_buffer(256)
    if ctypes.CDLL(DRIVER).cuDeviceGetName(text, 256, 0):
        raise RuntimeError("the GPU does not tell its name")
    return text.value.decode()


class Gpu:
    """The first GPU, with one block of memory and one stream. Raises RuntimeError when a call fails."""

    def __init__(self) -> None:
        self._driver = ctypes.CDLL(DRIVER)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._do("cuInit", 0)
        self._do("cuDeviceGet", ctypes.byref(device), 0)
        # The primary context is the one that a CUDA runtime uses, the library's for one.
        self._do("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._do("cuCtxSetCurrent", context)
        self._stream, self._base, self._size = ctypes.c_void_p(), ctypes.c_uint64(), 0
        self._do(
            "cuStreamCreate", ctypes.byref(self._stream), 1
        )  # one that does not wait for the default one

    @property
    def stream(self) -> int:
        """A cudaStream_t."""
        return int(self._stream.value or 0)

    def upload(self, content: NDArray[np.uint8]) -> int:
        """The address, a multiple of 256, at which the content now lies; what lay there before is gone."""
        if content.nbytes > self._size:
            if self._size:
                self._do("cuMemFree_v2", self._base)
            self._size = max(content.nbytes, 2 * self._size)
            self._do("cuMemAlloc_v2", ctypes.byref(self._base), ctypes.c_size_t(self._size))
        self._do("cuMemcpyHtoD_v2", self._base, content.ctypes.data_as(ctypes.c_void_p), _size(content))
        return int(self._base.value)

    def download(self, like: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """What lies there once the stream has done its work; as many bytes as `like` has."""
        after = np.empty_like(like)
        self.wait()
        self._do("cuMemcpyDtoH_v2", after.ctypes.data_as(ctypes.c_void_p), self._base, _size(after))
        return after

    def wait(self) -> None:
        """Until the stream has done its work."""
        self._do("cuStreamSynchronize", self._stream)

    def captured(self, work: Callable[[], object]) -> Callable[[], None]:
        """What replays, as a CUDA graph, that which `work` enqueues on the stream."""
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        self._do("cuStreamBeginCapture_v2", self._stream, 0)  # global mode: an allocation would be an error
        work()
        self._do("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        self._do("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_uint64(0))
        return lambda: self._do("cuGraphLaunch", ready, self._stream)

    def _do(self, name: str, *arguments: object) -> None:
        if status := self._driver[name](*arguments):
            raise RuntimeError(f"{name} failed with CUDA error {status}")


def _size(content: NDArray[np.uint8]) -> ctypes.c_size_t:
    return ctypes.c_size_t(content.nbytes)
