"""Finite recordings through the live runtime: the same rings, steps and trackers that a service runs.

The order of events is the same for every way of cutting the recordings into arrivals, across streams too: in
each round every recording is fed until it has exactly one thing to do, and then all of them do it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.manifest import Decoding, Manifest
from engine.session import FloatArray, OnnxSession, Session, Slot
from stream.config import RuntimeSettings, overridden
from stream.counters import Counters
from stream.recording_source import checked, load, messages, paced, stream_ids
from stream.runtime import EventSink, Runtime
from stream.sinks import EventWriter, WholeFile, standard_output
from stream.wire import Message

# Recordings beside one another: enough to fill a batch, few enough to hold all of their samples.
AT_ONCE = 16


def detect_recordings(
    bundle: Path,
    recordings: Sequence[Path],
    output: Path | None,
    arrival: int = 0,
    realtime: float | None = None,
    min_score: float | None = None,
    threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Counters:
    """Write the events of the files `recordings` as JSON lines: see `detect_streams`."""
    named = [
        (stream, partial(load, path)) for stream, path in zip(stream_ids(recordings), recordings, strict=True)
    ]
    return detect_streams(bundle, named, output, arrival, realtime, min_score, threads, progress)


def detect_streams(
    bundle: Path,
    named: Sequence[tuple[str, Callable[[], NDArray[np.float32]]]],
    output: Path | None,
    arrival: int = 0,
    realtime: float | None = None,
    min_score: float | None = None,
    threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Counters:
    """Write the events of finite streams (id, what reads its samples [T, C]) as JSON lines.

    `output` None: standard output; `arrival`: samples that come at once (0: all, or those of one step where
    there is a pace); `realtime`: pace, 1 is that of the recording (None: as fast as possible); `min_score`:
    in place of the bundle's emission thresholds; `progress` is told fractions of recordings, 1.0 for each in
    all. The file is complete or absent.

    Raises BundleError, ConfigError, DataError.
    """
    at_once = max(1, min(AT_ONCE, len(named)))
    session: Session = OnnxSession(bundle, slots=at_once, threads=threads)
    manifest = session.manifest
    if realtime is not None:
        arrival = arrival or manifest.chunk_samples  # all at once would be nothing until the very end
    lengths: dict[str, int] = {}

    def sources() -> Iterator[tuple[str, Iterator[Message]]]:
        for stream, read in named:
            samples = checked(stream, read(), manifest.frame.channels)
            lengths[stream] = len(samples)
            source = messages(stream, samples, manifest.frame.sample_rate, arrival)
            yield stream, source if realtime is None else paced(source, realtime)

    def report(message: Message) -> None:
        if progress is not None:
            progress(len(message.samples) / lengths[message.stream])

    decoding = manifest.decoding
    if min_score is not None:
        scores = {"start_threshold": min_score, "end_threshold": min_score}
        decoding = overridden(decoding, scores, "--min-score")
    writer: EventWriter = standard_output() if output is None else WholeFile(output)
    counters = _run(session, sources(), at_once, writer.write, decoding, report)
    writer.close()
    return counters


@dataclass(frozen=True)
class Recorded:
    """What the step said of finite streams: enough to decide on events again, without the network.

    `steps`: the outputs of each step, in order; `streams`: each stream's id and which of its samples were
    there [T]. Takes some 4 * (3 K + 3) bytes a frame, K being the number of classes, and no samples.
    """

    manifest: Manifest
    streams: tuple[tuple[str, NDArray[np.bool_]], ...]
    steps: tuple[Mapping[str, FloatArray], ...]
    at_once: int


def record_streams(
    bundle: Path,
    named: Sequence[tuple[str, Callable[[], NDArray[np.float32]]]],
    threads: int | None = None,
) -> Recorded:
    """Run the network once over finite streams; parameters and what is raised as in `detect_streams`."""
    at_once = max(1, min(AT_ONCE, len(named)))
    session = _Recorder(bundle, slots=at_once, threads=threads)
    manifest = session.manifest
    streams: list[tuple[str, NDArray[np.bool_]]] = []

    def sources() -> Iterator[tuple[str, Iterator[Message]]]:
        for stream, read in named:
            samples = checked(stream, read(), manifest.frame.channels)
            streams.append((stream, np.asarray(np.isfinite(samples).all(axis=1))))
            yield stream, messages(stream, samples, manifest.frame.sample_rate)

    _run(session, sources(), at_once, lambda events: None, manifest.decoding)
    return Recorded(manifest, tuple(streams), tuple(session.steps), at_once)


def detect_recorded(recorded: Recorded, output: Path, decoding: Decoding) -> Counters:
    """Write the events that `detect_streams` would write of the same streams, were `decoding` the bundle's.

    Raises ConfigError when `output` cannot be written.
    """
    manifest = recorded.manifest

    def sources() -> Iterator[tuple[str, Iterator[Message]]]:
        for stream, there in recorded.streams:
            # Nothing reads the samples but the ring, which asks whether they are there: zeros do, as a view.
            column = np.where(there, np.float32(0), np.float32(np.nan))[:, None]
            samples = np.broadcast_to(column, (len(there), manifest.frame.channels))
            yield stream, messages(stream, samples, manifest.frame.sample_rate)

    writer = WholeFile(output)
    counters = _run(_Replayed(recorded), sources(), recorded.at_once, writer.write, decoding)
    writer.close()
    return counters


class _Recorder(OnnxSession):
    """A session that keeps what it said."""

    def __init__(self, bundle: Path, slots: int, threads: int | None) -> None:
        super().__init__(bundle, slots, threads)
        self.steps: list[Mapping[str, FloatArray]] = []

    def step(
        self, slots: Sequence[Slot], samples: FloatArray, mask: NDArray[np.bool_]
    ) -> Mapping[str, FloatArray]:
        """See `Session.step`."""
        outputs = super().step(slots, samples, mask)
        self.steps.append(outputs)
        return outputs


class _Replayed:
    """A session that says again what was recorded.

    Exact because the runtime takes the same steps of the same streams in the same order: its rounds follow
    from which samples are there and which outputs are finite, never from what a tracker decides.
    """

    def __init__(self, recorded: Recorded) -> None:
        self.manifest, self.capacity = recorded.manifest, recorded.at_once
        self._steps = iter(recorded.steps)

    def open(self) -> Slot:
        """See `Session.open`: all slots are one, since there are no states."""
        return Slot(0, 0)

    def close(self, slot: Slot) -> None:
        """See `Session.close`."""

    def step(
        self, slots: Sequence[Slot], samples: FloatArray, mask: NDArray[np.bool_]
    ) -> Mapping[str, FloatArray]:
        """See `Session.step`."""
        return next(self._steps)


def _run(
    session: Session,
    sources: Iterable[tuple[str, Iterator[Message]]],
    at_once: int,
    sink: EventSink,
    decoding: Decoding,
    report: Callable[[Message], None] | None = None,
) -> Counters:
    settings = RuntimeSettings(max_streams=at_once, max_batch=at_once)
    runtime = Runtime(session, sink, settings, decoding=decoding)
    replay(runtime, sources, at_once, report)
    return runtime.counters


def replay(
    runtime: Runtime,
    sources: Iterable[tuple[str, Iterator[Message]]],
    at_once: int,
    report: Callable[[Message], None] | None = None,
) -> None:
    """Run `sources` (stream id, its messages), `at_once` of them beside one another, to their ends.

    Sources are taken up lazily, in their order; `report` is told each message.
    """
    waiting = iter(sources)
    active: dict[str, Iterator[Message]] = {}
    while True:
        while len(active) < at_once and (more := next(waiting, None)) is not None:
            active[more[0]] = more[1]
        if not active:
            return
        for stream, source in list(active.items()):
            while not runtime.ready(stream):
                message = next(source, None)
                if message is None:
                    runtime.end(stream)
                    if not runtime.ready(stream):
                        del active[stream]
                    break
                runtime.offer(message)
                if report is not None:
                    report(message)
        runtime.run_ready()
