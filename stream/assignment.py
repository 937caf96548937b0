"""The partitions that a worker has, and the runtime in which their streams run.

One bundle decides here: for another there is a `successor`, without partitions until it takes them up. No
I/O: the worker brings what a partition is taken up with, and sends what a commit has to hold.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from engine.errors import WireError
from engine.session import Session
from stream.config import ServiceConfig, overridden
from stream.counters import Counters
from stream.events import Event
from stream.kafka_source import Resumption
from stream.partition import Partition, check_marks, maker_of, warm_chunks
from stream.runtime import Runtime

log = logging.getLogger(__name__)


class Assignment:
    """Partitions of `topic` by number; `tell` takes the events that are news."""

    def __init__(
        self,
        session: Session,
        config: ServiceConfig,
        topic: str,
        counters: Counters,
        tell: Callable[[Sequence[Event]], None],
    ) -> None:
        """Raises ConfigError where the state of a stream might not fit into a record."""
        self._session, self._config, self._topic = session, config, topic
        self._counters, self._tell = counters, tell
        self._decoding = overridden(session.manifest.decoding, config.decoding, "decoding")
        check_marks(session.manifest, self._decoding, config)
        self.runtime = Runtime(session, self._hear, config, counters, self._decoding)
        self.partitions: dict[int, Partition] = {}
        self._homes: dict[str, int] = {}  # stream -> its partition
        self._committed: dict[int, tuple[int, str]] = {}  # as they were committed last

    def successor(self, session: Session) -> Assignment:
        """For the same partitions, with another bundle.

        Raises BundleError when the open streams are not those that it was made for, ConfigError.
        """
        self.runtime.check_swap(session)
        return Assignment(session, self._config, self._topic, self._counters, self._tell)

    @property
    def replaying(self) -> list[int]:
        """Partitions whose streams are being brought back to where they were."""
        return [number for number, partition in self.partitions.items() if partition.is_replaying]

    def take_up(self, number: int, found: Resumption) -> int:
        """Go on with a partition where another worker, or this one, stopped; from which offset to read."""
        self._committed.pop(number, None)
        manifest = self._session.manifest
        partition = self.partitions[number] = Partition(
            self.runtime,
            f"{self._topic}-{number}",
            self._tell,
            maker_of(manifest, self._decoding, self._config),
            warm_chunks(manifest, self._config.max_gap),
            found.committed,
            found.rewind,
            found.records,
            found.beginning,
            found.end,
        )
        log.info(
            "partition %d: on from offset %d, %d messages are read again",
            number,
            found.committed,
            max(0, found.committed - partition.start),
        )
        return partition.start

    def leave(self, number: int) -> None:
        """A partition is another's now; nothing is told of its streams."""
        self.partitions.pop(number).leave()

    def claim(self, stream: str, number: int) -> None:
        """A message of `stream` came in a partition. Raises WireError where its others came in another."""
        home = self._homes[stream] = self._home(stream, number)
        if home != number:
            raise WireError(
                "partition",
                f"stream {stream!r} comes in partitions {home} and {number}; the key of a message has to be "
                "its stream",
            )

    def checkpoint(self) -> tuple[list[tuple[int, bytes, bytes | None]], dict[int, tuple[int, str]]]:
        """What a commit has to hold of partitions with news: (partition, key, value) of the state's records,
        and (offset, text) by partition."""
        records: list[tuple[int, bytes, bytes | None]] = []
        offsets: dict[int, tuple[int, str]] = {}
        for number, partition in self.partitions.items():
            if partition.is_replaying:
                continue
            changed, rewind = partition.checkpoint()
            offset = (partition.position, rewind.to_text())
            if changed or offset != self._committed.get(number):
                records += [(number, key, value) for key, value in changed]
                offsets[number] = offset
        self._homes = {
            stream: number
            for stream, number in self._homes.items()
            if number in self.partitions and self.runtime.life(stream) is not None
        }
        return records, offsets

    def committed(self, offsets: Mapping[int, tuple[int, str]]) -> None:
        """What `checkpoint` returned has been committed."""
        self._committed |= offsets

    def _hear(self, events: Sequence[Event]) -> None:
        self._tell([e for e in events if self.partitions[self._home(e.stream)].is_news(e.stream)])

    def _home(self, stream: str, first: int = -1) -> int:
        """The partition of a stream; `first`, where nothing is known of it."""
        if (home := self._homes.get(stream)) is not None:
            return home
        # Who stopped before knew it: a message that came in another partition stays refused.
        return next((number for number, found in self.partitions.items() if found.holds(stream)), first)
