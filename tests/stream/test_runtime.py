"""The runtime: a stream's events depend on its own samples, and every fate of a stream has its ending."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import ConfigError, DataError, EngineError, OnnxSession
from stream.config import RuntimeSettings
from stream.events import Event
from stream.offline import detect_recordings, replay
from stream.recording_source import load, messages, paced, stream_ids
from stream.runtime import Runtime
from stream.wire import Message

RATE = 50.0
LOW = {"start_threshold": 0.2, "end_threshold": 0.1, "confident": 0.3, "hold": 0.1}


def wave(seed: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.3 * np.cumsum(rng.normal(size=(n, 3)), axis=0)).astype(np.float32)


@dataclass
class Clock:
    """A clock that a test sets."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Bench:
    """A runtime over the tiny bundle, and what left it."""

    bundle: Path
    settings: RuntimeSettings = field(
        default_factory=lambda: RuntimeSettings(max_streams=4, reorder=0.2, max_gap=0.4)
    )
    decoding: Mapping[str, object] = field(default_factory=lambda: LOW)

    def __post_init__(self) -> None:
        self.events: list[Event] = []
        self.clock = Clock()
        session = OnnxSession(self.bundle, slots=self.settings.max_streams, threads=1)
        self.runtime = Runtime(
            session,
            self.events.extend,
            self.settings,
            decoding=session.manifest.decoding.model_copy(update=self.decoding),
            clock=self.clock,
        )

    def send(self, stream: str, seq: int, samples: np.ndarray, epoch: int = 0, end: bool = False) -> None:
        self.runtime.offer(Message(stream, seq, samples, RATE, epoch, None, end))

    def count(self, name: str) -> float:
        return self.runtime.counters.snapshot().get(name, 0.0)

    def of(self, stream: str) -> list[str]:
        return [event.to_json() for event in self.events if event.stream == stream]

    def reasons(self, stream: str) -> list[str | None]:
        return [e.reason for e in self.events if e.stream == stream and e.type == "stream.ended"]

    def check(self) -> None:
        """The invariants of events: one start, then one end or abort; times in order; brackets around all."""
        open_actions: dict[str, str] = {}
        last: dict[tuple[str, int], float] = {}
        live: set[str] = set()
        began: dict[str, float] = {}
        for event in self.events:
            place = (event.stream, event.epoch)
            assert event.time >= last.get(place, 0.0)
            last[place] = event.time
            if event.type == "stream.started":
                assert event.stream not in live
                live.add(event.stream)
                began[event.stream] = event.time
                continue
            assert event.stream in live
            if event.type == "stream.ended":
                assert event.stream not in open_actions.values()
                live.remove(event.stream)
            elif event.type == "action.started":
                assert event.instance_id is not None
                assert event.instance_id not in open_actions
                open_actions[event.instance_id] = event.stream
                assert event.start is not None
                assert began[event.stream] <= event.start <= event.time
            else:
                assert event.instance_id is not None
                assert open_actions.pop(event.instance_id) == event.stream
                assert event.end is None or event.end <= event.time
        assert not live
        assert not open_actions


def alone(bundle: Path, stream: str, samples: np.ndarray, epoch: int = 0) -> list[str]:
    """The events of one stream that comes whole and in order, by itself."""
    bench = Bench(bundle)
    bench.send(stream, 0, samples, epoch, end=True)
    bench.runtime.drain()
    bench.check()
    return bench.of(stream)


@pytest.fixture(scope="module")
def references(tiny_bundle: Path) -> dict[str, tuple[np.ndarray, list[str]]]:
    waves = {name: wave(seed, 900 + 37 * seed) for seed, name in enumerate("abc")}
    return {name: (samples, alone(tiny_bundle, name, samples)) for name, samples in waves.items()}


def test_the_random_model_says_something(references: dict[str, tuple[np.ndarray, list[str]]]) -> None:
    """Else the comparisons below would compare nothing."""
    for _, events in references.values():
        assert len(events) > 6


