"""No secret leaves in an error or a log, under whatever key of a configuration or option it was put.

The placements are made from the models: every kind of secret under every key, in place of every group of
keys, as an unknown key, and beside every key under a name that says what it is.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import random
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel
from zmq.utils import z85

from engine import OnsetError, redaction
from engine.manifest import read_bundle
from engine.redaction import hide, learn, learn_arguments, redacted
from engine.schema import _models_in, parse
from onset import main
from stream import logs
from stream.config import ServiceConfig, load_service_config
from stream.counters import Counters
from stream.kafka_connection import Sasl
from stream.sinks import open_sinks
from stream.zmq_keys import read_secret, write_keys
from stream.zmq_source import ZmqSource

ROOT = Path(__file__).resolve().parents[2]
Place = tuple[str | int, ...]


def curve_key(seed: int) -> str:
    return str(z85.encode(random.Random(seed).randbytes(32)).decode())


PEM = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0\n0hx9tGmwbCJe=\n-----END PRIVATE KEY-----\n"

# What is written down, and what of it must not be seen. A prefix is too much already.
SECRETS = {
    "curve": (curve_key(1), [curve_key(1)[:12]]),
    "curve with a slash": (curve_key(7), [curve_key(7)[:12], curve_key(7)[-12:]]),
    "password": ("Tr0ub4dor&3xyz", ["Tr0ub4"]),
    "password with quotes": ("Tr0'ub\"4do\\r", ["Tr0", "4do"]),
    "token": ("qJ8vT2mZ4xW9bK1s", ["qJ8vT2"]),
    "url": ("tcp://sensor:hunter2@broker.example.org:5555", ["hunter2"]),
    "url with a path": ("kafka://sensor:hunt/er@2@broker:9092/topic", ["hunt", "er@2"]),
    "address": ("sensor:hunter2@broker.example.org:9092", ["hunter2"]),
    "addresses": ("broker-1:9092,sensor:hunter2@broker-2:9092", ["hunter2"]),
    "missing blank": ("password:Tr0ub4dor&3xyz", ["Tr0ub4"]),
    "pem": (PEM, ["MIIEvQIB", "0hx9tGmw"]),
}


def with_everything(kind: str) -> dict[str, Any]:
    """A configuration that has every group of keys, with a source of this kind."""
    connection = {
        "bootstrap": ["127.0.0.1:1"],
        "tls": {"ca": "ca.pem", "certificate": "c.pem", "key": "c.key"},
        "sasl": {"username": "onset", "password": "the right 0ne"},
    }
    values: dict[str, Any] = {"bundle": "bundle", "http": {}, "engine": {}, "decoding": {}}
    if kind == "kafka":
        values["source"] = {"kafka": {"connection": connection, "topic": "frames", "events": "events"}}
        values["dead_letters"] = {"kafka_topic": "letters"}
        return values
    curve = {"secret": "keys/onset.secret", "clients": "keys/clients"}
    values["source"] = {"zmq": {"endpoint": "tcp://127.0.0.1:*", "curve": curve}}
    values["sinks"] = [
        {"kafka": {"connection": connection, "topic": "events", "spool": "spool.db"}},
        {"file": "events.jsonl"},
    ]
    values["dead_letters"] = {"file": "letters.jsonl"}
    return values


def keys_of(model: type[BaseModel], above: Place = ()) -> Iterator[Place]:
    """Every key of a model and of those below it."""
    for name, field in model.model_fields.items():
        yield (*above, name)
        below = (*above, name, 0) if name == "sinks" else (*above, name)
        if name == "sinks":
            yield below
        for inner in _models_in(field.annotation):
            yield from keys_of(inner, below)


def put(values: Any, place: Place, value: object) -> dict[str, Any]:
    """The values with one of them replaced, or added."""
    changed: dict[str, Any] = copy.deepcopy(values)
    at: Any = changed
    for part in place[:-1]:
        if isinstance(at, dict):
            at = at.setdefault(part, {})
        else:
            at = at[part]
        assert isinstance(at, (dict, list))
    at[place[-1]] = value
    return changed


def placements() -> list[tuple[str, Place]]:
    places = list(keys_of(ServiceConfig))
    return [
        ("kafka" if "kafka" in place[:2] or place[0] == "kafka_topic" else "zmq", place) for place in places
    ]


def use(path: Path) -> None:
    """Load the configuration and open what it names, as a service does. Raises what that raises."""
    config = load_service_config(path)
    with suppress_others() as first:
        first(lambda: read_bundle(config.bundle))
        if config.source.zmq is not None:
            first(lambda: ZmqSource(config.source.zmq, Counters()).close())  # type: ignore[arg-type]
        if config.source.kafka is not None:
            first(config.source.kafka.connection.client_options)
        first(lambda: open_sinks(config.sinks, Counters(), lambda: False).close())


class suppress_others:
    """Runs several things, and raises at the end the first error of all."""

    def __init__(self) -> None:
        self.problem: Exception | None = None

    def __enter__(self) -> Any:
        def run(action: Any) -> None:
            try:
                action()
            except (OnsetError, OSError) as problem:
                self.texts = told(problem)
                said.append(self.texts)
                self.problem = self.problem or problem

        return run

    def __exit__(self, *_: object) -> None:
        if self.problem is not None:
            raise self.problem


said: list[str] = []


def told(problem: BaseException) -> str:
    """All that is ever printed of an error: by the command line, in both logs, and as a traceback."""
    stream = io.StringIO()
    for formatter in (logs._TextLines("%(asctime)s %(levelname)s "), logs._JsonLines()):
        info = (type(problem), problem, problem.__traceback__)
        record = logging.LogRecord("onset", logging.ERROR, "", 0, "it failed: %s", (problem,), info)
        stream.write(formatter.format(record) + "\n")
    stream.write(redacted("".join(traceback.format_exception(problem))) + redacted(str(problem)))
    return stream.getvalue()


@pytest.fixture(autouse=True)
def _nothing_is_hidden_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_hidden", redaction.Hidden())
    said.clear()


def assert_silent(text: str, parts: list[str]) -> None:
    for part in parts:
        for form in (part, json.dumps(part)[1:-1], repr(part)[1:-1]):
            assert form not in text


@pytest.mark.parametrize("kind", SECRETS)
def test_no_secret_under_any_key_is_told(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    value, parts = SECRETS[kind]
    failed = 0
    for number, (source, place) in enumerate(placements()):
        base = with_everything(source)
        parent, name = place[:-1], str(place[-1])
        ways = [put(base, place, value), put(base, place, [value]), put(base, place, {value: 1})]
        if name != "sinks" and not isinstance(place[-1], int):
            ways += [put(base, (*parent, value), "x"), put(base, (*parent, name + "s"), value)]
        # Of the ways to write it there each is taken, with one secret or another, under every key.
        for way in {0, 1 + (number + list(SECRETS).index(kind)) % (len(ways) - 1)}:
            values = ways[way]
            monkeypatch.setattr(redaction, "_hidden", redaction.Hidden())
            folder = tmp_path / f"{number}-{way}"
            folder.mkdir()
            (folder / "service.yaml").write_text(json.dumps(values))
            said.clear()
            with suppress(OnsetError, OSError):
                try:
                    use(folder / "service.yaml")
                except (OnsetError, OSError) as problem:
                    failed += 1
                    said.append(told(problem))
                    raise
            assert_silent("\n".join(said), parts)
            stream = io.StringIO()
            handler = logging.StreamHandler(stream)
            handler.setFormatter(logs._TextLines("%(asctime)s %(levelname)s "))
            for record in caplog.records:
                handler.emit(record)
            assert_silent(stream.getvalue(), parts)
            caplog.clear()
    assert failed > 100


@pytest.mark.parametrize(
    "name", ["password", "passwort", "passwd", "secret", "token", "api_key", "credentials"]
)
def test_a_plain_word_is_hidden_under_every_name_that_says_what_it_is(name: str, tmp_path: Path) -> None:
    parents = {place[:-1] for _, place in placements() if not isinstance(place[-1], int)}
    for value in ("hunter", 271828182, ["hunter"], {"of": "hunter"}):
        for parent in sorted(parents, key=str):
            base = with_everything("kafka" if "kafka" in parent[:2] else "zmq")
            (tmp_path / "service.yaml").write_text(json.dumps(put(base, (*parent, name), value)))
            with pytest.raises(OnsetError) as problem:
                use(tmp_path / "service.yaml")
            assert_silent(told(problem.value) + "\n".join(said), ["hunter", "271828182"])


@pytest.mark.parametrize("key", ["password_file", "password_env", "password", "mechanism"])
def test_a_plain_word_is_hidden_under_the_keys_of_the_password(key: str, tmp_path: Path) -> None:
    values = with_everything("kafka")
    del values["source"]["kafka"]["connection"]["sasl"]["password"]
    values["source"]["kafka"]["connection"]["sasl"][key] = "hunter"
    values["source"]["kafka"]["connection"]["tls"] = {}
    (tmp_path / "service.yaml").write_text(json.dumps(values))
    with pytest.raises(OnsetError) as problem:
        use(tmp_path / "service.yaml")
    assert_silent(told(problem.value), ["hunter"])


@pytest.mark.parametrize(
    "text",
    [
        "password: hunter2: x",
        "password: 'hunter2",
        "password: *hunter2",
        "password: !hunter2 x",
        "password: !!python/object:hunter2 x",
        "password: {hunter2",
        "%hunter2\n---\na: b",
        "a:\n  b\n password:hunter2",
        "password: @hunter2",
        "&hunter2 &hunter2 a",
        "? hunter2\n: - x\n  -y: z\n z",
        "{[hunter2]: {}, {hunter2: 1}: 2}",
        "\thunter2",
    ],
)
def test_what_is_no_yaml_is_told_without_the_words_in_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "service.yaml").write_text(text)
    with pytest.raises(OnsetError) as problem:
        load_service_config(tmp_path / "service.yaml")
    assert_silent(told(problem.value), ["hunter"])


def test_what_is_read_as_a_secret_is_hidden_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "password").write_text("from a file\n")
    monkeypatch.setenv("ONSET_TEST", "from the environment")
    for way in (
        {"password_file": tmp_path / "password"},
        {"password_env": "ONSET_TEST"},
        {"password": "itself"},
    ):
        Sasl(username="u", **way).secret()
    _, secret = write_keys(tmp_path, "a")
    key = read_secret(secret).secret.decode()
    problem = RuntimeError(f"('from a file', 'from the environment', 'itself', {key!r})")
    assert told(problem).count("('***', '***', '***', '***')") == 6


def test_ordinary_messages_stay_as_they_are(tmp_path: Path) -> None:
    for name in ("service.yaml", "service-kafka.yaml"):
        load_service_config(ROOT / "configs" / name)
    values = with_everything("zmq")
    values["source"]["zmq"]["curve"]["secret"] = "/etc/onset/keys/clients/gate-7/Onset.secret"
    connection = values["sinks"][0]["kafka"]["connection"]
    connection["sasl"] = {"username": "onset", "password_file": "kafka.password"}
    learn(values)
    learn({"sasl": {"username": "onset", "password_env": "KAFKA_PASSWORD", "mechanism": "SCRAM-SHA-512"}})
    learn_arguments(["send", "recording_U02.npy", "--to", "tcp://127.0.0.1:5555", "--key", "camera-1.secret"])
    for message in (
        "ready: listening on pull+bind:tcp://127.0.0.1:5555",
        "/etc/onset/keys/clients/gate-7/Onset.secret: mode is 0644",
        "`password_file`: /etc/onset/kafka.password: No such file or directory",
        "`password_env`: the variable KAFKA_PASSWORD is not set, or empty",
        "stream cam-1@gate: messages_2 2024-01-01T00:00:00Z, bundle hapt@0123456789ab",
        "onset: spool.db, events.jsonl, onset-spool-0b1d, recording_U02.npy, camera-1.secret, SCRAM-SHA-512",
        "sha256 is 9f86d081884c…, found 'fp61', 65536 bytes of 5, key, secret, token",
    ):
        assert redacted(message) == message


def test_wrong_choices_and_numbers_are_still_shown(tmp_path: Path) -> None:
    for values, words in (
        ({"log": "jsn"}, "found 'jsn'"),
        ({"max_streams": 70000}, "found 70000"),
        ({"overload": "drop_oldest"}, "found 'drop_oldest'"),
        ({"engin": {}}, "`engin` is not a key here (did you mean `engine`?)"),
        ({"engine": {"precision": "fp61"}}, "found 'fp61'"),
        ({"idle_timeout": "1O"}, "`idle_timeout`: Input should be a valid number"),
    ):
        with pytest.raises(OnsetError) as problem:
            parse(ServiceConfig, {**with_everything("zmq"), **values}, "service.yaml")
        assert words in str(problem.value)


def test_a_short_secret_is_hidden_where_it_stands_alone() -> None:
    hide("abc")
    assert redacted("abc 'abc' abcd a/abc") == "*** '***' abcd a/***"


def test_a_password_that_is_rotated_costs_no_more_each_time_it_is_read() -> None:
    for _ in range(1000):
        hide("the same")
    assert len(redaction._hidden._forms) < 10


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """What `onset WORDS` says: the real entry point, in this process."""
    for owner, name in ((sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setenv("COLUMNS", "60")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["onset", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        captured = capfd.readouterr()
        return captured.out + captured.err

    yield run
    root.handlers[:], root.level = handlers, level


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("run", "service.yaml"), ["Tr0ub4", "hunter"]),
        (("run", curve_key(7)), [curve_key(7)[:8]]),
        (("send", "r.npy", "--rate", "50", "--to", "kafka://sensor:hunter2@broker/t"), ["hunter"]),
        (("send", "r.npy", "--rate", "Tr0ub4dor&3xyz", "--to", "tcp://h:1"), ["Tr0ub4"]),
        (
            ("send", "r.npy", "--rate", "50", "--to", "tcp://h:1", "--server-key", curve_key(7)),
            [curve_key(7)[:8]],
        ),
        (
            ("send", "r.npy", "--rate", "5", "--to", "tcp://h:1", "--key", curve_key(7), "--server-key", "s"),
            [curve_key(7)[:8]],
        ),
        (("send", "r.npy", "--rate", "50", "--to", "kafka:///t", "--kafka-config", "kafka.yaml"), ["hunter"]),
        (("send", "r.npy", "--password=hunter2", "--to", "tcp://sensor:hunter2@h:1"), ["hunter"]),
    ],
)
def test_the_command_line_shows_none(
    words: tuple[str, ...],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    typed: Callable[..., str],
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "r.npy", np.zeros((10, 2), np.float32))
    (tmp_path / "s").write_text(curve_key(3))
    values = put(with_everything("zmq"), ("bundle",), "Tr0ub4dor&3xyz")
    del values["sinks"][0], values["source"]["zmq"]["curve"]
    (tmp_path / "service.yaml").write_text(json.dumps(values))
    (tmp_path / "kafka.yaml").write_text("bootstrap: sensor:hunter2@broker:9092\n")
    text = typed(*words)
    assert_silent(text, parts)
    assert len(text) > 20
    assert "Traceback" not in text


def test_no_traceback_that_nobody_caught_shows_one(tmp_path: Path) -> None:
    code = """
import sys, threading
from engine.redaction import guard_tracebacks, hide
hide("hunter2")
guard_tracebacks()
def fail():
    raise ValueError("with " + "hunt" + "er2")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
class Late:
    def __del__(self):
        fail()
Late()
fail()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr.count("ValueError: with ***") == 3
    assert "hunter2" not in done.stderr
