"""Prints committed events: python deploy/consumer.py HOST:PORT TOPIC. Needs kafka-python and no Onset."""

import json
import sys

from kafka import KafkaConsumer

consumer = KafkaConsumer(
    sys.argv[2],
    bootstrap_servers=sys.argv[1],
    auto_offset_reset="earliest",
    isolation_level="read_committed",
)
for record in consumer:
    event, kind = json.loads(record.value), dict(record.headers)["ce_type"].decode()
    words = [kind, record.key.decode(), event.get("label"), event.get("start"), event.get("end")]
    print(*words, flush=True)
