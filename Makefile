# Each target works alone from a fresh clone: it makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test lint bench chaos fuzz soak clean

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

# Ten minutes of killed workers and brokers: it ends with one line of counts. Needs Java, and Maven or KAFKA_HOME.
chaos: .venv/.dev
	$(BIN)/python -m tests.kafka.chaos --seconds 600 --brokers 3

# A million hostile messages, in some minutes: it ends with one line of counts.
fuzz: .venv/.dev
	$(BIN)/python -m tests.stream.fuzz --messages 1000000

# A day of 200 streams, sped up: it ends with memory and cost per frame, then and now. Needs Linux.
soak: .venv/.dev
	$(BIN)/python -m tests.benchmarks.soak

clean:
	rm -rf .venv build demo bench