@settings(deadline=None, max_examples=15)
@given(rng=st.integers(0, 2**32).map(random.Random))
def test_companions_arrivals_and_batches_change_no_event(
    tiny_bundle: Path, references: dict[str, tuple[np.ndarray, list[str]]], rng: random.Random
) -> None:
    bench = Bench(
        tiny_bundle,
        RuntimeSettings(max_streams=4, max_batch=rng.randint(1, 4), reorder=0.2, max_gap=0.4),
    )
    at = dict.fromkeys(references, 0)
    while at:
        name = rng.choice(sorted(at))
        samples = references[name][0]
        n = rng.randint(1, rng.choice([30, 400]))
        stop = min(len(samples), at[name] + n)
        bench.send(name, at[name], samples[at[name] : stop], end=stop == len(samples))
        at[name] = stop
        if stop == len(samples):
            del at[name]
        for _ in range(rng.randint(0, 3)):
            bench.runtime.run_ready()
    bench.runtime.drain()
    bench.check()
    for name, (_, events) in references.items():
        assert bench.of(name) == events
    assert bench.runtime.streams == []


def test_a_long_gap_ends_the_epoch_and_begins_another(tiny_bundle: Path) -> None:
    samples = wave(1, 800)
    bench = Bench(tiny_bundle)
    bench.send("a", 0, samples[:301])
    bench.send("a", 401, samples[401:], end=True)
    bench.runtime.drain()
    bench.check()
    assert bench.reasons("a") == ["gap of 2 s", "end of stream"]
    starts = [event.time for event in bench.events if event.type == "stream.started"]
    assert starts == [0.0, 401 / RATE]
    assert bench.count("gaps_too_long") == 1
    assert bench.count("epochs") == 2
    # The second life is that of a fresh stream which begins there.
    fresh = Bench(tiny_bundle)
    fresh.send("a", 401, samples[401:], end=True)
    fresh.runtime.stop()
    assert bench.of("a")[-len(fresh.events) :] == fresh.of("a")


