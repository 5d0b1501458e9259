# Everything runs in .venv, which is made on the first use and again when the pins change.

PYTHON ?= python3

# Where torch without CUDA comes from on Linux, so that a machine without a GPU does not load gigabytes
# for one. Used if it answers. For torch with CUDA, or an index of your own:
#     make env TORCH_INDEX=
#     make env TORCH_INDEX=https://my.mirror/whl/cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
BROWSER := $(VENV)/browser
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help env demo test lint check wheel clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

env: $(INSTALLED)  ## make .venv with everything in it

demo: $(INSTALLED)  ## synthesize the missing FLAIR of a simulated case and draw the comparison
	@$(BIN)/python examples/demo.py

test: $(INSTALLED) $(BROWSER)  ## run all tests
	@$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(INSTALLED)  ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

check: lint test  ## what has to pass before a change goes in

wheel: $(INSTALLED)  ## build sdist and wheel, and test what users get
	$(BIN)/python -m pytest tests/test_packaging.py
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

clean:  ## remove .venv and everything that was built
	rm -rf $(VENV) build dist demo *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find cwdm cli configs tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# pip, setuptools and torch first: from then on nothing is left for an index to choose, and the build
# needs no environment of its own.
$(INSTALLED): pyproject.toml constraints.txt
	@python=; \
	for candidate in $(PYTHON) python3.11 python3.12 python3.13; do \
	    if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	        2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "cwdm needs Python 3.11, 3.12 or 3.13 with venv; tried $(PYTHON) and python3.11 to python3.13." >&2; \
	    echo "Name yours: make env PYTHON=/path/to/python3.11" >&2; \
	    exit 1; \
	fi; \
	echo "Making $(VENV) with $$python and installing (a few minutes, about 2 GB on disk) ..."; \
	"$$python" -m venv --clear $(VENV)
	@index=; \
	if [ -n "$(TORCH_INDEX)" ] && [ "$$(uname -s)" = Linux ]; then \
	    if $(BIN)/python -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=10)' \
	        "$(TORCH_INDEX)/torch/" 2>/dev/null; then index="--extra-index-url $(TORCH_INDEX)"; \
	    else echo "$(TORCH_INDEX) does not answer: torch comes from where pip looks by itself" \
	        "(from PyPI that means CUDA and gigabytes)."; fi; \
	fi; \
	$(PIP) install --quiet --constraint constraints.txt --upgrade pip setuptools && \
	$(PIP) install --quiet --constraint constraints.txt $$index torch
	@$(PIP) install --quiet --constraint constraints.txt --no-build-isolation \
	    --editable '.[simulate,evaluate,train,dev]'
	@touch $@

# Reports are tested in a browser: one on PATH, or the one that npm has, unpacked into .venv.
$(BROWSER): tools/chromium.sh $(INSTALLED)
	@if { command -v chromium || command -v google-chrome || sh tools/chromium.sh $(VENV); } \
	    >$(VENV)/browser.log 2>&1; then touch $@; \
	else echo "Found no Chromium (see $(VENV)/browser.log): reports are not tested in a browser."; fi
