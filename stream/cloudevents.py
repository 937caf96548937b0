"""Events as Kafka records: CloudEvents 1.0, binary content mode. Knows nothing of a broker.

The value is the event's JSON line, the key is its stream, so that one partition of a topic holds a stream's
events in order; the headers say the rest. Nothing depends on when it runs: the same event is the same record.

An id is a hash of what makes an event this event, so that a consumer that has seen one may drop the next with
the same id. Two events of one stream never share one (tests/stream/test_cloudevents.py): within an epoch,
segments follow one another, and each that is announced is a frame long at least, so that neither two
beginnings nor two ends are at the same time; in its segment, an action is started once, then ended or aborted
once.
Streams that go to one topic need names of their own, also when several services write them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from urllib.parse import quote

from stream.events import VERSION, Event

SCHEMA = f"urn:onset:event:{VERSION}"
"""the `$id` of event.schema.json, which describes the values"""

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True, slots=True)
class Record:
    """What a Kafka record is made of."""

    key: bytes
    value: bytes
    headers: list[tuple[str, bytes]]

    @property
    def id(self) -> str:
        """The CloudEvent's id."""
        return dict(self.headers)["ce_id"].decode("utf-8")


def record(event: Event) -> Record:
    """The record of one event."""
    attributes = {
        "ce_specversion": "1.0",
        "ce_id": _id(event),
        "ce_type": f"onset.{event.type}",
        "ce_source": f"/onset/bundles/{quote(event.bundle, safe='@')}",
        "ce_subject": event.stream,
        "ce_dataschema": SCHEMA,
        "content-type": "application/json",
    }
    time = _time(event.captured)
    if time is not None:
        attributes["ce_time"] = time
    # Kafka's headers are UTF-8 whatever they say (unlike HTTP's), so a stream's name needs no escapes.
    headers = [(name, value.encode("utf-8")) for name, value in attributes.items()]
    return Record(event.stream.encode("utf-8"), event.to_json().encode("utf-8"), headers)


def _id(event: Event) -> str:
    identity = [event.stream, event.epoch, event.bundle, event.type, event.instance_id, event.time]
    key = json.dumps(identity, ensure_ascii=False)
    return hashlib.blake2b(key.encode("utf-8"), digest_size=16).hexdigest()


def _time(captured: float | None) -> str | None:
    """RFC 3339, or None: without the producer's clock, or where that reads a year that has no name."""
    if captured is None:
        return None
    try:
        time = _EPOCH + timedelta(seconds=captured)
    except OverflowError:
        return None
    return time.strftime("%Y-%m-%dT%H:%M:%S.%fZ") if time.year >= 1000 else None
