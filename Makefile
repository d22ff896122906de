# `make demo` and `make test` set up .venv themselves: nothing else is needed but Python and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test test-slow lint bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       simulate data, integrate it, check the result against the truth"
	@echo "make test       run the tests (make test-slow: the long ones too)"
	@echo "make lint       run the linter and the type checker"
	@echo "make bench      compare with peers (installs them; takes a while)"

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "torch==2.13.0"
	$(PIP) -e .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) -e ".[test]"
	touch $@

$(VENV)/.bench: $(VENV)/.base
	$(PIP) -e ".[bench]"
	touch $@

demo: $(VENV)/.base
	$(BIN)/cellstill demo --out cellstill_demo --overwrite

test: $(VENV)/.test
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(VENV)/.test
	$(BIN)/pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/distill_peers.py
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/vi_peers.py
	$(BIN)/python benchmarks/condense_baselines.py
	$(BIN)/python benchmarks/distill_simulated.py
	$(BIN)/python benchmarks/de_real.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache cellstill_demo
