"""What is counted, as a log line reads it."""

from __future__ import annotations

from stream.counters import Counters


def test_a_histogram_is_one_number_in_a_summary() -> None:
    counters = Counters()
    counters.end_to_end_seconds.observe(0.25)
    counters.end_to_end_seconds.observe(120.0)
    counters.actions.labels("action.ended", "walking").inc(2)
    counters.lag_messages.labels("samples", "3").set(17)
    assert (
        counters.summary()
        == "end_to_end_seconds_count 2, actions{action.ended,walking} 2, lag_messages{samples,3} 17"
    )


def test_times_differ_between_runs_and_snapshots_do_not() -> None:
    one, other = Counters(), Counters()
    one.step_seconds.observe(0.1)
    other.step_seconds.observe(0.2)
    assert one.snapshot() == other.snapshot()


def test_two_runtimes_in_one_process_do_not_mix() -> None:
    one, other = Counters(), Counters()
    one.rebalances.inc()
    assert (one.summary(), other.summary()) == ("rebalances 1", "nothing")
