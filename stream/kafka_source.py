"""Messages from a Kafka topic, as a member of a consumer group, and what there is to go on with.

`poll` returns messages by partition, and says which partitions came and went since. A partition that came is
to be taken up (`resumption`, `seek`) before its messages are of use: until then `poll` leaves them out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kafka import (
    ConsumerRebalanceListener,
    KafkaAdminClient,
    KafkaConsumer,
    OffsetAndMetadata,
    TopicPartition,
)
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import KafkaError, KafkaTimeoutError, TopicAlreadyExistsError
from pydantic import Field, model_validator

from engine.errors import ConfigError
from engine.schema import Strict
from stream.checkpoint import MAX_RECORD_BYTES, Committed
from stream.kafka_connection import KafkaConnection

log = logging.getLogger(__name__)

_TOPIC = r"^[A-Za-z0-9._-]{1,249}$"
# A broker that does not answer for so long is taken to be away, and all begins anew.
CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 10.0
# Where no messages come, a broker is asked whether it is there: so long after it was heard last, for so long.
_QUIET_SECONDS, _ASK_SECONDS = 3.0, 1.0
# Within this, who was given nothing joins again.
_AGAIN_SECONDS = 1.0
# A worker that died in a transaction holds up its successor until the broker gives the transaction up. The
# broker looks every 10 s (transaction.abort.timed.out.transaction.cleanup.interval.ms).
_SETTLE_SECONDS = 120.0


class KafkaSourceSettings(Strict):
    """Messages from one topic, events to another of the same cluster. Times are seconds."""

    connection: KafkaConnection
    topic: str = Field(pattern=_TOPIC, description="wire messages, keyed by stream; it must exist")
    events: str = Field(pattern=_TOPIC, description="CloudEvents, keyed by stream; it must exist")
    group: str = Field(
        default="onset", pattern=_TOPIC, description="workers of one group share the partitions"
    )
    state: str | None = Field(
        default=None, pattern=_TOPIC, description="compacted topic, made if need be; default: GROUP-state"
    )
    delivery: Literal["exactly-once", "at-least-once"] = Field(
        default="exactly-once",
        description="exactly-once: events are there, for readers of committed records, when a transaction "
        "ends; at-least-once: at once, and after a crash some of them twice, with the same id",
    )
    start: Literal["earliest", "latest"] = Field(
        default="earliest", description="where a group that has never committed begins"
    )
    commit_interval: float = Field(
        default=1.0, gt=0, le=60, description="how long messages without events wait for a commit"
    )
    max_poll: int = Field(default=500, ge=1, le=10_000, description="messages polled at once")
    max_message_bytes: int = Field(default=1024 * 1024, ge=1024, le=64 * 1024 * 1024)
    session_timeout: float = Field(
        default=10.0, ge=1, le=300, description="a worker that is silent for so long loses its partitions"
    )
    transaction_timeout: float = Field(
        default=10.0,
        ge=1,
        le=900,
        description="the broker gives up the transaction of a dead worker after it",
    )

    @model_validator(mode="after")
    def _apart(self) -> KafkaSourceSettings:
        if len(set(self.topics)) < 3:
            raise ValueError("`topic`, `events` and `state` are three topics, two of them have one name")
        return self

    @property
    def topics(self) -> tuple[str, str, str]:
        """All that it has."""
        return self.topic, self.events, self.state_topic

    @property
    def patience(self) -> float:
        """How long a broker may take to answer, before it is taken to be away."""
        return max(REQUEST_SECONDS, 2 * self.session_timeout)

    def relative_to(self, folder: Path) -> KafkaSourceSettings:
        """The same, with relative paths relative to `folder`."""
        return self.model_copy(update={"connection": self.connection.relative_to(folder)})

    @property
    def state_topic(self) -> str:
        """Where the workers of the group write down how to go on."""
        return self.state or f"{self.group}-state"


@dataclass
class Polled:
    """What came of a poll; `lost` and `gained` are partitions, in that order."""

    lost: set[int] = field(default_factory=set)
    gained: set[int] = field(default_factory=set)
    records: Mapping[int, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Resumption:
    """What there is to go on with: see `stream.partition.Partition`."""

    committed: int
    rewind: Committed | None
    records: Mapping[bytes, bytes]
    beginning: int
    end: int


class KafkaSource:
    """A member of a consumer group. One thread owns it."""

    def __init__(
        self,
        settings: KafkaSourceSettings,
        wait: Callable[[], None] = lambda: None,
        letters: str | None = None,
    ) -> None:
        """`wait` is called while this waits for others, and may raise to give up; `letters` is another topic
        that has to be there.

        Raises ConfigError for topics that are not as they must be, KafkaError when Kafka is not there.
        """
        self._settings, self._wait = settings, wait
        self.has_joined = False
        """the group has told which partitions are this member's, be it none"""
        self._options = settings.connection.client_options() | {
            "bootstrap_timeout_ms": round(1000 * CONNECT_SECONDS),
            "request_timeout_ms": round(1000 * settings.patience),
            "reconnect_backoff_max_ms": 1000,
        }
        self._partitions = self._prepare_topics(letters)
        self._heard = time.monotonic()  # when a broker answered last, or it began to join
        self._questions = 0
        self._rebalances = _Rebalances()
        self._awaiting: set[int] = set()
        self._consumer = KafkaConsumer(
            **self._options,
            group_id=settings.group,
            enable_auto_commit=False,
            auto_offset_reset=settings.start,
            isolation_level="read_committed",
            allow_auto_create_topics=False,
            max_poll_records=settings.max_poll,
            max_partition_fetch_bytes=settings.max_message_bytes + 64 * 1024,
            fetch_max_wait_ms=100,
            session_timeout_ms=round(1000 * settings.session_timeout),
            heartbeat_interval_ms=round(1000 * settings.session_timeout / 4),
            # Who keeps a partition through a rebalance keeps its streams, and reads nothing again.
            partition_assignment_strategy=(CooperativeStickyAssignor,),
        )
        self._consumer.subscribe([settings.topic], listener=self._rebalances)

    @property
    def silence(self) -> float:
        """Seconds since a broker answered last, as `poll` left it; 0 before the group was joined."""
        return time.monotonic() - self._heard if self.has_joined else 0.0

    @property
    def joining(self) -> float:
        """Seconds since this began to join the group; 0 once it has."""
        return 0.0 if self.has_joined else time.monotonic() - self._heard

    def poll(self, seconds: float) -> Polled:
        """Wait for messages for so long, and a second more where nobody answers; before the group was joined,
        for that, and a second more. Raises KafkaError."""
        # kafka-python 3.0.12 forgets what it had fetched of a partition that was held, unless nothing is next
        # in line; and what was next and is used up still is (look again when it changes).
        fetcher = self._consumer._fetcher
        if not fetcher._next_partition_records:
            fetcher._next_partition_records = None
        if not self.has_joined:
            # The client's own poll joins as well, but waits then for messages that nobody could take yet.
            self._consumer._coordinator.poll(timeout_ms=round(1000 * seconds))
            if self._consumer.assignment():
                seconds = 0.0
            else:  # it may have joined before it knew of the topic's partitions: then it does so again
                seconds = min(seconds, _AGAIN_SECONDS)
        found = self._consumer.poll(timeout_ms=round(1000 * seconds))
        if found:
            self._heard = time.monotonic()
        elif self.has_joined and self.silence > _QUIET_SECONDS:
            self._ask()  # not while it joins: what takes its time between two polls may undo that
        lost, gained = self._rebalances.take()
        self._awaiting = (self._awaiting - lost) | gained
        if not self.has_joined and self._rebalances.were_any:
            self.has_joined, self._heard = True, time.monotonic()
        records = {
            place.partition: batch
            for place, batch in found.items()
            if place.partition not in self._awaiting and place.partition not in lost
        }
        return Polled(lost, gained, records)

    def resumption(self, partitions: Iterable[int]) -> Mapping[int, Resumption]:
        """What the worker before has left of each partition. Waits until its last transaction is settled.

        Raises KafkaError, DataError when somebody else has committed offsets of this group.
        """
        settings = self._settings
        places = {partition: TopicPartition(settings.topic, partition) for partition in partitions}
        self._wait()
        beginnings = self._consumer.beginning_offsets(list(places.values()))
        committed = {partition: self._committed(place) for partition, place in places.items()}
        ends = self._ends(list(places.values()))
        fresh = [places[partition] for partition, found in committed.items() if found is None]
        if settings.start == "earliest":
            starts = beginnings
        else:
            starts = self._consumer.end_offsets(fresh) if fresh else {}
        states = self._read_states(places)
        found = {}
        for partition, place in places.items():
            offset = committed[partition]
            rewind = Committed.from_text(offset.metadata) if offset is not None and offset.metadata else None
            found[partition] = Resumption(
                starts[place] if offset is None else offset.offset,
                rewind,
                states[partition],
                beginnings[place],
                ends[place],
            )
        return found

    @property
    def is_rejoining(self) -> bool:
        """The group is being joined anew, which goes on in `poll` alone, and takes it some time."""
        return bool(self._consumer._coordinator.need_rejoin())

    def hold(self, partition: int) -> None:
        """Poll nothing of a partition, until it is released or sought in."""
        self._consumer.pause(TopicPartition(self._settings.topic, partition))

    def release(self, partition: int) -> None:
        """Poll a partition again."""
        place = TopicPartition(self._settings.topic, partition)
        if place in self._consumer.paused():
            self._consumer.resume(place)

    def seek(self, partition: int, offset: int) -> None:
        """Go on with the message at `offset`."""
        self._consumer.seek(TopicPartition(self._settings.topic, partition), offset)
        self.release(partition)
        self._awaiting.discard(partition)

    def position(self, partition: int) -> int:
        """The offset of the next message."""
        return int(self._consumer.position(TopicPartition(self._settings.topic, partition)))

    def beginning(self, partition: int) -> int:
        """The first offset that is still there, as the broker says now."""
        place = TopicPartition(self._settings.topic, partition)
        return int(self._consumer.beginning_offsets([place])[place])

    def is_at_end(self, partition: int) -> bool:
        """Whether all that can be read has been, as the broker says now."""
        place = TopicPartition(self._settings.topic, partition)
        return self.position(partition) >= int(self._consumer.end_offsets([place])[place])

    def lag(self, partition: int) -> int | None:
        """How many messages wait in the partition, as far as is known."""
        place = TopicPartition(self._settings.topic, partition)
        end = self._consumer.highwater(place)
        return None if end is None else max(0, end - self.position(partition))

    def places(self, offsets: Mapping[int, tuple[int, str]]) -> dict[TopicPartition, OffsetAndMetadata]:
        """(offset, text) of each partition, as the client takes them."""
        return {
            TopicPartition(self._settings.topic, partition): OffsetAndMetadata(offset, text, -1)
            for partition, (offset, text) in offsets.items()
        }

    def membership(self) -> Any:
        """What proves in a transaction that its partitions are still this member's."""
        return self._consumer.group_metadata()

    def close(self) -> None:
        """Leave the group, so that the others need not wait."""
        self._consumer.close(autocommit=False, timeout_ms=round(1000 * CONNECT_SECONDS))

    def _ask(self) -> None:
        # To the client a poll without messages is the same whether none came or nobody is there. Another
        # partition each time: that one of them has no leader is not yet the silence of all brokers.
        self._questions += 1
        place = TopicPartition(self._settings.topic, self._questions % self._partitions)
        with suppress(KafkaError):
            self._consumer.end_offsets([place], timeout_ms=round(1000 * _ASK_SECONDS))
            self._heard = time.monotonic()

    def _committed(self, place: TopicPartition) -> Any:
        """Waits for the end of the transaction that holds the offset, if there is one."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            self._wait()
            try:
                return self._consumer.committed(place, metadata=True, timeout_ms=1000)
            except KafkaTimeoutError:
                if time.monotonic() > deadline:
                    raise

    def _ends(self, places: list[TopicPartition]) -> Mapping[TopicPartition, int]:
        """The ends of partitions, with what is not settled yet."""
        self._wait()
        with closing(KafkaConsumer(**self._options, group_id=None, enable_auto_commit=False)) as plain:
            found: Mapping[TopicPartition, int] = plain.end_offsets(places)
        return found

    def _read_states(self, partitions: Iterable[int]) -> dict[int, dict[bytes, bytes]]:
        """The newest record of each key in the state's partitions, all that was committed by now."""
        topic = self._settings.state_topic
        places = [TopicPartition(topic, partition) for partition in partitions]
        states: dict[int, dict[bytes, bytes]] = {place.partition: {} for place in places}
        if not places:
            return states
        ends = self._ends(places)
        with closing(
            KafkaConsumer(
                **self._options,
                group_id=None,
                enable_auto_commit=False,
                isolation_level="read_committed",
                max_partition_fetch_bytes=MAX_RECORD_BYTES,
            )
        ) as reader:
            reader.assign(places)
            reader.seek_to_beginning(*places)
            deadline = time.monotonic() + _SETTLE_SECONDS
            while any(reader.position(place) < ends[place] for place in places):
                self._wait()
                if time.monotonic() > deadline:
                    raise KafkaTimeoutError(f"{topic}: a transaction there does not end")
                for place, batch in reader.poll(timeout_ms=200).items():
                    deadline = time.monotonic() + _SETTLE_SECONDS
                    known = states[place.partition]
                    for record in batch:
                        if record.value is None:
                            known.pop(record.key, None)
                        else:
                            known[record.key] = record.value
        return states

    def _prepare_topics(self, letters: str | None) -> int:
        """See that topics are there, and the state's has a partition for each of the messages'; how many."""
        settings = self._settings
        known = KafkaAdminClient.DEFAULT_CONFIG
        with closing(KafkaAdminClient(**{k: v for k, v in self._options.items() if k in known})) as admin:
            there = {topic["name"]: len(topic["partitions"]) for topic in admin.describe_topics()}
            self._wait()
            wanted = {"topic": settings.topic, "events": settings.events, "dead_letters.kafka_topic": letters}
            for what, name in wanted.items():
                if name is not None and not there.get(name):
                    raise ConfigError(
                        f"`{what}`: no topic {name!r} is at {settings.connection.bootstrap[0]}; make it: "
                        f"kafka-topics.sh --create --topic {name} --partitions N --bootstrap-server ..."
                    )
            partitions, state = there[settings.topic], settings.state_topic
            if state not in there:
                _create_state(admin, state, partitions)
            elif there[state] < partitions:
                admin.create_partitions({state: partitions})
            self._wait()
            _check_compacted(admin, state)
        return partitions