def test_no_event_lies_in_the_padding_behind_the_last_sample(tiny_bundle: Path) -> None:
    everything = dict.fromkeys(["start_threshold", "end_threshold", "confident", "hold", "gate"], 0.0)
    for n in (404, 405, 407, 408, 409):  # frames of 4, chunks of 8
        bench = Bench(tiny_bundle, decoding=everything)
        bench.send("a", 0, wave(0, n), end=True)
        bench.runtime.drain()
        bench.check()
        # Something was going on until the last whole frame, so that padding would have been seen.
        ended = [event for event in bench.events if event.type == "action.ended"]
        assert len(ended) > 5
        assert max(event.end or 0.0 for event in ended) == pytest.approx(n // 4 * 4 / RATE)
        assert bench.events[-1].time == n // 4 * 4 / RATE


def test_a_gap_that_is_filled_is_masked_and_counted(tiny_bundle: Path) -> None:
    samples = wave(1, 400)
    bench = Bench(tiny_bundle)
    bench.send("a", 0, samples[:385])
    bench.send("a", 395, samples[395:], end=True)
    bench.runtime.drain()
    assert bench.reasons("a") == []  # the end waits: what is missing may still come
    bench.clock.now = 0.3
    bench.runtime.tick()
    bench.runtime.drain()
    bench.check()
    assert bench.reasons("a") == ["end of stream"]
    assert bench.count("gaps_filled") == 1
    assert bench.count("masked_frames") == 3  # samples 385..394 touch the frames 96, 97, 98


def test_repeats_and_reordering_change_nothing(
    tiny_bundle: Path, references: dict[str, tuple[np.ndarray, list[str]]]
) -> None:
    samples, events = references["b"]
    bench = Bench(tiny_bundle)
    for start in range(0, len(samples), 10):  # in pairs, the second first; each third message twice
        at = start + 5
        for begin in (at, start, at) if start % 3 == 0 else (at, start):
            part = samples[begin : begin + 5]
            if len(part):
                bench.send("b", begin, part)
        bench.runtime.run_ready()
    bench.runtime.end("b")
    bench.runtime.drain()
    assert bench.of("b") == events
    assert bench.count("reordered_messages") > 50
    assert bench.count("repeated_samples") > 100
    assert bench.count("late_samples") == 0


def test_late_samples_are_counted_and_dropped(tiny_bundle: Path) -> None:
    samples = wave(1, 400)
    bench = Bench(tiny_bundle)
    bench.send("a", 0, samples[:100])
    bench.send("a", 110, samples[110:200])
    bench.send("a", 100, samples[100:110])
    assert bench.count("late_samples") == 10


def test_a_higher_epoch_restarts_and_a_lower_one_is_late(tiny_bundle: Path) -> None:
    first, second = wave(1, 403), wave(2, 300)
    bench = Bench(tiny_bundle)
    bench.send("a", 0, first, epoch=5)
    bench.send("a", 0, second, epoch=6)
    bench.send("a", 403, first, epoch=5)
    bench.send("a", 300, second[:0], epoch=6, end=True)
    bench.runtime.drain()
    bench.check()
    assert bench.reasons("a") == ["restarted by its producer", "end of stream"]
    assert bench.count("late_samples") == 403
    newer = [line for line in bench.of("a") if '"epoch":6' in line]
    assert newer == alone(tiny_bundle, "a", second, epoch=6)


def test_what_comes_after_the_end_does_not_open_the_stream_again(tiny_bundle: Path) -> None:
    samples = wave(1, 200)
    bench = Bench(tiny_bundle)
    bench.send("a", 0, samples, end=True)
    bench.runtime.drain()
    bench.send("a", 100, samples[100:])  # a repeat
    bench.send("a", 0, samples)  # a producer that starts again without a new epoch
    bench.send("a", 200, samples[:0], end=True)
    assert bench.runtime.streams == []
    assert bench.count("late_samples") == 300
    bench.send("a", 0, samples, epoch=1)
    assert bench.runtime.streams == ["a"]


def test_a_stream_that_stops_in_the_middle_is_lost_and_frees_its_slot(
    tiny_bundle: Path, references: dict[str, tuple[np.ndarray, list[str]]]
) -> None:
    samples, events = references["c"]
    bench = Bench(tiny_bundle)
    bench.send("a", 0, wave(1, 333))
    bench.send("c", 0, samples[:500])
    bench.runtime.drain()
    bench.clock.now = 20.0
    bench.send("c", 500, samples[500:600])
    bench.runtime.drain()
    bench.clock.now = 31.0
    bench.runtime.tick()
    assert bench.runtime.streams == ["c"]
    assert bench.reasons("a") == ["idle"]
    aborted = [event for event in bench.events if event.type == "action.aborted"]
    assert aborted
    assert all(event.reason == "idle" and event.stream == "a" for event in aborted)
    assert bench.count("streams_evicted") == 1
    assert bench.count("open_streams") == 1
    bench.send("c", 600, samples[600:], end=True)
    bench.runtime.drain()
    bench.check()
    assert bench.of("c") == events


def test_idle_streams_resume_as_a_new_segment(tiny_bundle: Path) -> None:
    samples = wave(1, 600)
    bench = Bench(tiny_bundle)
    bench.send("a", 0, samples[:300])
    bench.runtime.drain()
    bench.clock.now = 31.0
    bench.runtime.tick()
    bench.send("a", 290, samples[290:], end=True)
    bench.runtime.stop()
    bench.check()
    assert bench.reasons("a") == ["idle", "end of stream"]
    assert bench.count("late_samples") == 10
    starts = [event.time for event in bench.events if event.type == "stream.started"]
    assert starts == [0.0, 300 / RATE]


def test_the_stream_too_many_is_refused_until_another_ends(tiny_bundle: Path) -> None:
    bench = Bench(tiny_bundle)
    for number in range(6):
        for seq in (0, 50):
            bench.send(f"s{number}", seq, wave(number, 50))
    assert bench.runtime.streams == ["s0", "s1", "s2", "s3"]
    assert bench.count("streams_refused") == 2
    assert bench.count("refused{max_streams}") == 4
    bench.send("s0", 100, wave(0, 0), end=True)
    bench.runtime.drain()
    bench.send("s4", 0, wave(4, 50))
    assert "s4" in bench.runtime.streams


def test_slots_are_clean_for_whoever_comes_next(
    tiny_bundle: Path, references: dict[str, tuple[np.ndarray, list[str]]]
) -> None:
    bench = Bench(tiny_bundle, RuntimeSettings(max_streams=1, reorder=0.2, max_gap=0.4))
    for name, (samples, events) in references.items():
        bench.send(name, 0, samples, end=True)
        bench.runtime.drain()
        assert bench.of(name) == events


def test_values_that_overflow_the_network_harm_only_their_own_stream(
    tiny_bundle: Path, references: dict[str, tuple[np.ndarray, list[str]]]
) -> None:
    samples, events = references["a"]
    huge = wave(5, 600)
    huge[200:202] = 3e38
    bench = Bench(tiny_bundle)
    for start in range(0, len(samples), 100):
        bench.send("a", start, samples[start : start + 100], end=start + 100 >= len(samples))
        if start < 600:
            bench.send("huge", start, huge[start : start + 100], end=start == 500)
        bench.runtime.run_ready()
    bench.runtime.drain()
    bench.check()
    assert bench.of("a") == events
    assert bench.count("nonfinite_outputs") >= 1
    reasons = bench.reasons("huge")
    assert reasons == ["outputs are not finite"] * (len(reasons) - 1) + ["end of stream"]
    assert 2 <= len(reasons) < 10  # it recovers:
    last = max(i for i, e in enumerate(bench.events) if (e.type, e.stream) == ("stream.started", "huge"))
    begin = round(bench.events[last].time * RATE)
    fresh = Bench(tiny_bundle)
    fresh.send("huge", begin, huge[begin:], end=True)
    fresh.runtime.stop()
    assert len(fresh.events) > 2
    assert bench.of("huge")[-len(fresh.events) :] == fresh.of("huge")


def test_stopping_processes_what_came_and_ends_what_is_open(tiny_bundle: Path) -> None:
    samples = wave(1, 413)
    bench = Bench(tiny_bundle)
    bench.send("a", 0, samples)
    bench.runtime.stop()
    bench.check()
    assert bench.reasons("a") == ["service stopped"]
    assert [line.replace("service stopped", "end of stream") for line in bench.of("a")] == alone(
        tiny_bundle, "a", samples
    )


def test_a_producer_far_ahead_of_the_engine_loses_nothing(tiny_bundle: Path) -> None:
    samples = wave(1, 5000)
    bench = Bench(tiny_bundle)
    for start in range(0, 5000, 1000):  # never a run_ready in between: offer has to step
        bench.send("a", start, samples[start : start + 1000])
    bench.runtime.stop()
    assert bench.count("frames") == 1250
    assert bench.count("masked_frames") == 0


def test_short_gaps_end_no_action_of_a_real_recording(tmp_path: Path) -> None:
    """A second is lost every half minute; what was going on goes on."""
    demo = Path(__file__).resolve().parents[2] / "deploy" / "demo"
    samples = np.load(demo / "recordings" / "hapt_u02_e03.npy").astype(np.float32)
    gaps = np.arange(20.0, len(samples) / RATE - 5, 30.0)
    ends = []
    for lost in (False, True):
        for gap in gaps if lost else ():
            samples[round(gap * RATE) : round((gap + 1) * RATE)] = np.nan
        np.save(tmp_path / "r.npy", samples)
        detect_recordings(demo / "bundle", [tmp_path / "r.npy"], tmp_path / "events.jsonl", threads=1)
        events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
        ends.append(np.array([event["end"] for event in events if event["type"] == "action.ended"]))
    near = [int((np.abs(found[:, None] - gaps - 0.5) < 1.1).any(axis=0).sum()) for found in ends]
    assert len(gaps) == 12
    assert near[1] <= near[0], "a gap is where an action ended"
    assert abs(len(ends[1]) - len(ends[0])) <= 1


def test_a_decoding_for_other_classes_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="has 2 durations, expected one for each of 3 classes"):
        Bench(tiny_bundle, decoding={"usual": (1.0, 2.0)})


