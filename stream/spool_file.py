"""The file of a spool: made, recognised, opened; set aside when it is ours and damaged.

A spool is an SQLite database with an `application_id` of its own. What does not begin as one is the file of
something else, or its beginning is destroyed: it is refused, and neither moved nor written to.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
import tempfile
import time
import uuid
from contextlib import closing, suppress
from pathlib import Path

from engine.errors import ConfigError
from stream.private_files import tighten

log = logging.getLogger(__name__)

APPLICATION_ID = 0x4F6E5370  # "OnSp", at offset 68 of the file
VERSION = 1  # `user_version`, at offset 60
_MAGIC = b"SQLite format 3\0"
_TABLES = {"records", "spool"}
SPOOL_SUFFIXES = ("", "-wal", "-shm", "-journal")
"""of the files that belong to one spool"""

# A process that opens a file and closes it gives up its own locks on it: what is open here is not looked at.
_open_here: set[Path] = set()


def open_spool(path: Path) -> tuple[sqlite3.Connection, str]:
    """The database of the spool at `path`, which is made if there is none, and the spool's id.

    The connection holds the file's lock until `close_spool`. Raises ConfigError where another has it open,
    where it cannot be opened, and where something else than a spool is at `path`, which is left as it is.
    """
    real = Path(os.path.realpath(path))
    if real in _open_here:
        raise _in_use(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(path):
            _make(path)
        _recognise(path)
        for suffix in SPOOL_SUFFIXES:
            with suppress(FileNotFoundError):
                tighten(path.with_name(path.name + suffix))
        try:
            opened = _open(path)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as problem:
            _set_aside(path, problem)
            _make(path)
            opened = _open(path)
    except sqlite3.Error as problem:
        if "locked" in str(problem):
            raise _in_use(path) from None
        raise ConfigError(f"{path}: the spool cannot be opened: {problem}") from None
    except OSError as problem:
        raise ConfigError(f"{path}: the spool cannot be opened: {problem.strerror}") from None
    _open_here.add(real)
    return opened


def close_spool(path: Path, database: sqlite3.Connection) -> None:
    """Close it; another process may open it."""
    database.close()
    _open_here.discard(Path(os.path.realpath(path)))


def _in_use(path: Path) -> ConfigError:
    return ConfigError(f"{path}: this or another process has this spool open; give each its own")


def _make(path: Path) -> None:
    """A new spool under another name, then under its own: under that name there is none by halves."""
    number, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".new", dir=path.parent)  # mode 0600
    os.close(number)
    try:
        with closing(sqlite3.connect(name, isolation_level=None)) as database:
            database.execute("PRAGMA synchronous = FULL")
            database.execute("BEGIN EXCLUSIVE")
            # AUTOINCREMENT: the position of a record that is gone does not come again.
            database.execute(
                "CREATE TABLE records (position INTEGER PRIMARY KEY AUTOINCREMENT, record BLOB NOT NULL)"
            )
            database.execute("CREATE TABLE spool (id TEXT NOT NULL)")
            database.execute("INSERT INTO spool VALUES (?)", (uuid.uuid4().hex,))
            database.execute(f"PRAGMA user_version = {VERSION}")
            database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            database.execute("COMMIT")
        with suppress(FileExistsError):  # another process was faster: then its spool is opened
            os.link(name, path)
    finally:
        os.unlink(name)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _recognise(path: Path) -> None:
    """Raise ConfigError unless the file at `path` is a spool, perhaps damaged behind its first page."""
    kind = os.lstat(path).st_mode
    if not stat.S_ISREG(kind):
        raise ConfigError(f"{path}: the spool cannot be opened: found {_kind(kind)}, expected a file")
    with path.open("rb") as file:
        head = file.read(100)
    if not head.startswith(_MAGIC) or len(head) < 100:
        raise ConfigError(
            f"{path}: is no spool: it does not begin as one. It is left as it is; name another file. If it "
            "was a spool, its beginning is destroyed: move it away, with its -wal, and a new one begins"
        )
    if int.from_bytes(head[68:72], "big") == APPLICATION_ID or _is_of_before(path):
        return
    raise ConfigError(
        f"{path}: is an SQLite database, but no spool of Onset. It is left as it is; name another file"
    )


def _is_of_before(path: Path) -> bool:
    """Whether it is a spool of an Onset that did not mark it. Only reads."""
    # As immutable it is read without any file beside it; what is in a -wal can only be seen with one more.
    has_wal = path.with_name(path.name + "-wal").exists()
    uri = f"{path.absolute().as_uri()}?mode=ro" + ("" if has_wal else "&immutable=1")
    try:
        with closing(sqlite3.connect(uri, uri=True, timeout=0.5)) as database:
            return _tables(database) == _TABLES and _pragma(database, "user_version") == VERSION
    except sqlite3.DatabaseError as problem:
        if "locked" in str(problem):
            raise
        return False


def _open(path: Path) -> tuple[sqlite3.Connection, str]:
    database = sqlite3.connect(path, timeout=0.5, isolation_level=None, check_same_thread=False)
    try:
        # The first transaction takes the lock; it is held until the file is closed, or its process dies.
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA journal_mode = WAL")
        # With NORMAL a commit would not wait for the disk, and a power failure would take the newest
        # events with it. FULL costs one fsync for each step that has events.
        database.execute("PRAGMA synchronous = FULL")
        database.execute("BEGIN EXCLUSIVE")
        if _pragma(database, "application_id") != APPLICATION_ID:
            database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        database.execute("COMMIT")
        version = _pragma(database, "user_version")
        if version != VERSION:
            raise ConfigError(
                f"{path}: a spool of version {version}, this Onset writes version {VERSION}: name another "
                "file, or let the Onset that wrote it send what is in it"
            )
        (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        if _tables(database) != _TABLES:
            raise sqlite3.DatabaseError("its tables are not those of a spool")
        ids = database.execute("SELECT id FROM spool LIMIT 2").fetchall()
        if len(ids) != 1 or not isinstance(ids[0][0], str):
            raise sqlite3.DatabaseError("it has no id")
    except BaseException:
        database.close()
        raise
    return database, ids[0][0]


def _set_aside(path: Path, problem: Exception) -> None:
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}")
    for suffix in SPOOL_SUFFIXES:
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.replace(aside.with_name(aside.name + suffix))
    log.error(
        "%s: the spool is damaged (%s) and was set aside as %s; events in it were not sent. "
        "A new one begins.",
        path,
        problem,
        aside.name,
    )


def _tables(database: sqlite3.Connection) -> set[str]:
    rows = database.execute("SELECT name FROM sqlite_master WHERE type = 'table' LIMIT 10").fetchall()
    return {name for (name,) in rows if not name.startswith("sqlite_")}


def _pragma(database: sqlite3.Connection, name: str) -> int:
    (value,) = database.execute(f"PRAGMA {name}").fetchone()
    return int(value)


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFLNK: "a symbolic link (name the file itself)",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")
