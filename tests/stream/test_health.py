"""Health over HTTP, asked as probes, scrapers and hostile clients ask: over real connections."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from engine import ConfigError
from engine.schema import parse
from stream import health as module
from stream.counters import Counters
from stream.exposition import Exposition
from stream.health import Health, HealthServer, HttpSettings

FREE = HttpSettings(address="127.0.0.1:0")


class Clock:
    """Time that goes on when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> Health:
    return Health(("engine", "partitions"), stalled_after=10.0, clock=clock)


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
def server(health: Health, counters: Counters) -> Iterator[HealthServer]:
    with HealthServer(FREE, health, counters.registry) as opened:
        yield opened


def port_of(server: HealthServer) -> int:
    return int(server.address.rpartition(":")[2])


def ask(server: HealthServer, path: str, method: str = "GET", **headers: str) -> tuple[int, str, str]:
    """(status, content type, body)"""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=30)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.getheader("Content-Type", ""), response.read().decode()
    finally:
        connection.close()


def connect(server: HealthServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port_of(server)), timeout=30)


def hung_up(client: socket.socket) -> bool:
    """Wait until the server closes, and say that it did, without an answer."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def await_that(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_loop_that_beats_is_alive_and_one_that_stands_is_not(
    server: HealthServer, health: Health, clock: Clock
) -> None:
    clock.now = 10.0
    assert ask(server, "/live")[0] == 200
    clock.now = 10.5
    status, _, body = ask(server, "/live")
    assert status == 503
    assert "10.5 s" in body
    assert "every 10 s" in body
    health.beat()
    assert ask(server, "/live")[0] == 200


def test_ready_is_when_every_condition_holds_and_says_what_is_missing(
    server: HealthServer, health: Health
) -> None:
    health.set("engine", True)
    status, kind, body = ask(server, "/ready")
    assert (status, kind) == (503, "application/json")
    assert json.loads(body) == {"ready": False, "missing": {"partitions": "not yet"}}
    health.set("partitions", True)
    status, _, body = ask(server, "/ready")
    assert (status, json.loads(body)) == (200, {"ready": True, "missing": {}})
    health.set("partitions", False, 'none: "revoked"')
    assert json.loads(ask(server, "/ready")[2])["missing"] == {"partitions": 'none: "revoked"'}


def test_a_loop_that_stands_is_not_ready(server: HealthServer, health: Health, clock: Clock) -> None:
    health.set("engine", True)
    health.set("partitions", True)
    clock.now = 11.0
    status, _, body = ask(server, "/ready")
    assert status == 503
    assert list(json.loads(body)["missing"]) == ["live"]


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "text/plain; version=0.0.4; charset=utf-8"),
        ("application/openmetrics-text;version=1.0.0,text/plain;q=0.1", "application/openmetrics-text"),
        ("application/openmetrics-text; version=nonsense", "text/plain; version=0.0.4; charset=utf-8"),
        ("application/openmetrics-text; version=1.1.\n\tX: 1", "text/plain; version=0.0.4; charset=utf-8"),
    ],
)
def test_metrics_are_what_was_counted_in_the_format_that_is_asked_for(
    server: HealthServer, counters: Counters, accept: str, kind: str
) -> None:
    counters.messages.inc(3)
    counters.end_to_end_seconds.observe(0.03)
    status, found, body = ask(server, "/metrics", Accept=accept)
    assert status == 200
    assert found.startswith(kind)
    assert "onset_messages_total 3.0" in body
    assert body.endswith("# EOF\n") == ("openmetrics" in kind)
    if "openmetrics" not in kind:
        families = {family.name: family for family in text_string_to_metric_families(body)}
        buckets = {s.labels["le"]: s.value for s in families["onset_end_to_end_seconds"].samples if s.labels}
        assert (buckets["0.02"], buckets["0.05"], buckets["+Inf"]) == (0.0, 1.0, 1.0)


def test_head_is_answered_like_get_without_the_body(server: HealthServer) -> None:
    for path, expected in (("/live", 200), ("/ready", 503), ("/metrics", 200), ("/other", 404)):
        assert ask(server, path, "HEAD")[0::2] == (expected, "")
        assert ask(server, path)[0] == expected
    with connect(server) as client:  # what a client would have to skip is not sent either
        client.sendall(b"HEAD /live HTTP/1.1\r\n\r\n")
        assert b"".join(iter(lambda: client.recv(4096), b"")).endswith(b"\r\nConnection: close\r\n\r\n")


def test_other_paths_and_methods_are_refused(server: HealthServer) -> None:
    assert ask(server, "/")[0] == 404
    assert ask(server, "/metrics/../live")[0] == 404
    assert ask(server, "/live", "POST")[0] == 405
    assert ask(server, "/live?verbose=1")[0] == 200


def test_a_client_that_sends_a_byte_at_a_time_holds_up_nobody_and_is_cut_off(
    server: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_DEADLINE_SECONDS", 1.0)
    slow = connect(server)
    done = threading.Event()

    def trickle() -> None:
        try:
            for byte in b"GET /live HTTP/1.1\r\nX: " + b"x" * 1000:
                slow.sendall(bytes([byte]))
                time.sleep(0.05)
        except OSError:
            done.set()  # in the midst of its request: the server has hung up

    thread = threading.Thread(target=trickle)
    thread.start()
    assert ask(server, "/live")[0] == 200
    assert done.wait(30)
    thread.join()
    slow.close()


def test_a_client_that_does_not_read_is_cut_off(
    server: HealthServer, counters: Counters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_DEADLINE_SECONDS", 1.0)
    for number in range(10_000):  # 12 MB: more than the kernel's buffers take
        counters.actions.labels("action.ended", f"a class with a long name, number {number:0500d}").inc()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(30)
        client.connect(("127.0.0.1", port_of(server)))
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        await_that(lambda: bool(server._open))
        await_that(lambda: not server._open)
        received = 0
        try:
            while data := client.recv(65536):
                received += len(data)
        except ConnectionResetError:
            pass
    assert received < len(ask(server, "/metrics")[2])


def test_a_client_that_reads_late_gets_the_whole_answer(
    health: Health, counters: Counters, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters.actions.labels("action.ended", "x" * 20_000).inc()
    listen = module._listen

    def with_small_buffers(address: str) -> socket.socket:
        listener = listen(address)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
        return listener

    monkeypatch.setattr(module, "_listen", with_small_buffers)
    with HealthServer(FREE, health, counters.registry) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(30)
        client.connect(("127.0.0.1", port_of(server)))
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        time.sleep(0.3)
        response = http.client.HTTPResponse(client)
        response.begin()
        assert b"x" * 20_000 in response.read()  # IncompleteRead where it ends too soon


def test_hundreds_of_silent_connections_cost_no_thread_and_the_oldest_give_way(server: HealthServer) -> None:
    threads = threading.active_count()
    idle = [connect(server) for _ in range(300)]
    assert hung_up(idle[0])  # well before the deadline of the last
    assert ask(server, "/live")[0] == 200
    assert threading.active_count() == threads
    assert len(server._open) <= module._MAX_CONNECTIONS
    for client in idle:
        client.close()


def test_a_request_without_end_is_cut_off(server: HealthServer) -> None:
    with connect(server) as client, pytest.raises((BrokenPipeError, ConnectionResetError)):
        client.sendall(10_000 * (b"X: " + b"x" * 1000 + b"\r\n"))
    assert ask(server, "/live")[0] == 200


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([b"GET", b"HEAD", b" ", b"/metrics", b"/live", b"HTTP/1.1", b"\r\n", b"Accept:"]),
            st.sampled_from([b"application/openmetrics-text", b"text/plain", b";", b"version=", b"1.0.0"]),
            st.binary(max_size=6),
        ),
        max_size=16,
    ).map(b"".join)
)
def test_no_request_is_logged_or_brings_the_server_down(request_: bytes) -> None:
    entries: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = entries.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        with HealthServer(FREE, Health(()), Counters().registry) as server:
            with connect(server) as client:
                client.sendall(request_ + b"\r\n\r\n")
                try:
                    answer = client.recv(65536)
                except ConnectionResetError:
                    answer = b"HTTP/1.1 "  # answered before it had read all; what it said is lost
                assert answer.startswith(b"HTTP/1.1 ")
            assert ask(server, "/ready")[0] == 200
    finally:
        logging.getLogger().removeHandler(handler)
    assert [entry.getMessage() for entry in entries if entry.levelno > logging.DEBUG] == []


def test_scrapes_and_the_loop_do_not_disturb_each_other(server: HealthServer, counters: Counters) -> None:
    def count() -> None:
        for number in range(60_000):
            counters.refused.labels(f"reason {number % 500}").inc()
            counters.step_seconds.observe(0.01)

    thread = threading.Thread(target=count)
    thread.start()
    last = 0.0
    while last < 60_000:  # what was rendered before the end is soon too old
        values = [
            sample.value
            for family in text_string_to_metric_families(ask(server, "/metrics")[2])
            for sample in family.samples
            if sample.name == "onset_step_seconds_count"
        ]
        assert values[0] >= last
        last = values[0]
    thread.join()
    assert last == 60_000


class Rendered(Collector):
    """Counts how often it is collected, which takes so many seconds of a clock."""

    def __init__(self, clock: Clock, seconds: float = 0.0) -> None:
        self.clock, self.seconds, self.times = clock, seconds, 0

    def collect(self) -> Iterator[Metric]:
        self.times += 1
        self.clock.now += self.seconds
        yield GaugeMetricFamily("times", "of rendering", value=self.times)


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_metrics_are_rendered_for_all_at_once_and_take_a_bounded_share_of_the_time(
    clock: Clock, seconds: float
) -> None:
    registry = CollectorRegistry()
    rendered = Rendered(clock, seconds)
    registry.register(rendered)
    rendered.times, clock.now = 0, 0.0  # it is collected once to be registered
    exposition = Exposition(registry, clock)
    accepted = [
        "",
        "text/plain;version=1.0.0;escaping=dots",
        "application/openmetrics-text;version=1.0.0",
        "*/*",
    ]
    accepted += [f"application/openmetrics-text;version=0.0.{n};escaping=values" for n in range(20)]
    for _ in range(200):
        for accept in accepted:
            exposition.text(accept)
    assert rendered.times == 2  # of each format one
    while clock.now < 1000:
        clock.now += 0.1
        exposition.text("")
    assert 2 * seconds + rendered.times * seconds < 1000 / 15
    assert rendered.times > 40


def test_a_flood_of_scrapes_is_rendered_a_few_times(health: Health) -> None:
    registry = CollectorRegistry()
    rendered = Rendered(Clock())
    registry.register(rendered)
    began = time.monotonic()
    with HealthServer(FREE, health, registry) as server:
        for _ in range(150):
            assert "times" in ask(server, "/metrics")[2]
    assert rendered.times <= 2 + time.monotonic() - began


@pytest.mark.parametrize("path", ["/live", "/ready", "/nothing"])
def test_a_flood_of_probes_is_answered_at_a_bounded_rate(
    server: HealthServer, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RATE", 50)
    monkeypatch.setattr(module, "_BURST", 10)
    ask(server, path)
    began = time.monotonic()
    for _ in range(40):
        ask(server, path)
    assert time.monotonic() - began > (40 - 10 - 1) / 50 - 0.05  # unbounded: some 0.04 s


def test_an_address_in_use_is_refused_with_a_sentence(server: HealthServer, health: Health) -> None:
    with pytest.raises(ConfigError, match=r"cannot be bound: Address already in use.*another service"):
        HealthServer(HttpSettings(address=server.address), health, Counters().registry)


@pytest.mark.parametrize("address", ["9464", ":9464", "::1:9464", "localhost:http", "a:70000", "a:-1", ""])
def test_an_address_that_is_none_is_refused_with_the_configuration(address: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        parse(HttpSettings, {"address": address}, "service.yaml")


def test_a_host_that_does_not_exist_is_refused_with_a_sentence(health: Health) -> None:
    for host in ("no-such-host.invalid", "x" * 300):
        with pytest.raises(ConfigError, match="cannot be bound"):
            HealthServer(HttpSettings(address=f"{host}:0"), health, Counters().registry)


def test_ipv6_is_served(health: Health) -> None:
    try:
        opened = HealthServer(HttpSettings(address="[::1]:0"), health, Counters().registry)
    except ConfigError as problem:
        pytest.skip(str(problem))
    with opened as server, socket.create_connection(("::1", port_of(server)), timeout=30) as client:
        assert server.address.startswith("[::1]:")
        client.sendall(b"GET /live HTTP/1.0\r\n\r\n")
        assert client.recv(15) == b"HTTP/1.1 200 OK"


def test_closing_frees_the_port_and_hangs_up_at_once(health: Health, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DEADLINE_SECONDS", 3600.0)
    server = HealthServer(FREE, health, Counters().registry)
    client = connect(server)
    assert ask(server, "/live")[0] == 200
    server.close()
    assert hung_up(client)
    client.close()
    with HealthServer(HttpSettings(address=server.address), health, Counters().registry) as again:
        assert ask(again, "/live")[0] == 200