class _Rebalances(ConsumerRebalanceListener):  # type: ignore[misc]
    """Remembers what came and went until it is asked; called by whichever thread the client likes."""

    def __init__(self) -> None:
        self._changes: list[tuple[bool, set[int]]] = []
        self.were_any = False

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self._changes.append((True, {place.partition for place in assigned}))
        self.were_any = True

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        self._changes.append((False, {place.partition for place in revoked}))

    def take(self) -> tuple[set[int], set[int]]:
        """(lost, gained): what is gained is not held any more, or not yet."""
        lost: set[int] = set()
        gained: set[int] = set()
        while self._changes:
            came, partitions = self._changes.pop(0)
            if came:
                gained |= partitions
            else:
                lost |= partitions
                gained -= partitions
        return lost, gained


def _create_state(admin: KafkaAdminClient, name: str, partitions: int) -> None:
    configs = {
        "cleanup.policy": "compact",
        "max.message.bytes": str(MAX_RECORD_BYTES),
        # Only segments that are closed are compacted, and all that is not has to be read by a successor.
        "segment.bytes": str(4 * MAX_RECORD_BYTES),
        "segment.ms": "600000",
        "min.cleanable.dirty.ratio": "0.1",
    }
    try:
        admin.create_topics(
            {name: {"num_partitions": partitions, "replication_factor": -1, "configs": configs}},
            wait_for_metadata=True,
        )
        log.info("made the compacted topic %s with %d partitions", name, partitions)
    except TopicAlreadyExistsError:
        pass  # another worker was faster


def _check_compacted(admin: KafkaAdminClient, name: str) -> None:
    resource = ConfigResource(ConfigResourceType.TOPIC, name)
    configs = admin.describe_configs([resource], config_filter="all")["topic"][name]
    policy, largest = configs["cleanup.policy"]["value"], configs["max.message.bytes"]["value"]
    alter = f"kafka-configs.sh --alter --entity-type topics --entity-name {name} --bootstrap-server ..."
    if policy != "compact":
        raise ConfigError(
            f"`state`: topic {name!r} has cleanup.policy={policy}, so the streams' state would be deleted; "
            f"make it compact: {alter} --add-config cleanup.policy=compact"
        )
    if int(largest) < MAX_RECORD_BYTES:
        raise ConfigError(
            f"`state`: topic {name!r} has max.message.bytes={largest}, and a stream's state may not fit; "
            f"raise it: {alter} --add-config max.message.bytes={MAX_RECORD_BYTES}"
        )