def test_a_session_with_too_few_slots_is_refused(tiny_bundle: Path) -> None:
    session = OnnxSession(tiny_bundle, slots=2, threads=1)
    with pytest.raises(EngineError, match="2 slots for up to 3 streams"):
        Runtime(session, lambda events: None, RuntimeSettings(max_streams=3))


def test_captured_is_the_producers_clock(tiny_bundle: Path) -> None:
    samples = wave(1, 400)
    bench = Bench(tiny_bundle)
    for start in range(0, 400, 7):
        bench.runtime.offer(Message("a", start, samples[start : start + 7], RATE, time=1e9 + start / RATE))
    bench.runtime.stop()
    for event in bench.events:
        assert event.captured == pytest.approx(1e9 + event.time, abs=1e-5)


def recordings(folder: Path) -> list[Path]:
    paths = []
    for seed in range(5):
        samples = wave(seed, 400 + 61 * seed)
        if seed == 1:
            samples[:5], samples[200:204], samples[250:370] = np.nan, np.inf, np.nan
        if seed == 2:
            samples[-20:] = np.nan
        paths.append(folder / f"r{seed}.npy")
        np.save(paths[-1], samples)
    return paths


def test_detect_writes_the_same_bytes_for_every_arrival(tiny_bundle: Path, tmp_path: Path) -> None:
    paths = recordings(tmp_path)
    outputs = []
    for arrival in (1, 7, 64, 0):
        output = tmp_path / f"{arrival}.jsonl"
        detect_recordings(tiny_bundle, paths, output, arrival=arrival, min_score=0.2, threads=1)
        outputs.append(output.read_bytes())
    assert len(set(outputs)) == 1
    assert outputs[0].count(b"action.ended") > 5
    assert b"gap of 2.4 s" in outputs[0]
    assert not list(tmp_path.glob("*.partial"))


