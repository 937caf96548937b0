"""The connection's settings: what is refused, what a client gets, and that no secret is ever said."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaProducer, errors

from engine import ConfigError
from engine.schema import load_config, parse
from stream.kafka_connection import KafkaConnection, explain

SECRET = "correct-horse-battery"
LOGIN = {"username": "onset", "password": SECRET}


def connection(**values: Any) -> KafkaConnection:
    return parse(KafkaConnection, {"bootstrap": "127.0.0.1:9092"} | values, "kafka")


def test_one_address_or_several_are_given_to_the_client() -> None:
    assert connection().client_options()["bootstrap_servers"] == ["127.0.0.1:9092"]
    several = ["a.example:9092", "[::1]:9093"]
    assert connection(bootstrap=several).client_options()["bootstrap_servers"] == several


@pytest.mark.parametrize(
    "address",
    ["", "a", "a:", ":9092", "a:0", "a:65536", "a:x", "tcp://a:1", "a b:1", "a:1,b:2", 9092, [], [""]],
)
def test_what_is_no_address_is_refused(address: object) -> None:
    with pytest.raises(ConfigError, match="bootstrap"):
        connection(bootstrap=address)


@pytest.mark.parametrize(
    ("tls", "sasl", "protocol"),
    [
        (None, None, "PLAINTEXT"),
        ({}, None, "SSL"),
        (None, LOGIN, "SASL_PLAINTEXT"),
        ({}, LOGIN, "SASL_SSL"),
    ],
)
def test_the_protocol_follows_from_what_is_given(tls: Any, sasl: Any, protocol: str) -> None:
    assert connection(tls=tls, sasl=sasl).client_options()["security_protocol"] == protocol


@pytest.mark.parametrize("tls", [None, {}])
def test_every_option_is_one_that_the_client_knows(tls: Any) -> None:
    options = connection(tls=tls, sasl=LOGIN).client_options()
    assert options.keys() <= KafkaProducer.DEFAULT_CONFIG.keys()


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
@pytest.mark.parametrize("address", ["broker.example:9092", "10.0.0.7:9092", "[2001:db8::1]:9092"])
def test_a_password_does_not_cross_a_network_in_the_open(mechanism: str, address: str) -> None:
    login = LOGIN | {"mechanism": mechanism}
    with pytest.raises(ConfigError, match="add `tls`"):
        connection(bootstrap=["localhost:9092", address], sasl=login)
    assert connection(bootstrap=address, sasl=login, tls={})
    for local in ("localhost:9092", "127.0.0.1:9092", "127.8.0.1:9092", "[::1]:9092"):
        assert connection(bootstrap=local, sasl=login)


def test_files_are_given_to_the_client_and_a_missing_one_is_named(tmp_path: Path) -> None:
    files = {name: str(tmp_path / name) for name in ("ca", "certificate", "key")}
    for file in files.values():
        Path(file).write_text("PEM")
    options = connection(tls=files).client_options()
    assert [options[f"ssl_{name}"] for name in ("cafile", "certfile", "keyfile")] == list(files.values())
    assert options["ssl_check_hostname"]
    (tmp_path / "key").unlink()
    with pytest.raises(ConfigError, match=r"tls\.key.*No such file"):
        connection(tls=files).client_options()
    with pytest.raises(ConfigError, match="belong together"):
        connection(tls={"certificate": files["certificate"]})


def test_paths_can_be_made_relative_to_a_folder(tmp_path: Path) -> None:
    found = connection(
        bootstrap="a:1",
        tls={"ca": "ca.pem", "certificate": "/etc/onset.pem", "key": "/etc/onset.key"},
        sasl={"username": "onset", "password_file": "secret"},
    ).relative_to(tmp_path)
    assert found.tls is not None
    assert found.sasl is not None
    assert (found.tls.ca, found.tls.key) == (tmp_path / "ca.pem", Path("/etc/onset.key"))
    assert found.sasl.password_file == tmp_path / "secret"
    assert connection().relative_to(tmp_path) == connection()
    assert connection(tls={}).relative_to(tmp_path) == connection(tls={})


def test_a_password_comes_from_a_file_or_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "password"
    file.write_text(f"{SECRET}\r\nnot this\n")
    from_file = connection(sasl={"username": "onset", "password_file": str(file)})
    assert from_file.client_options()["sasl_plain_password"] == SECRET
    file.write_text("rotated")
    assert from_file.client_options()["sasl_plain_password"] == "rotated"
    monkeypatch.setenv("ONSET_TEST_PASSWORD", SECRET)
    from_environment = connection(sasl={"username": "onset", "password_env": "ONSET_TEST_PASSWORD"})
    assert from_environment.client_options()["sasl_plain_password"] == SECRET


def test_a_password_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONSET_TEST_PASSWORD", "")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for way, complaint in (
        ({"password_env": "ONSET_TEST_PASSWORD"}, "ONSET_TEST_PASSWORD is not set"),
        ({"password_file": str(tmp_path / "none")}, "No such file"),
        ({"password_file": str(tmp_path / "empty")}, "first line is empty"),
        ({"password_file": str(tmp_path / "binary")}, "not UTF-8"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            connection(sasl={"username": "onset", **way}).client_options()
    for ways in ({}, {"password": SECRET, "password_env": "X"}):
        with pytest.raises(ConfigError, match="expected one of"):
            connection(sasl={"username": "onset", **ways})


def test_a_secret_is_in_no_representation_of_the_settings() -> None:
    settings = connection(sasl=LOGIN)
    for text in (repr(settings), str(settings), settings.model_dump_json(), str(settings.model_dump())):
        assert "onset" in text
        assert SECRET not in text


@pytest.mark.parametrize(
    "sasl",
    [
        {"password": SECRET},  # no username
        {"username": "onset", "password": [SECRET]},
        {"username": "onset", "password": {"value": SECRET}},
        {"username": "onset", "pasword": SECRET},
        {"username": "onset", "password": SECRET, "password_env": "X"},
        {"username": "onset", "password": SECRET, "mechanism": "ROT13"},
        [SECRET],
        SECRET,
    ],
    ids=str,
)
def test_a_secret_is_in_no_complaint_about_the_settings(sasl: object) -> None:
    with pytest.raises(ConfigError) as told:
        connection(sasl=sasl, bootstrap="far.example:1")
    assert SECRET not in str(told.value)
    assert SECRET[:8] not in str(told.value)


def test_a_number_that_stands_for_a_password_is_not_said_either(tmp_path: Path) -> None:
    file = tmp_path / "kafka.yaml"
    file.write_text("bootstrap: localhost:9092\nsasl: {username: onset, password: 98765432}\n")
    with pytest.raises(ConfigError, match=r"sasl\.password") as told:
        load_config(KafkaConnection, file)
    assert "98765432" not in str(told.value)
    file.write_text("bootstrap: localhost:9092\nsasl:\n  username: onset\n  password: 'it is: 98765432\n")
    with pytest.raises(ConfigError, match="line") as told:
        load_config(KafkaConnection, file)
    assert "98765432" not in str(told.value)


def test_what_stands_where_a_broker_should_be_is_told_apart() -> None:
    timeout = errors.KafkaTimeoutError("Unable to bootstrap")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert "does not answer as a broker should" in explain(timeout, connection(bootstrap=address))
        assert "refuses the login" in explain(timeout, connection(bootstrap=address, sasl=LOGIN))
        here = connection(bootstrap=["127.0.0.1:1", address])
        assert address in explain(timeout, here)
    assert "no broker can be reached at" in explain(timeout, connection(bootstrap=address))
    assert "Connection refused" in explain(timeout, connection(bootstrap=address, tls={}))


def test_a_server_without_tls_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as client:
                client.recv(1000)
                client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        settings = connection(bootstrap=f"127.0.0.1:{server.getsockname()[1]}", tls={})
        assert "does not speak TLS" in explain(errors.KafkaTimeoutError(), settings)
        thread.join()


def test_every_error_of_a_broker_is_one_sentence() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) > 50
    for kind in set(kinds) - {errors.LogTruncationError}:  # which wants arguments, and no producer meets
        sentence = explain(kind())
        assert sentence
        assert "\n" not in sentence
        assert len(sentence) <= 300
    assert explain(errors.KafkaConnectionError("x" * 5000)) == "no broker can be reached"
    assert len(explain(RuntimeError("x\n" * 5000))) <= 200
