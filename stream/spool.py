"""The spool: records that wait on disk until a broker has them. A queue in one SQLite file, for one process.

What `append` has returned for is on the disk: it outlives this process, and a power failure. Knows nothing of
Kafka; thread-safe. How its file is made, recognised, and set aside where it is damaged: `stream.spool_file`.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgpack

from engine.errors import OnsetError
from stream.cloudevents import Record
from stream.spool_file import close_spool, open_spool

# How many more bytes a row takes than its record: a rowid, a header, its share of a page.
_ROW_BYTES = 16
_BEYOND = 2**63 - 1


class SpoolFull(OnsetError):
    """The spool has no room for these records; nothing of them was kept."""


class Spool:
    """Records in order of their positions, which grow and are never given twice.

    `id` was drawn when the file was made and stays with it.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        """Open `path`, or make it; holds `max_bytes` of records (the file may be some pages larger).

        Raises ConfigError where another process has it open, where it cannot be written, or where it is the
        file of something else. The file is its owner's alone: mode 0600.
        """
        self._path, self._max_bytes = path, max_bytes
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._database, self.id = open_spool(path)
        self._count, self._bytes = self._measure("")

    def append(self, records: Sequence[Record], drop_oldest: bool = False) -> int:
        """Keep `records`, all or none; returns how many older ones were dropped to make room.

        Raises SpoolFull when there is no room and nothing may be dropped; an empty spool takes anything, so
        that what is larger than the bound is not stuck forever. Raises OnsetError when the disk refuses.
        """
        rows = [(_packed(record),) for record in records]
        size = sum(len(row) + _ROW_BYTES for (row,) in rows)
        dropped = 0
        with self._room, self._transaction():
            excess = self._bytes + size - self._max_bytes
            if self._count and excess > 0:
                if not drop_oldest:
                    raise SpoolFull(
                        f"{self._path}: full with {self._count} events, {self._max_bytes} bytes are its bound"
                    )
                dropped = self._delete(self._position_behind(excess))
            self._database.executemany("INSERT INTO records (record) VALUES (?)", rows)
            self._count += len(rows)
            self._bytes += size
        return dropped

    def peek(self, limit: int) -> list[tuple[int, Record]]:
        """The oldest records with their positions, at most `limit`. Raises OnsetError when it cannot read."""
        with self._lock, self._complaints():
            rows = self._database.execute(
                "SELECT position, record FROM records ORDER BY position LIMIT ?", (limit,)
            ).fetchall()
        return [(position, self._unpacked(position, data)) for position, data in rows]

    def remove(self, up_to: int) -> None:
        """Forget the records up to and with this position. Raises OnsetError when the disk refuses."""
        with self._room:
            with self._transaction():
                self._delete(up_to)
            self._room.notify_all()

    def wait_for_room(self, timeout: float) -> None:
        """Until something was removed, or `timeout` seconds."""
        with self._room:
            self._room.wait(timeout)

    def __len__(self) -> int:
        return self._count

    def close(self) -> None:
        """Close the file; another process may open it."""
        with self._lock:
            close_spool(self._path, self._database)

    def _measure(self, where: str, *values: int) -> tuple[int, int]:
        count, size = self._database.execute(
            f"SELECT count(*), total(length(record) + {_ROW_BYTES}) FROM records {where}", values
        ).fetchone()
        return count, int(size)

    def _delete(self, up_to: int) -> int:
        count, size = self._measure("WHERE position <= ?", up_to)
        self._database.execute("DELETE FROM records WHERE position <= ?", (up_to,))
        self._count -= count
        self._bytes -= size
        return count

    def _position_behind(self, size: int) -> int:
        """The position up to which the oldest records take `size` bytes, or beyond the last."""
        for position, length in self._database.execute(
            "SELECT position, length(record) FROM records ORDER BY position"
        ):
            size -= length + _ROW_BYTES
            if size <= 0:
                return int(position)
        return _BEYOND

    def _unpacked(self, position: int, data: bytes) -> Record:
        try:
            key, value, headers = msgpack.unpackb(data)
            pairs = [(name, content) for name, content in headers]
            if not (isinstance(key, bytes) and isinstance(value, bytes)) or any(
                not (isinstance(name, str) and isinstance(content, bytes)) for name, content in pairs
            ):
                raise TypeError
            return Record(key, value, pairs)
        except (ValueError, TypeError, msgpack.UnpackException):
            raise OnsetError(
                f"{self._path}: record {position} is damaged; move the file away, and a new spool begins"
            ) from None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        before = self._count, self._bytes
        with self._complaints():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                self._count, self._bytes = before
                if self._database.in_transaction:  # a full disk has rolled back already
                    self._database.execute("ROLLBACK")
                raise

    @contextmanager
    def _complaints(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as problem:
            raise OnsetError(f"{self._path}: the spool cannot go on: {problem}; is the disk full?") from None


def _packed(record: Record) -> bytes:
    return bytes(msgpack.packb([record.key, record.value, record.headers]))
