"""Recordings as streams: a file's samples cut into messages, in a hurry or at the pace of real time.

The stream's id is the file's name without its suffix. Samples with NaN or Inf were not measured: they are
left out, and the runtime sees a gap there. What comes of it does not depend on how the recording is cut.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError, DataError
from engine.recording import read_recording
from stream.wire import MAX_STREAM_CHARACTERS, Message


def stream_ids(paths: Sequence[Path]) -> list[str]:
    """The stream id of each recording. Raises ConfigError where two would share one, or one cannot be."""
    seen: dict[str, Path] = {}
    for path in paths:
        other = seen.setdefault(path.stem, path)
        if other is not path:
            raise ConfigError(f"{other} and {path} would both be stream {path.stem!r}; rename one of them")
        if not path.stem.isprintable() or not 1 <= len(path.stem) <= MAX_STREAM_CHARACTERS:
            raise ConfigError(
                f"{path}: {path.stem!r} cannot name a stream; expected 1 to {MAX_STREAM_CHARACTERS} "
                "printable characters before the suffix"
            )
    return list(seen)


def load(path: Path, channels: int | None = None) -> NDArray[np.float32]:
    """Samples [T, C] of a recording. Raises DataError if it has none, or not `channels` of them a sample."""
    return checked(str(path), read_recording(path), channels)


def checked(origin: str, samples: NDArray[np.float32], channels: int | None) -> NDArray[np.float32]:
    """`samples` [T, C] if there are any and C fits; else DataError naming their `origin`."""
    if channels is not None and samples.shape[1] != channels:
        raise DataError(
            f"{origin}: {samples.shape[1]} channels, the bundle expects {channels}; "
            "is it the recording of another sensor?"
        )
    if not np.isfinite(samples).all(axis=1).any():
        raise DataError(f"{origin}: no sample without NaN or Inf")
    return samples


def messages(
    stream: str,
    samples: NDArray[np.float32],
    rate: float,
    arrival: int = 0,
    epoch: int = 0,
    start_time: float | None = None,
    speed: float = 1.0,
) -> Iterator[Message]:
    """`samples` [T, C] at `rate` Hz as messages of `arrival` samples (0: all in one); the last one has `end`.

    `start_time` is the wall clock (seconds since 1970) of the first sample, where there is one; `speed` says
    how much faster than that clock the samples come.
    """
    spans = list(_finite_spans(samples, arrival or len(samples)))
    for start, stop in spans:
        yield Message(
            stream=stream,
            seq=start,
            samples=samples[start:stop],
            rate=rate,
            epoch=epoch,
            time=None if start_time is None else start_time + start / (rate * speed),
            end=stop == spans[-1][1],
        )


def paced(
    source: Iterator[Message],
    speed: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Message]:
    """The same messages, each when its last sample would have been measured at `speed` times real time."""
    started: float | None = None
    for message in source:
        if started is None:
            started = clock()
        due = started + (message.seq + len(message.samples)) / (message.rate * speed)
        wait = due - clock()
        if wait > 0:
            sleep(wait)
        yield message


def _finite_spans(samples: NDArray[np.float32], arrival: int) -> Iterator[tuple[int, int]]:
    """The spans [start, stop) of finite samples, cut at every multiple of `arrival`."""
    finite = np.isfinite(samples).all(axis=1)
    edges = np.flatnonzero(np.diff(finite, prepend=False, append=False))
    for run_start, run_stop in edges.reshape(-1, 2).tolist():
        start = run_start
        while start < run_stop:
            stop = min(run_stop, (start // arrival + 1) * arrival)
            yield start, stop
            start = stop
