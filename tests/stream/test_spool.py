"""The spool: what it took it has, in order and once, whatever happens to the process."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import ConfigError, OnsetError
from stream.cloudevents import Record
from stream.spool import Spool, SpoolFull
from stream.spool_file import APPLICATION_ID

ROOT = Path(__file__).resolve().parents[2]
PLENTY = 10**9


def records(first: int, n: int, size: int = 0) -> list[Record]:
    return [
        Record(b"s", b"%d" % number, [("ce_id", b"\xff" + b"x" * size)]) for number in range(first, first + n)
    ]


def numbers(spool: Spool, limit: int = 10**9) -> list[int]:
    return [int(record.value) for _, record in spool.peek(limit)]


def test_records_come_back_in_order_and_as_they_were(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", PLENTY)
    spool.append(records(0, 3))
    spool.append(records(3, 2))
    found = spool.peek(4)
    assert [record for _, record in found] == records(0, 4)
    assert len(spool) == 5
    spool.remove(found[1][0])
    assert numbers(spool) == [2, 3, 4]
    assert len(spool) == 3


def test_what_was_taken_is_there_when_the_file_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "spool.db"
    spool = Spool(path, PLENTY)
    spool.append(records(0, 5))
    spool.remove(spool.peek(2)[-1][0])
    identity = spool.id
    spool.close()
    again = Spool(path, PLENTY)
    assert again.id == identity
    assert len(again) == 3
    assert numbers(again) == [2, 3, 4]


def test_a_position_is_never_given_twice(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", PLENTY)
    spool.append(records(0, 3))
    last = spool.peek(3)[-1][0]
    spool.remove(last)
    spool.close()
    spool = Spool(tmp_path / "spool.db", PLENTY)
    spool.append(records(3, 1))
    assert spool.peek(1)[0][0] > last


def test_two_files_have_two_identities(tmp_path: Path) -> None:
    assert Spool(tmp_path / "a.db", PLENTY).id != Spool(tmp_path / "b.db", PLENTY).id


def test_a_full_spool_takes_nothing_of_what_does_not_fit(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", 1000)
    spool.append(records(0, 5, size=100))
    with pytest.raises(SpoolFull, match="full with 5 events"):
        spool.append(records(5, 5, size=100))
    assert numbers(spool) == [0, 1, 2, 3, 4]
    spool.remove(spool.peek(3)[-1][0])
    spool.append(records(5, 4, size=100))
    assert numbers(spool) == [3, 4, 5, 6, 7, 8]


def test_a_full_spool_that_may_drops_the_oldest_and_no_more_than_needed(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", 1000)
    assert spool.append(records(0, 6, size=100), drop_oldest=True) == 0
    assert spool.append(records(6, 2, size=100), drop_oldest=True) == 1
    assert numbers(spool) == [1, 2, 3, 4, 5, 6, 7]
    assert spool.append(records(8, 20, size=100), drop_oldest=True) == 7
    assert numbers(spool) == list(range(8, 28))  # more than it holds: all of it, as in an empty one


def test_the_bound_holds_across_processes(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", 1000)
    spool.append(records(0, 7, size=100))
    spool.close()
    with pytest.raises(SpoolFull):
        Spool(tmp_path / "spool.db", 1000).append(records(7, 2, size=100))


def test_who_waits_for_room_goes_on_when_there_is_some(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", 1000)
    spool.append(records(0, 7, size=100))
    threading.Timer(0.2, spool.remove, (spool.peek(4)[-1][0],)).start()
    spool.wait_for_room(60)
    spool.append(records(7, 4, size=100))
    assert numbers(spool) == [4, 5, 6, 7, 8, 9, 10]


def test_a_second_opener_is_told_and_harms_nobody(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    spool = Spool(path, PLENTY)
    script = f"""
from pathlib import Path
from engine import ConfigError
from stream.spool import Spool
try:
    Spool(Path({str(path)!r}), 1000)
except ConfigError as problem:
    assert "another process" in str(problem)
    raise SystemExit(7)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60).returncode == 7
    with pytest.raises(ConfigError, match="another process"):
        Spool(path, PLENTY)
    spool.append(records(0, 1))
    assert numbers(spool) == [0]
    assert not list(tmp_path.glob("*damaged*"))


def damaged_behind_its_first_page(path: Path) -> bytes:
    spool = Spool(path, PLENTY)
    spool.append(records(0, 500, size=100))
    spool.close()
    data = bytearray(path.read_bytes())
    data[4096 * 5 : 4096 * 8] = b"\xa5" * (3 * 4096)
    path.write_bytes(data)
    return bytes(data)


