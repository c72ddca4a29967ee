# `make nanogpt` and `make test` are all a fresh machine needs: Python 3.11+, git, make.
#
#   VENV=path        where to install (default .venv; an existing environment, such as
#                    VENV=$VIRTUAL_ENV, is used as it is, its own jax included)
#   PYTHON=python    the interpreter that makes the environment
#   ACCELERATOR=cuda or tpu: installs jax's own extra of that name
#   ARGS="..."       more flags for `make nanogpt`, see `make nanogpt ARGS=--help`

PYTHON ?= python3
VENV ?= .venv
ACCELERATOR ?=
ARGS ?=
LOCKFILE ?= constraints.txt
comma := ,
EXTRA = $(if $(ACCELERATOR),$(comma)$(ACCELERATOR))
BIN = $(VENV)/bin
# The locked versions go into environments made here. Where jax came from elsewhere
# (a CUDA image, say) the lock would replace it, so there only the bounds hold.
LOCK = $$(test -e $(VENV)/.locked && echo "--constraint $(LOCKFILE)")
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

# OpenBLAS, which jaxlib takes LAPACK from on CPU, would otherwise run threads of its own
# beside XLA's, which slows both: see benchmarks/README.md.
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: nanogpt rl search docs tour widgets browser test test-lowest test-newest lint format release-check clean

nanogpt: $(VENV)/.examples$(ACCELERATOR)
	$(BIN)/python -m examples.nanogpt.train --config tiny $(ARGS)

# Reinforcement learning with Adam and Hopper, in a few minutes: see examples/rl.
rl: $(VENV)/.examples$(ACCELERATOR)
	$(BIN)/python -m examples.rl.compare $(ARGS)

# Ten minutes, and what to try next: see benchmarks/convergence/search.py.
search: $(VENV)/.bench$(ACCELERATOR)
	$(BIN)/python -m benchmarks.convergence.search $(ARGS)

# The documentation, in build/docs/index.html. Warnings are errors.
docs: $(VENV)/.docs$(ACCELERATOR)
	$(BIN)/sphinx-build --fresh-env --fail-on-warning --nitpicky --quiet docs build/docs
	@echo "open build/docs/index.html"

# The tour of optimizers, in the browser.
tour: docs
	$(BIN)/python -m webbrowser -t file://$(CURDIR)/build/docs/tour/index.html

# Computes the numbers of the tour's pictures again, and draws the README's.
widgets: $(VENV)/.docs$(ACCELERATOR)
	cd docs/tour && $(abspath $(BIN)/python) -m widgets $(ARGS)
	$(BIN)/python docs/_ext/tour.py

# Needs chromium, chromedriver and npm (Debian: chromium-driver npm).
browser: $(VENV)/.browser$(ACCELERATOR) docs build/package/axe.min.js
	$(BIN)/python -m pytest -m browser tests/test_browser.py

build/package/axe.min.js:
	mkdir -p build
	cd build && npm pack --silent axe-core@4.14.1 | xargs tar xzmf

test: $(VENV)/.tests$(ACCELERATOR)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/.dev$(ACCELERATOR)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev$(ACCELERATOR)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Builds what a release uploads, and runs the README with nothing else installed.
release-check: $(VENV)/.dev$(ACCELERATOR)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	.ci/check_release $(VENV)

# The oldest versions that pyproject.toml admits, and the newest that exist.
test-lowest:
	$(MAKE) test VENV=.venv-lowest LOCKFILE=constraints-lowest.txt ISOLATED=1

test-newest:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest LOCKFILE=/dev/null ISOLATED=1

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}. Name another: make PYTHON=python3.12 ...")'
	@if [ -z "$(ISOLATED)" ] && $(PYTHON) -c 'import sys, jax; sys.exit(sys.prefix != sys.base_prefix)' 2>/dev/null; then \
	  echo "Using the jax that $(PYTHON) already has."; \
	  $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	  $(PYTHON) -m venv $(VENV) && touch $(VENV)/.locked; \
	fi

# One stamp a set of extras; a newer pyproject.toml or lock installs again.
$(VENV)/.%: pyproject.toml $(LOCKFILE) | $(BIN)/python
	$(PIP) $(LOCK) --editable '.[$(subst $(ACCELERATOR),,$*)$(EXTRA)]'
	@touch $@

clean:
	rm -rf .venv .venv-lowest .venv-newest dist build runs
