# Each target works alone from a fresh clone: it makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
BUILD ?= build
# Of this machine, or, where it has none, of pip.
NVCC ?= $(or $(shell command -v nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
CMAKE ?= $(shell command -v cmake)

.PHONY: setup demo test lint abuse bench chaos fuzz soak plugin test-gpu clean

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

# Two at a time: many tests wait for a broker. One file stays in one process, for what its tests share.
test: .venv/.dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# With ACTIONFORMER=CLONE, a clone of the original, against that as well.
bench: .venv/.dev
	$(BIN)/python -m tests.benchmarks.bench --output bench

# A broker that is away for two minutes under load; then ten minutes of killed and frozen workers, killed brokers, a
# flood and garbage, which end with one line of counts. Needs Java, and Maven or KAFKA_HOME.
chaos: .venv/.dev
	ONSET_CHAOS_SECONDS=120 $(BIN)/python -m pytest -q --timeout 900 tests/stream/test_kafka_sink.py -k dies_under_load
	$(BIN)/python -m tests.kafka.chaos --seconds 600 --brokers 3

.venv/.plugin: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[plugin]'
	touch $@

# BUILD/libonset_nms.so: the NMS kernel, and with TENSORRT_INCLUDE (the folder of NvInfer.h) its TensorRT plugin.
# ARCHITECTURES=90, say, for fewer than all of them. A library that others can write would not be loaded.
plugin: $(if $(and $(NVCC),$(CMAKE)),,.venv/.plugin)
	umask 022 && $(or $(CMAKE),$(BIN)/cmake) -S engine/nms -B $(BUILD)/nms \
	    -DCMAKE_CUDA_COMPILER="$(or $(NVCC),$$(ls $(CURDIR)/.venv/lib/python3*/site-packages/nvidia/cu*/bin/nvcc))" \
	    -DCMAKE_CUDA_ARCHITECTURES="$(ARCHITECTURES)" -DTENSORRT_INCLUDE="$(abspath $(TENSORRT_INCLUDE))" \
	    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$(abspath $(BUILD))"
	umask 022 && $(or $(CMAKE),$(BIN)/cmake) --build $(BUILD)/nms

.venv/.gpu: .venv/.dev
	$(BIN)/python -m pip install --quiet --editable '.[gpu]'
	touch $@

# The kernel, then the session on TensorRT and what a step costs, which goes to tests/benchmarks/results.
# TESTER: a python with pytest, numpy, pydantic and pyyaml, where the machine reaches no registry; for TensorRT,
# with tensorrt, cuda-bindings, onnx and onnxruntime as well. ACTIONFORMER: a clone of the official code, against
# whose NMS the kernel is timed then; that takes torch, and what the benchmark says.
TESTER ?= $(BIN)/python
test-gpu: plugin $(if $(filter $(BIN)/python,$(TESTER)),.venv/.gpu)
	ONSET_NMS_LIBRARY=$(abspath $(BUILD))/libonset_nms.so $(TESTER) -m pytest -q -m gpu --confcutdir=tests/gpu tests/gpu
	$(TESTER) -m tests.benchmarks.tensorrt
	$(if $(ACTIONFORMER),ONSET_NMS_LIBRARY=$(abspath $(BUILD))/libonset_nms.so $(TESTER) -m tests.benchmarks.nms \
	    --actionformer $(ACTIONFORMER) --output tests/benchmarks/results)

# A million hostile messages, in some minutes: it ends with one line of counts.
fuzz: .venv/.dev
	$(BIN)/python -m tests.stream.fuzz --messages 1000000

# Half an hour of producers that leave, floods, silent connections, slow readers, bundles that change, files and disks
# that fail, all at once: it ends with one line of counts. With NAME=leavers, say, only that. Needs Linux.
abuse: .venv/.dev
	$(BIN)/python -m tests.stream.abuse --seconds 1800 --seed 0 $(if $(NAME),--only $(NAME))

# A day of 200 streams, sped up: it ends with memory and cost per frame, then and now. Needs Linux.
soak: .venv/.dev
	$(BIN)/python -m tests.benchmarks.soak

clean:
	rm -rf .venv build demo bench