def test_a_damaged_spool_is_set_aside_and_a_new_one_begins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "spool.db"
    data = damaged_behind_its_first_page(path)
    new = Spool(path, PLENTY)
    assert len(new) == 0
    new.append(records(7, 1))
    assert numbers(new) == [7]
    (aside,) = tmp_path.glob("spool.db.damaged-*")
    assert aside.read_bytes() == data
    assert "damaged" in caplog.text
    assert aside.name in caplog.text


def state_of(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """What is in a folder: name -> mode, inode, content."""
    return {
        entry.name: (
            entry.lstat().st_mode,
            entry.lstat().st_ino,
            entry.read_bytes() if entry.is_file() else b"",
        )
        for entry in folder.iterdir()
    }


def text_file(path: Path) -> None:
    path.write_text("events of this very service\n" * 1000)


def empty_file(path: Path) -> None:
    path.touch()


def destroyed_header(path: Path) -> None:
    data = damaged_behind_its_first_page(path)
    path.write_bytes(bytes(100) + data[100:])


def other_database(path: Path) -> None:
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE photos (name TEXT)")
    other.close()


def other_database_in_wal_mode(path: Path) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA journal_mode = WAL")
    other.execute("CREATE TABLE records (position INTEGER PRIMARY KEY, record BLOB)")
    other.execute("PRAGMA user_version = 1")
    other.close()


def marked_database(path: Path) -> None:
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE records (x)")
        other.execute("PRAGMA application_id = 1196444487")  # a GeoPackage
    other.close()


def damaged_other_database(path: Path) -> None:
    other_database(path)
    data = path.read_bytes()
    path.write_bytes(data[:100] + b"\xa5" * (len(data) - 100))


def folder(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def dangling_link(path: Path) -> None:
    path.symlink_to("elsewhere.db")


def link_to_a_spool(path: Path) -> None:
    Spool(path.with_name("real.db"), PLENTY).close()
    path.symlink_to("real.db")


@pytest.mark.parametrize(
    "make",
    [
        text_file,
        empty_file,
        destroyed_header,
        other_database,
        other_database_in_wal_mode,
        marked_database,
        damaged_other_database,
        folder,
        pipe,
        dangling_link,
        link_to_a_spool,
    ],
)
def test_what_is_no_spool_is_refused_and_left_as_it_is(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "spool.db")
    before = state_of(tmp_path)
    with pytest.raises(ConfigError, match=r"spool\.db: .*(name another file|expected a file)"):
        Spool(tmp_path / "spool.db", PLENTY)
    assert state_of(tmp_path) == before


def test_a_spool_that_an_older_onset_did_not_mark_is_taken_and_marked(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    code = f"""
import msgpack, os, signal, sqlite3
database = sqlite3.connect({str(path)!r}, isolation_level=None)
database.execute("PRAGMA locking_mode = EXCLUSIVE")
database.execute("PRAGMA journal_mode = WAL")
database.execute("BEGIN EXCLUSIVE")
database.execute("CREATE TABLE records (position INTEGER PRIMARY KEY AUTOINCREMENT, record BLOB NOT NULL)")
database.execute("CREATE TABLE spool (id TEXT NOT NULL)")
database.execute("INSERT INTO spool VALUES ('an id')")
database.execute("PRAGMA user_version = 1")
database.execute("COMMIT")
database.execute("INSERT INTO records (record) VALUES (?)", (msgpack.packb([b"s", b"7", [("ce_id", b"x")]]),))
os.kill(os.getpid(), signal.SIGKILL)  # all of it is in the -wal
"""
    subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert int.from_bytes(path.read_bytes()[68:72], "big") == 0
    spool = Spool(path, PLENTY)
    assert (spool.id, numbers(spool)) == ("an id", [7])
    spool.close()
    assert int.from_bytes(path.read_bytes()[68:72], "big") == APPLICATION_ID
    assert not list(tmp_path.glob("*damaged*"))


def test_a_spool_is_its_owners_alone_and_one_that_is_not_is_tightened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "spool.db"
    before = os.umask(0)
    try:
        spool = Spool(path, PLENTY)
        spool.append(records(0, 1))
        assert {part.name: part.stat().st_mode & 0o777 for part in tmp_path.iterdir()} == {
            "spool.db": 0o600,
            "spool.db-wal": 0o600,
        }
        spool.close()
        path.chmod(0o644)
        again = Spool(path, PLENTY)
        again.append(records(1, 1))
        assert {part.stat().st_mode & 0o777 for part in tmp_path.iterdir()} == {0o600}
        again.close()
    finally:
        os.umask(before)
    assert "mode was 0644" in caplog.text


def test_no_flipped_bit_ends_in_anything_but_a_spool_or_a_sentence(tmp_path: Path) -> None:
    """A flip is found, refused by name, or in what nobody reads; what comes back has its form."""
    path = tmp_path / "spool.db"
    spool = Spool(path, PLENTY)
    spool.append(records(0, 40, size=200))
    spool.close()
    data = path.read_bytes()
    draw = random.Random(15)
    outcomes: Counter[str] = Counter()
    for number in range(120):
        place = draw.randrange(100 if number % 3 == 0 else len(data))
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.randrange(8)
        home = tmp_path / str(number)
        home.mkdir()
        (home / "spool.db").write_bytes(flipped)
        try:
            spool = Spool(home / "spool.db", PLENTY)
            try:
                found = spool.peek(100)
                spool.append(records(40, 1))
                aside = any("damaged" in part.name for part in home.iterdir())
                outcomes["aside" if aside else "read"] += 1
                assert aside or len(found) in range(39, 42)
            finally:
                spool.close()
        except ConfigError:
            assert (home / "spool.db").read_bytes() == flipped
            outcomes["refused"] += 1
        except OnsetError:
            outcomes["told"] += 1
        for part in home.iterdir():
            part.unlink()
    assert outcomes["read"] > 20
    assert outcomes["refused"] > 3


def test_a_folder_that_cannot_be_written_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be opened"):
        Spool(tmp_path / "file" / "spool.db", PLENTY)
    with pytest.raises(ConfigError, match="cannot be opened"):
        Spool(tmp_path, PLENTY)


def test_a_disk_that_is_full_is_an_error_and_what_was_taken_stays(tmp_path: Path) -> None:
    script = f"""
import resource
from pathlib import Path
from engine import OnsetError
from stream.cloudevents import Record
from stream.spool import Spool
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
spool = Spool(Path({str(tmp_path / "spool.db")!r}), 10**9)
spool.append([Record(b"s", b"0", [])])
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    for number in range(1, 10**6):
        spool.append([Record(b"s", b"%d" % number, [("x", bytes(20_000))])])
except OnsetError as problem:
    assert "cannot go on" in str(problem), problem
    print(number)
    assert len(spool) == number
"""
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, timeout=60, capture_output=True, text=True, check=True
    )
    assert numbers(Spool(tmp_path / "spool.db", PLENTY)) == list(range(int(result.stdout)))


_FEEDER = """
import sys
from pathlib import Path
from stream.cloudevents import Record
from stream.spool import Spool
spool = Spool(Path(sys.argv[1]), 10**9)
number = int(sys.argv[2])
while True:
    n = 1 + number % 7
    spool.append([Record(b"s", b"%d" % i, []) for i in range(number, number + n)])
    number += n
    print(number, flush=True)  # all below are durable
    if number % 3 == 0:
        spool.remove(spool.peek(2)[-1][0])
        print("removed 2", flush=True)
"""


def test_a_process_that_is_killed_loses_nothing_that_it_was_told_is_safe(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    removed_at_least = taken_at_least = following = 0
    for life in range(8):
        feeder = subprocess.Popen(
            [sys.executable, "-c", _FEEDER, str(path), str(following)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert feeder.stdout is not None
        lines = [feeder.stdout.readline()]
        threading.Timer(0.05 + 0.03 * life, feeder.send_signal, (signal.SIGKILL,)).start()
        lines += feeder.stdout.readlines()
        feeder.wait(30)
        assert feeder.returncode == -signal.SIGKILL
        whole = [line.strip() for line in lines if line.endswith("\n")]
        removed_at_least += 2 * whole.count("removed 2")
        taken_at_least = max(int(line) for line in whole if not line.startswith("removed"))
        spool = Spool(path, PLENTY)
        found = numbers(spool)
        spool.close()
        # One append and one removal may have been done and not told.
        assert found == list(range(found[0], found[-1] + 1))
        assert removed_at_least <= found[0] <= removed_at_least + 2
        assert taken_at_least <= found[-1] + 1 <= taken_at_least + 7
        removed_at_least, following = found[0], found[-1] + 1
    assert following > 50
