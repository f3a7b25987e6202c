# make demo          install into $(VENV) and let the built-in model tell a story
# make test          install and run the tests
# make check         linter, type checker and tests
# make test-slow     the tests that take minutes
# make completions   write completions/ anew
# make docs          write the generated parts of docs/ anew
#
# VENV=DIR uses another virtual environment, PYTHON=... another interpreter, and PIP_FLAGS="..." goes to every
# `pip install`. A torch 2.10 or newer that is already installed, in the environment or beside PYTHON, is reused.

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
BIN = $(VENV)/bin
PROMPT ?= Once upon a time

.PHONY: demo test test-slow check completions docs install install-test install-dev clean

demo: install
	@printf '%s' "$(PROMPT)" | $(BIN)/llmctl generate --echo

test: install-test
	$(BIN)/python -m pytest

test-slow: install-test
	$(BIN)/python -m pytest -m slow

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

completions: install
	$(BIN)/python -m llmctl.cli.completions completions

docs: install
	$(BIN)/python docs/generate.py

install: $(VENV)/.llmctl-installed
install-test: $(VENV)/.llmctl-installed-test
install-dev: $(VENV)/.llmctl-installed-dev

SOURCES = pyproject.toml constraints.txt hatch_build.py $(wildcard llmctl/core/native/*.cpp llmctl/core/native/*.h llmctl/core/native/*.inl)

$(VENV)/.llmctl-installed: $(SOURCES) | $(BIN)/python
	$(call pip_install,.)
$(VENV)/.llmctl-installed-test: $(SOURCES) | $(BIN)/python
	$(call pip_install,.[test])
$(VENV)/.llmctl-installed-dev: $(SOURCES) | $(BIN)/python
	$(call pip_install,.[dev])

# The torch that is there already replaces our pin, so that pip neither replaces nor doubles it.
TORCH_VERSION = import importlib.metadata as m; v = m.version("torch"); print(v if tuple(map(int, v.split(".")[:2])) >= (2, 10) else "")

define pip_install
	@torch=$$($(BIN)/python -c '$(TORCH_VERSION)' 2>/dev/null || true); \
	if [ -n "$$torch" ]; then \
	  echo "Using the installed torch $$torch"; \
	  sed "s/^torch==.*/torch==$${torch%%+*}/" constraints.txt > $(VENV)/constraints.txt; \
	else \
	  cp constraints.txt $(VENV)/constraints.txt; \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c $(VENV)/constraints.txt -e '$(1)'
	@touch $@
endef

$(BIN)/python:
	@if $(PYTHON) -c '$(TORCH_VERSION)' 2>/dev/null | grep -q .; then \
	  $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	  $(PYTHON) -m venv $(VENV); \
	fi

clean:
	rm -rf .venv build dist
