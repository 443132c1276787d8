# The two commands: `make demo` and `make test`. Both set up everything that they need in .venv,
# and touch nothing outside this folder but Debian packages that are missing, when run as root.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip
RUN := $(VENV)/bin/python

PACKAGE_SOURCES := $(shell find src -name '*.py' -o -name '*.[ch]' -o -name 'meson.build') \
	meson.build meson.options pyproject.toml

.PHONY: all demo test lint soak bench docs clean

all: test

# What the build itself needs that pip cannot install. Debian packages are installed when we are
# root; otherwise it is said plainly what to install.
.system: scripts/system-packages
	PYTHON="$(PYTHON)" sh scripts/system-packages
	touch $@

$(VENV)/bin/python: .system
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip

# Installed, and not just put on the path: what is tested is what users get, with its helper.
$(VENV)/.installed: $(VENV)/bin/python $(PACKAGE_SOURCES)
	$(PIP) install --quiet '.[test,lint]'
	touch $@

$(VENV)/.prctl: $(VENV)/.installed
	$(PIP) install --quiet python-prctl
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) install --quiet '.[docs]'
	touch $@

demo: $(VENV)/.installed
	$(RUN) demo/heartbeat_409.py

test: $(VENV)/.prctl lint
	$(RUN) -m pytest

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

# For hours rather than minutes: `make soak TREES=100000 CONTAINMENT=group`.
TREES := 10000
THREADS := 8
CONTAINMENT := warden

soak: $(VENV)/.installed
	$(RUN) -m integration.soak --trees $(TREES) --threads $(THREADS) --containment $(CONTAINMENT)

bench: $(VENV)/.installed
	$(PIP) install --quiet -r benchmarks/requirements.txt
	$(RUN) -m benchmarks

docs: $(VENV)/.docs
	$(VENV)/bin/sphinx-build -W -b html docs build/docs

clean:
	rm -rf $(VENV) .system build
