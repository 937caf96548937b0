"""The spool: records that wait on disk until a broker has them. A queue in one SQLite file, for one process.

What `append` has returned for is on the disk: it outlives this process, and a power failure. Knows nothing of
Kafka; thread-safe.

A file that turns out to be damaged when it is opened is set aside under another name, not deleted.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgpack

from engine.errors import ConfigError, OnsetError
from stream.cloudevents import Record

log = logging.getLogger(__name__)

_VERSION = 1
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
        file of something else.
        """
        self._path, self._max_bytes = path, max_bytes
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = self._open()
        except sqlite3.OperationalError as problem:
            if "locked" in str(problem):
                raise ConfigError(f"{path}: another process has this spool open; give each its own") from None
            raise ConfigError(f"{path}: the spool cannot be opened: {problem}") from None
        except sqlite3.DatabaseError as problem:
            self._set_aside(problem)
            self._database = self._open()
        except OSError as problem:
            raise ConfigError(f"{path}: the spool cannot be opened: {problem.strerror}") from None
        self.id: str = self._database.execute("SELECT id FROM spool").fetchone()[0]
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
            self._database.close()

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, timeout=0.5, isolation_level=None, check_same_thread=False)
        try:
            # The first transaction takes the lock; it is held until the file is closed, or its process dies.
            database.execute("PRAGMA locking_mode = EXCLUSIVE")
            database.execute("PRAGMA journal_mode = WAL")
            # With NORMAL a commit would not wait for the disk, and a power failure would take the newest
            # events with it. FULL costs one fsync for each step that has events.
            database.execute("PRAGMA synchronous = FULL")
            database.execute("BEGIN EXCLUSIVE")
            (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if not tables:
                # AUTOINCREMENT: the position of a record that is gone does not come again.
                database.execute(
                    "CREATE TABLE records (position INTEGER PRIMARY KEY AUTOINCREMENT, record BLOB NOT NULL)"
                )
                database.execute("CREATE TABLE spool (id TEXT NOT NULL)")
                database.execute("INSERT INTO spool VALUES (?)", (uuid.uuid4().hex,))
                database.execute(f"PRAGMA user_version = {_VERSION}")
            database.execute("COMMIT")
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version != _VERSION:
                raise ConfigError(
                    f"{self._path}: version {version} of a spool, or no spool; this Onset writes version "
                    f"{_VERSION}: name another file"
                )
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
        except BaseException:
            database.close()
            raise
        return database

    def _set_aside(self, problem: Exception) -> None:
        aside = self._path.with_name(f"{self._path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}")
        for suffix in ("", "-wal", "-shm"):
            part = self._path.with_name(self._path.name + suffix)
            if part.exists():
                part.replace(aside.with_name(aside.name + suffix))
        log.error(
            "%s: the spool is damaged (%s) and was set aside as %s; events in it were not sent. "
            "A new one begins.",
            self._path,
            problem,
            aside.name,
        )

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
            return Record(key, value, [(name, content) for name, content in headers])
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
