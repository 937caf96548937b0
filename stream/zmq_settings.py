"""The configuration of the ZeroMQ source: sockets, queues, heartbeats, keys. Knows files by name only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from engine.schema import Strict, as_tuple
from stream.wire import MAX_MESSAGE_BYTES

MAX_TOPIC_BYTES = 256


class CurveSettings(Strict):
    """Who may send, by key (`onset keys` makes them). The service is the CURVE server, whoever binds."""

    secret: Path = Field(description="the service's own NAME.secret; others must not be able to read it")
    clients: Path = Field(
        description="public keys of those let in: a folder of *.public, or one file with a key a line"
    )


class ZmqSettings(Strict):
    """Where messages come from. Memory that one producer can fill: 64 KiB, and two messages."""

    endpoint: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = Field(
        default=("pull+bind:tcp://127.0.0.1:5555",),
        min_length=1,
        max_length=64,
        description="one or a list of pull+bind:URI, pull+connect:URI, sub+bind:URI, sub+connect:URI, "
        "all pull or all sub; a plain URI is pull+bind; port * picks a free one",
    )
    topics: tuple[Annotated[str, Field(min_length=1, max_length=MAX_TOPIC_BYTES)], ...] = Field(
        default=(),
        max_length=1024,
        description="sub: take only [topic, message] whose topic begins with one of these; default: all",
    )
    max_message_bytes: int = Field(
        default=MAX_MESSAGE_BYTES,
        ge=1024,
        le=64 * 1024 * 1024,
        description="larger messages are refused; one above twice this costs its producer the connection",
    )
    high_water_mark: int = Field(
        default=256,
        ge=1,
        le=100_000,
        description="messages read ahead per producer; then it waits (pull), or drops messages (sub)",
    )
    heartbeat: float = Field(
        default=5.0,
        ge=0.1,
        le=600,
        description="seconds of silence until the kernel (pull), or this side (sub), asks for a sign of life",
    )
    heartbeat_timeout: float = Field(
        default=30.0, ge=0.1, le=3600, description="seconds without one until a peer is taken for dead"
    )
    curve: CurveSettings | None = Field(
        default=None, description="default: no keys, whoever reaches the port may send"
    )

    @model_validator(mode="after")
    def _patient(self) -> ZmqSettings:
        if self.heartbeat_timeout < 2 * self.heartbeat:
            raise ValueError(
                f"`heartbeat_timeout` is {self.heartbeat_timeout:g} s, expected at least twice `heartbeat` "
                f"({self.heartbeat:g} s): one late sign of life is no death"
            )
        return self

    def relative_to(self, folder: Path) -> ZmqSettings:
        """The same with relative paths of keys taken from `folder`, that of the configuration file."""
        if self.curve is None:
            return self
        curve = CurveSettings(secret=folder / self.curve.secret, clients=folder / self.curve.clients)
        return self.model_copy(update={"curve": curve})
