# Each target works alone from a fresh clone: it makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test lint bench chaos clean

setup: .venv/.dev

# The demo needs no torch: what runs a bundle and draws a picture is enough.
.venv/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[cpu,plot]'
	touch $@

.venv/.dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ .venv/.demo

demo: .venv/.demo
	$(BIN)/python deploy/demo.py

test: .venv/.dev
	$(BIN)/python -m pytest -q

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# With ACTIONFORMER=CLONE, a clone of the original, against that as well.
bench: .venv/.dev
	$(BIN)/python -m tests.benchmarks.bench --output bench

# A broker that is away for two minutes under load; then ten minutes of killed workers and brokers, which end with
# one line of counts. Needs Java, and Maven or KAFKA_HOME.
chaos: .venv/.dev
	ONSET_CHAOS_SECONDS=120 $(BIN)/python -m pytest -q --timeout 900 tests/stream/test_kafka_sink.py -k dies_under_load
	$(BIN)/python -m tests.kafka.chaos --seconds 600 --brokers 3

clean:
	rm -rf .venv build demo bench
