"""Records that were polled and wait for the engine, by partition; who has cost least is next.

The records of a partition keep their order; between partitions the turns are fair by work, not by number, so
that one whose messages are long or many keeps the others waiting for one of its messages at most. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any


class Backlog:
    """What waits, and what each partition has cost so far."""

    def __init__(self) -> None:
        self._records: dict[int, deque[Any]] = {}
        self._spent: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self._records)

    def __contains__(self, partition: int) -> bool:
        return partition in self._records

    def count(self, partition: int) -> int:
        """How many records of a partition wait."""
        return len(self._records.get(partition, ()))

    def put(self, partition: int, records: Iterable[Any]) -> None:
        """Append records of a partition."""
        if partition not in self._records:
            # Who had nothing to do has saved nothing up for that.
            floor = min((self._spent[other] for other in self._records), default=0)
            self._spent[partition] = max(floor, self._spent.get(partition, 0))
        self._records.setdefault(partition, deque()).extend(records)
        if not self._records[partition]:
            del self._records[partition]

    def take(self) -> tuple[int, Any] | None:
        """(partition, its oldest record), of the partition that has cost least."""
        if not self._records:
            return None
        partition = min(self._records, key=self._spent.__getitem__)
        record = self._records[partition].popleft()
        if not self._records[partition]:
            del self._records[partition]
        return partition, record

    def charge(self, partition: int, cost: int) -> None:
        """What was taken of a partition has cost so much."""
        self._spent[partition] += cost

    def drop(self, partition: int) -> None:
        """Forget all of a partition."""
        self._records.pop(partition, None)
        self._spent.pop(partition, None)