def test_replay_takes_recordings_up_lazily_and_in_order(tiny_bundle: Path) -> None:
    bench = Bench(tiny_bundle)
    begun: list[str] = []

    def sources() -> Iterator[tuple[str, Iterator[Message]]]:
        for number in range(6):
            begun.append(f"r{number}")
            assert len(bench.runtime.streams) < 2
            yield f"r{number}", messages(f"r{number}", wave(number, 300), RATE, 10)

    replay(bench.runtime, sources(), at_once=2)
    bench.check()
    assert begun == [f"r{number}" for number in range(6)]
    assert bench.count("frames") == 6 * 76
    for number in range(6):
        assert bench.of(f"r{number}") == alone(tiny_bundle, f"r{number}", wave(number, 300))


def test_pacing_waits_until_a_message_could_have_been_measured() -> None:
    clock = Clock(100.0)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.now += seconds

    parts: Sequence[Message] = list(paced(messages("a", wave(0, 100), RATE, 25), 2.0, clock, sleep))
    assert [message.seq for message in parts] == [0, 25, 50, 75]
    assert slept == pytest.approx([0.25] * 4)
    assert clock.now == pytest.approx(101.0)


def test_recordings_that_cannot_be_streams_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.csv would both be stream 'a'"):
        stream_ids([tmp_path / "a.npy", tmp_path / "a.csv"])
    np.save(tmp_path / "a.npy", np.full((9, 3), np.nan))
    with pytest.raises(DataError, match="no sample without NaN"):
        load(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.zeros((9, 2)))
    with pytest.raises(DataError, match="2 channels, the bundle expects 3"):
        load(tmp_path / "b.npy", 3)
