"""Messages to a Kafka topic, keyed by stream. The one module that sends what `onset run` reads there.

A key has one partition, so a stream's messages stay in order; the producer is idempotent, so a retry repeats
none. What the client holds is bounded: where the broker is slower, `send` waits.
"""

from __future__ import annotations

import re
from contextlib import suppress

from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError

from engine.errors import ConfigError, OnsetError
from engine.schema import parse
from stream.kafka_connection import KafkaConnection, explain
from stream.producing import Producer
from stream.wire import DtypeName, Message, encode

_TARGET = re.compile(r"kafka://(?P<addresses>[^/\s]*)/(?P<topic>[A-Za-z0-9._-]{1,249})")
_CONNECT_SECONDS = 10.0
# So long a broker may be away in between; then what it has not acknowledged is given up.
_DELIVERY_SECONDS = 60.0


class KafkaSender(Producer):
    """A connected producer; a context manager."""

    def __init__(
        self,
        target: str,
        connection: KafkaConnection | None = None,
        connect_timeout: float = _CONNECT_SECONDS,
        delivery_timeout: float = _DELIVERY_SECONDS,
    ) -> None:
        """Connect, and look whether the topic is there.

        `target`: kafka://HOST:PORT/TOPIC (HOST:PORT,HOST:PORT is some brokers of one cluster), or, with a
        `connection`, which knows the brokers, kafka:///TOPIC. Timeouts are seconds.

        Raises ConfigError for a target that is none, and when there is no broker or no such topic.
        """
        self._name, self._delivery_timeout = target, delivery_timeout
        self._failure: Exception | None = None
        connection, self._topic = _read(target, connection)
        try:
            self._producer = KafkaProducer(
                **connection.client_options(),
                enable_idempotence=True,
                acks="all",
                allow_auto_create_topics=False,
                linger_ms=0,
                bootstrap_timeout_ms=round(1000 * connect_timeout),
                max_block_ms=round(1000 * connect_timeout),
                request_timeout_ms=round(1000 * min(10.0, delivery_timeout)),
                delivery_timeout_ms=round(1000 * delivery_timeout),
                reconnect_backoff_max_ms=1000,
            )
        except KafkaTimeoutError:  # the client tries again whatever it was, and does not tell what it was
            raise ConfigError(
                f"{target}: no broker answered within {connect_timeout:g} s, or none accepted this client: "
                "is a Kafka there, and does it want another `tls` or `sasl` (--kafka-config)?"
            ) from None
        except KafkaError as problem:
            raise ConfigError(f"{target}: {explain(problem)}") from None
        try:
            self._producer.partitions_for(self._topic)
        except KafkaTimeoutError:  # the broker was there a moment ago: it is the topic that is not
            self._abandon()
            raise ConfigError(
                f"{target}: there is no topic {self._topic!r}, or this user may not see it; make it with "
                f"kafka-topics.sh --create --topic {self._topic} --partitions N --bootstrap-server ..."
            ) from None
        except KafkaError as problem:
            self._abandon()
            raise ConfigError(f"{target}: {explain(problem)}") from None

    def send(self, message: Message, dtype: DtypeName = "float32", scale: float | None = None) -> None:
        """Send one message; waits while too many are on their way.

        Raises WireError if `dtype` cannot hold it, OnsetError when this one or one before it was given up.
        """
        self._complain()
        try:
            future = self._producer.send(
                self._topic, key=message.stream.encode("utf-8"), value=encode(message, dtype, scale)
            )
        except KafkaError as problem:
            raise self._lost(problem) from None
        future.add_errback(self._remember)

    def close(self) -> None:
        """Wait until the broker has acknowledged everything. Raises OnsetError when it does not."""
        try:
            self._producer.flush(timeout=self._delivery_timeout)
            self._complain()
        except KafkaError as problem:
            raise self._lost(problem) from None
        finally:
            self._abandon()

    def _remember(self, problem: Exception) -> None:
        self._failure = self._failure or problem

    def _complain(self) -> None:
        if self._failure is not None:
            raise self._lost(self._failure)

    def _lost(self, problem: Exception) -> OnsetError:
        return OnsetError(f"{self._name} did not take everything: {explain(problem)}; the rest was not sent")

    def _abandon(self) -> None:
        with suppress(KafkaError):
            self._producer.close(timeout=0)


def _read(target: str, connection: KafkaConnection | None) -> tuple[KafkaConnection, str]:
    """The cluster and the topic."""
    match = _TARGET.fullmatch(target)
    if match is None or bool(match["addresses"]) == (connection is not None):
        raise ConfigError(
            f"{target!r}: expected kafka://HOST:PORT/TOPIC, or kafka:///TOPIC where a file (--kafka-config) "
            "tells the brokers"
        )
    if connection is None:
        connection = parse(KafkaConnection, {"bootstrap": match["addresses"].split(",")}, target)
    return connection, match["topic"]
