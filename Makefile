# make demo: install and quantize a real model.  make test: install and test.  See BUILD.md.
PYTHON ?= python3
MODEL ?=
TORCH ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-gpu table docs lint dist clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py $(if $(MODEL),--model "$(MODEL)")

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n auto

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto -m slow

test-gpu:
	python3 -m pytest -m gpu

table: $(VENV)/.installed
	$(BIN)/python tests/architectures.py

lint: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/pyright

# A warning is an error. The notice that is switched off is of MkDocs' future, not of these pages.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# From what is committed, so that nothing else can be in it.
dist: $(VENV)/.installed
	rm -rf dist build/committed
	mkdir -p build/committed
	git archive HEAD | tar -x -C build/committed
	$(BIN)/python -m build --outdir dist build/committed
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist

# Without an NVIDIA GPU, a CPU build of torch saves gigabytes. Only Linux on x86-64 has several builds to choose from:
# take the one that is at hand under this name, else let uv find PyTorch's own index.
$(VENV)/.installed: pyproject.toml Makefile
	@echo "Installing into $(VENV), which takes a few minutes the first time."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
ifeq ($(shell uname -sm),Linux x86_64)
	@if nvidia-smi >/dev/null 2>&1; then \
	  $(BIN)/pip install --quiet "torch>=$(TORCH)"; \
	else \
	  $(BIN)/pip install --quiet "torch==$(TORCH)+cpu" 2>/dev/null || \
	  { $(BIN)/pip install --quiet uv && $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend cpu "torch==$(TORCH)"; }; \
	fi
endif
	$(BIN)/pip install --quiet --editable ".[hf,dev,docs,release]"
	@touch $@
