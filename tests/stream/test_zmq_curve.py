"""CURVE on real sockets: who is on the list is let in, others are refused and counted; secrets stay so."""

from __future__ import annotations

import logging
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import zmq

from engine import ConfigError
from stream.counters import Counters
from stream.zmq_keys import ClientKeys, read_clients, read_public, read_secret, write_keys
from stream.zmq_producer import ZmqProducer, open_producer
from stream.zmq_publisher import ZmqPublisher
from stream.zmq_settings import CurveSettings, ZmqSettings
from stream.zmq_source import ZmqSource
from tests.stream import served
from tests.stream.served import exchange, serve_until

LOOPBACK = "tcp://127.0.0.1:*"
COMMAND = [sys.executable, "-c", "from onset import main; main()"]
ROOT = Path(__file__).resolve().parents[2]


class Keys:
    """Keys of a service, of a client on its list, and of a stranger."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_keys(folder, "service")
        write_keys(folder / "clients", "camera")
        write_keys(folder / "clients", "watch")
        write_keys(folder / "elsewhere", "stranger")
        self.curve = CurveSettings(secret=folder / "service.secret", clients=folder / "clients")

    def client(self, name: str = "clients/camera", server: str = "service") -> ClientKeys:
        return ClientKeys(
            read_public(self.folder / f"{server}.public"), read_secret(self.folder / f"{name}.secret")
        )

    def secrets(self) -> list[str]:
        return [path.read_text().split("\n")[1] for path in self.folder.rglob("*.secret")]


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys")


def open_source(keys: Keys, *endpoints: str) -> ZmqSource:
    return ZmqSource(ZmqSettings(endpoint=endpoints or LOOPBACK, curve=keys.curve), Counters())


def produce(
    source: ZmqSource, endpoint: str, curve: ClientKeys | None, seconds: float = 10
) -> ZmqProducer | ZmqPublisher:
    """A producer that was let in, or its complaint."""
    return served.produce(source, endpoint, connect_timeout=seconds, curve=curve)


def say(endpoint: str, curve: ClientKeys | None, data: bytes) -> Callable[[], None]:
    def work() -> None:
        with open_producer(endpoint, curve=curve) as producer:
            producer.send_bytes(data)

    return work


def refused(source: ZmqSource) -> set[str]:
    counted = source._counters.snapshot()
    return {name for name, value in counted.items() if name.startswith("zmq_refused") and value}


@pytest.mark.parametrize("kinds", [("pull", "push"), ("sub", "pub")])
@pytest.mark.parametrize("source_binds", [True, False])
def test_clients_on_the_list_are_let_in_whoever_binds(
    kinds: tuple[str, str], source_binds: bool, keys: Keys
) -> None:
    with open_source(keys) as probe:
        address = probe.address  # a port that was free a moment ago
    here, there = ("bind", "connect") if source_binds else ("connect", "bind")
    with open_source(keys, f"{kinds[0]}+{here}:{address}") as source:
        assert exchange(source, say(f"{kinds[1]}+{there}:{address}", keys.client(), b"hello")) == [b"hello"]
        assert refused(source) == set()


def test_no_flipped_bit_of_a_key_file_ends_in_a_traceback(tmp_path: Path) -> None:
    draw = random.Random(15)
    for path, read in zip(reversed(write_keys(tmp_path, "service")), (read_secret, read_public), strict=True):
        data = path.read_bytes()
        read_as_a_key = 0
        for number in range(200):
            changed = bytearray(data)
            if number % 10:
                changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            else:
                del changed[draw.randrange(len(data)) :]
            path.write_bytes(changed)
            with suppress(ConfigError):
                read(path)
                read_as_a_key += 1
        assert 20 < read_as_a_key < 190


def test_the_list_may_be_a_file_and_holds_all_of_its_keys(keys: Keys, tmp_path: Path) -> None:
    names = ("camera", "watch")
    listed = tmp_path / "list"
    listed.write_text("\n".join((keys.folder / "clients" / f"{name}.public").read_text() for name in names))
    curve = CurveSettings(secret=keys.curve.secret, clients=listed)
    with ZmqSource(ZmqSettings(endpoint=LOOPBACK, curve=curve), Counters()) as source:
        for name in names:
            work = say(source.address, keys.client(f"clients/{name}"), name.encode())
            assert exchange(source, work) == [name.encode()]


def test_a_stranger_is_refused_and_named(keys: Keys, caplog: pytest.LogCaptureFixture) -> None:
    with open_source(keys) as source:
        for _ in range(2):
            with pytest.raises(
                ConfigError, match=r"its public key is not among the service's `curve\.clients`"
            ):
                produce(source, source.address, keys.client("elsewhere/stranger"))
        assert refused(source) == {"zmq_refused{stranger}"}
        assert source._counters.snapshot()["zmq_refused{stranger}"] == 2
    public = read_public(keys.folder / "elsewhere" / "stranger.public").decode()
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 1  # of two: the log is bounded, the counter is not
    assert public in lines[0]


def test_a_producer_without_keys_is_refused(keys: Keys, caplog: pytest.LogCaptureFixture) -> None:
    with open_source(keys) as source:
        with pytest.raises(ConfigError, match="one of the two uses CURVE keys and the other does not"):
            produce(source, source.address, None)
        serve_until(source, lambda: bool(refused(source)))
        # Both sides see that they do not match, and who hangs up first leaves the other without the reason.
        assert refused(source) <= {"zmq_refused{mechanism}", "zmq_refused{broken_off}"}
    assert "ZeroMQ connection refused" in caplog.text
    assert "CURVE" in caplog.text


def test_nothing_of_a_producer_without_keys_arrives(keys: Keys) -> None:
    with open_source(keys) as source, zmq.Context() as context, context.socket(zmq.PUSH) as plain:
        plain.linger = 0
        plain.connect(source.address)
        plain.send(b"let me in")
        serve_until(source, lambda: bool(refused(source)))
        assert not source.wait(0.3)


def test_a_producer_with_another_server_key_is_refused(keys: Keys, caplog: pytest.LogCaptureFixture) -> None:
    with open_source(keys) as source:
        with pytest.raises(ConfigError, match=r"nobody answers .* Its log says whether it refused somebody"):
            produce(source, source.address, keys.client(server="elsewhere/stranger"), seconds=1)
        assert refused(source) == {"zmq_refused{wrong_server_key}"}
    assert "the producer holds another server key than this service's" in caplog.text


def test_a_producer_with_keys_is_told_that_a_service_has_none(keys: Keys) -> None:
    with (
        ZmqSource(ZmqSettings(endpoint=LOOPBACK), Counters()) as source,
        pytest.raises(ConfigError, match="one of the two uses CURVE keys and the other does not"),
    ):
        produce(source, source.address, keys.client())


def test_what_is_no_zeromq_is_counted_as_a_lost_connection(keys: Keys) -> None:
    with open_source(keys) as source:
        port = int(source.address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            serve_until(source, lambda: source._counters.snapshot()["peers_disconnected"] == 1)


@pytest.mark.parametrize(
    ("mistake", "here", "there"),
    [("plain", "pull", "push"), ("wrong server key", "pull", "push"), ("wrong server key", "sub", "pub")],
)
def test_a_source_that_connects_comes_back_to_a_peer_that_was_repaired(
    mistake: str, here: str, there: str, keys: Keys
) -> None:
    with open_source(keys) as probe:
        address = probe.address
    wrong = None if mistake == "plain" else keys.client(server="elsewhere/stranger")
    with open_source(keys, f"{here}+connect:{address}") as source:
        with pytest.raises(ConfigError, match="nobody answers"):
            produce(source, f"{there}+bind:{address}", wrong, seconds=1)
        assert refused(source)
        assert exchange(source, say(f"{there}+bind:{address}", keys.client(), b"repaired")) == [b"repaired"]


def test_keys_are_written_once_and_the_secret_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        public, secret = write_keys(tmp_path / "new", "a")
    finally:
        os.umask(before)
    assert (public.name, secret.name) == ("a.public", "a.secret")
    assert secret.stat().st_mode & 0o777 == 0o600
    assert read_secret(secret).public == read_public(public)
    content = secret.read_bytes(), public.read_bytes()
    for gone in (public, secret):
        with pytest.raises(ConfigError, match="is there already and is not replaced"):
            write_keys(tmp_path / "new", "a")
        assert secret.read_bytes() == content[0]
        gone.unlink()
        with pytest.raises(ConfigError, match="is there already"):
            write_keys(tmp_path / "new", "a")
        gone.write_bytes(content[gone == public])
    for name in ("", "../a", "a/b", ".hidden", "x" * 65):
        with pytest.raises(ConfigError, match="--name is"):
            write_keys(tmp_path, name)


def test_a_key_that_begins_like_a_comment_is_a_key(tmp_path: Path) -> None:
    listed = tmp_path / "list"
    listed.write_text("# a comment\n#\n\n" + "#" + "0" * 39 + "\n")
    with pytest.raises(ConfigError, match="key 1 is none"):  # five characters above 32 bits: no key after all
        read_clients(listed)
    listed.write_text("# a comment\n" + "0#000" + "0" * 35 + "\n")
    assert len(read_clients(listed)) == 1


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o620])
def test_a_secret_that_others_can_read_is_refused(mode: int, keys: Keys) -> None:
    keys.curve.secret.chmod(mode)
    with pytest.raises(ConfigError, match=rf"service\.secret: mode is {mode:04o}, .*chmod 600"):
        open_source(keys)
    keys.curve.secret.chmod(0o440)  # as an orchestrator mounts it
    open_source(keys).close()


def test_keys_that_cannot_be_used_are_told_without_showing_them(keys: Keys, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    odd = tmp_path / "odd.public"
    long = tmp_path / "long.public"
    long.write_bytes(b"#" * 2_000_000)
    secret = keys.curve.secret
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: read_secret(tmp_path / "gone.secret"), "there is no such file"),
        (lambda: read_secret(tmp_path), "there is no such file"),
        (lambda: read_clients(empty), "nobody would be let in"),
        (lambda: read_clients(tmp_path / "gone"), "there is no such file"),
        (lambda: read_clients(long), "larger than"),
        (lambda: read_public(secret), "this is a secret key, expected public ones"),
        (lambda: read_public(odd), "key 1 is none"),
        (lambda: read_public(tmp_path / "two.public"), "found 2 public keys, expected one"),
    ]
    odd.write_text(keys.secrets()[0][:-1] + "~")
    public = (keys.folder / "service.public").read_text()
    (tmp_path / "two.public").write_text(public + public)
    for read, words in cases:
        with pytest.raises(ConfigError, match=words) as problem:
            read()
        assert keys.secrets()[0][:-1] not in str(problem.value)
    for content in ("", "x" * 39, "é" * 40, public + public):
        secret.write_text(content)
        with pytest.raises(ConfigError, match="expected one secret key of 40 characters"):
            read_secret(secret)


def test_secrets_stay_out_of_reprs_and_logs(keys: Keys, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    settings = ZmqSettings(endpoint=LOOPBACK, curve=keys.curve)
    shown = [repr(settings), settings.model_dump_json(), repr(keys.client()), str(keys.client())]
    with open_source(keys) as source:
        exchange(source, say(source.address, keys.client(), b""))
        for client in (keys.client("elsewhere/stranger"), keys.client(server="elsewhere/stranger"), None):
            with pytest.raises(ConfigError) as problem:
                produce(source, source.address, client, seconds=1)
            shown += [str(problem.value), repr(problem.value)]
        shown += [source._counters.summary()]
    text = "\n".join([*shown, caplog.text])
    assert "refused" in caplog.text
    assert not any(secret in text for secret in keys.secrets())


def test_paths_of_keys_are_relative_to_their_configuration(keys: Keys) -> None:
    settings = ZmqSettings(curve=CurveSettings(secret=Path("service.secret"), clients=Path("clients")))
    assert settings.relative_to(keys.folder).curve == keys.curve
    assert settings.relative_to(Path("/elsewhere")).relative_to(keys.folder).curve == CurveSettings(
        secret=Path("/elsewhere/service.secret"), clients=Path("/elsewhere/clients")
    )
    assert ZmqSettings().relative_to(keys.folder) == ZmqSettings()


def test_the_command_line_makes_keys_and_sends_with_them(tmp_path: Path) -> None:
    def onset(*arguments: str) -> tuple[int, str]:
        done = subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    folder = tmp_path / "keys"
    outputs = [onset("keys", "--output", str(folder), "--name", name) for name in ("service", "camera")]
    outputs += [onset("keys", "--output", str(folder), "--name", "camera")]
    assert [status for status, _ in outputs] == [0, 0, 2]
    np.save(tmp_path / "a.npy", np.zeros((20, 3), np.float32))
    curve = CurveSettings(secret=folder / "service.secret", clients=folder / "camera.public")
    options = ["--server-key", str(folder / "service.public"), "--key", str(folder / "camera.secret")]
    with (
        ZmqSource(ZmqSettings(endpoint=LOOPBACK, curve=curve), Counters()) as source,
        ThreadPoolExecutor(1) as pool,
    ):
        found: list[bytes] = []
        send = ["send", str(tmp_path / "a.npy"), "--to", source.address, "--rate", "50"]
        for arguments, status, words in [
            (options, 0, "1 recording sent"),
            ([], 2, "one of the two uses CURVE keys"),
            (options[:2], 2, "--server-key and --key belong together"),
        ]:
            done = pool.submit(onset, *send, *arguments)
            found += serve_until(source, done.done, 60)
            outputs.append(done.result())
            assert done.result()[0] == status
            assert words in done.result()[1]
        assert found
    outputs.append(onset("send", "--help"))
    secrets = [path.read_text().split("\n")[1] for path in folder.glob("*.secret")]
    assert len(secrets) == 2
    assert not any(secret in text for secret in secrets for _, text in outputs)
