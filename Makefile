VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := $(shell grep '^torch==' requirements-dev.txt)

# Tests run JOBS at a time, each on one thread.
JOBS ?= 2
# Tests of the host path on a stub of a driver, each a process of its own: `make test-host`.
HOST := $(wildcard tests/impl/*/test_host.py)
# Of tests with many cases, most of them in the virtual machine, one in MANY, of slow tests a sixth,
# others each time; MANY=1 runs all.
MANY ?= 40
# Also run in Triton's interpreter, which a process has for all kernels or for none.
INTERPRETED := tests/ops/test_parity.py $(addprefix tests/impl/triton/test_,parity.py mutations.py split_k.py)

export HF_HUB_OFFLINE := 1
# Else each process compiles torch, peft and transformers anew: 21 s of imports instead of 7.
unexport PYTHONDONTWRITEBYTECODE
# What can be compiled here is, or `make` stops: tests of a part that is absent would only skip. Of
# the CUDA part one architecture, and its PTX for the virtual machine.
export LORA_KERNELS_CPU ?= 1
export LORA_KERNELS_CUDA ?= $(if $(shell command -v nvcc),1,0)
export TORCH_CUDA_ARCH_LIST ?= 8.0+PTX
# Warnings are errors here, not where users install.
export LORA_KERNELS_WERROR ?= 1
NEEDS := $(if $(filter 1,$(LORA_KERNELS_CPU)),cpu) $(if $(filter 1,$(LORA_KERNELS_CUDA)),cuda)

# The oldest PEFT that patch_peft takes, laid over the newest one for the tests that concern it.
OLD_PEFT := $(shell sed -n 's/^peft==//p' requirements-old-peft.txt)
OLD_PEFT_AT := $(CURDIR)/build/peft-$(OLD_PEFT)-installed

# The oldest Triton that is served, beside the pinned one.
OLDEST_TRITON := build/triton-3.6

.PHONY: test test-host test-old-peft lint format docs demo bench bench-compare bench-track peft-suite census sanitize clean

test: export LORA_KERNELS_TEST_NEEDS := $(NEEDS) $(LORA_KERNELS_TEST_NEEDS)
test: $(READY)
	$(BIN)/python -m pytest $(ARGS) --one-in $(MANY) -n $(JOBS) --dist worksteal $(addprefix --ignore=,$(HOST))
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(ARGS) --one-in $(MANY) -n $(JOBS) $(INTERPRETED)

test-host: $(READY) $(OLDEST_TRITON)
	$(BIN)/python -m pytest $(ARGS) --one-in $(MANY) -n $(JOBS) --dist worksteal $(HOST)

test-old-peft: $(READY)
	$(PIP) --no-deps --upgrade --target $(OLD_PEFT_AT) -r requirements-old-peft.txt
	PYTHONPATH="$(OLD_PEFT_AT):$$PYTHONPATH" $(BIN)/python -c \
		'import peft; assert peft.__version__ == "$(OLD_PEFT)", peft.__version__'
	PYTHONPATH="$(OLD_PEFT_AT):$$PYTHONPATH" $(BIN)/python -m pytest $(ARGS) -n $(JOBS) \
		tests/peft/test_peft.py tests/peft/test_adapter_files.py tests/peft/test_adapter_layout.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The site, in build/docs; a warning is an error.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --doctree-dir build/doctrees docs build/docs

demo: $(READY)
	$(BIN)/python examples/finetune_minilm.py $(ARGS)

bench: $(READY)
	$(BIN)/python -m bench $(ARGS)

# Another revision's times and the working tree's, call by call in turn.
bench-compare: $(READY)
	$(BIN)/python -m bench.compare.revisions $(REV) $(ARGS)

bench-track: $(READY)
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-autosave $(ARGS)

# PEFT's own LoRA tests on patched models; pip fetches them with its source distribution.
PEFT := $(shell sed -n 's/^peft==//p' requirements-dev.txt)
peft-suite: $(READY)
	$(BIN)/python -m pip download --quiet --no-deps --no-build-isolation --no-binary peft \
		--dest build peft==$(PEFT)
	tar -xf build/peft-$(PEFT).tar.gz -C build
	$(BIN)/python tests/peft_suite/run.py $(ARGS) build/peft-$(PEFT)

# Which models and recipes are fused: docs/models.md is written anew.
census: $(READY)
	$(BIN)/python -W ignore -m tests.census $(ARGS)

# The compiled part under AddressSanitizer and UndefinedBehaviorSanitizer, by its Python tests; its
# kernels under ThreadSanitizer by a program of their own, since in a process with torch, which isn't
# instrumented, every hand-over between its threads would look like a race.
# Of the cases a sixth; SHARE=1/1 runs all.
SHARE ?= 2/6
SANITIZED := build/sanitized/lora_kernels/_cpu.abi3.so
SANITIZED_TESTS := $(addprefix tests/impl/cpu/test_,cpu.py dora.py quantised.py) \
	$(addprefix tests/ops/test_,parity.py embedding.py)
LIBRARIES := libasan.so libubsan.so libstdc++.so
UNDER_SANITIZERS := LD_PRELOAD="$(foreach name,$(LIBRARIES),$(shell $(CXX) -print-file-name=$(name)))" \
	ASAN_OPTIONS=detect_leaks=0 LORA_KERNELS_TEST_LIBRARY=$(SANITIZED) $(BIN)/python -m pytest
sanitize: $(READY)
	LORA_KERNELS_CPU=1 LORA_KERNELS_CUDA=0 LORA_KERNELS_SANITIZE=address,undefined $(BIN)/python setup.py -q \
		build_ext --build-lib build/sanitized --build-temp build/sanitized-objects > /dev/null
	$(UNDER_SANITIZERS) -n $(JOBS) --dist worksteal $(SANITIZED_TESTS) -k "cpu and not lesser" --share $(SHARE)
	LORA_KERNELS_FUZZ=100 $(UNDER_SANITIZERS) -n $(JOBS) $(addprefix tests/stacks/test_fuzz_,live.py experts.py mixed.py)
	$(CXX) -std=c++20 -O1 -g -fsanitize=thread -Icsrc/cpu tests/native/threads.cpp \
		csrc/cpu/select.cpp $(wildcard csrc/cpu/isa/*.cpp) -o build/threads
	for isa in amx avx512_bf16 avx512 avx2; do \
		LORA_KERNELS_TEST_ISA=$$isa build/threads || [ $$? -eq 77 ] || exit 1; done
	LORA_KERNELS_TEST_ISA=portable build/threads

# torch comes first and pinned: beside it nothing pulls another, larger build. Python compiles what is
# imported; pip would compile all, in most of an install's time.
PIP := $(BIN)/python -m pip install --quiet --no-compile
$(READY): requirements-dev.txt requirements-data.txt pyproject.toml setup.py $(shell find csrc -type f ! -name '*.pyc')
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps -r requirements-data.txt
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.docs: $(READY) requirements-docs.txt
	$(PIP) -r requirements-docs.txt
	touch $@

$(OLDEST_TRITON): $(READY)
	$(PIP) --no-deps --upgrade --target $@ triton==3.6.0
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
