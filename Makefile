# The two commands: `make demo` and `make test`. Both set up everything that they need in .venv,
# and touch nothing outside this folder but Debian packages that are missing, when run as root.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip
RUN := $(VENV)/bin/python

PACKAGE_SOURCES := $(shell find src -name '*.py' -o -name '*.[ch]' -o -name 'meson.build') \
	meson.build meson.options pyproject.toml

.PHONY: all demo test lint soak bench record docs fuzz sanitize clean

all: test

# What the build itself needs that pip cannot install. Debian packages are installed when we are
# root; otherwise it is said plainly what to install.
.system: scripts/system-packages
	PYTHON="$(PYTHON)" sh scripts/system-packages
	touch $@

# What looks for mistakes in the C code. Nothing that users get needs it.
.tools: scripts/system-packages
	sh scripts/system-packages tools
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

# Most tests wait for events most of the time: more workers than processors have something to do.
WORKERS := 3
PYTEST := $(RUN) -m pytest -n $(WORKERS) --dist worksteal

test: $(VENV)/.prctl .tools lint
	$(PYTEST)

# Two at a time, and each in one piece; all of them, whatever one of them finds.
CHECKS := lint-mypy lint-pyright lint-c lint-ruff lint-imports

lint: $(VENV)/.installed .tools
	$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=target $(CHECKS)

.PHONY: $(CHECKS)
$(CHECKS): $(VENV)/.installed .tools

lint-ruff:
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

lint-mypy:
	$(VENV)/bin/mypy

lint-pyright:
	$(VENV)/bin/pyright

lint-imports:
	$(VENV)/bin/lint-imports

lint-c:
	scripts/analyze

# 10,000 trees and random faults, for minutes; for hours: `make soak TREES=1000000`.
TREES := 10000
THREADS := 8
CONTAINMENT := warden

soak: $(VENV)/.installed
	$(RUN) -m integration.soak --trees $(TREES) --threads $(THREADS) --containment $(CONTAINMENT)

bench: $(VENV)/.installed
	$(PIP) install --quiet -r benchmarks/requirements.txt
	$(RUN) -m benchmarks

# What becomes of 200,000 requests of every kind, beside Airflow's channel.
record: $(VENV)/.installed
	$(RUN) -m benchmarks.record

# The parsers of the warden for a minute each, and what has been learnt is kept for the next time.
fuzz: $(VENV)/.installed .tools
	$(RUN) tests/fuzzing.py --seconds 60

# Every integration test with the sanitized warden; a report of it fails the test.
sanitize: $(VENV)/.prctl
	$(PYTEST) integration --warden=sanitized

docs: $(VENV)/.docs
	$(VENV)/bin/sphinx-build -W -b html docs build/docs

clean:
	rm -rf $(VENV) .system .tools build
