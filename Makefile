# Each target works alone. It needs Python (3.11 or newer), make and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# For packaging, and for environments at the ends of what pyproject.toml allows; each of those takes several GB.
TOOLS := build/tools/bin
UV := $(TOOLS)/uv pip install --quiet --python

.PHONY: demo test slow soak gpu browser-test docs proof zoo ecosystem check format wheel installed oldest newest clean

# The environment is up to date if this file is newer than pyproject.toml.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test,demo]'
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/contconv demo

# Two processes with one thread each; with more, they slow each other down.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m slow

# Random walks, damaged folders, kill -9; takes about 20 minutes, writes docs/security.md.
soak: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attacks

# On an NVIDIA card, under eight minutes: the tests that need one, then each pass and whole models against cuDNN.
gpu: $(VENV)/.installed
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('make gpu needs an NVIDIA card that PyTorch can use, and found none.')"
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m benchmarks.speed.gpu
# Open reports in headless Chromium; needs the packages chromium and chromium-driver of the system.
browser-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[browser]'
	$(BIN)/python -m pytest -m browser

# What each method gains on Fashion-MNIST: hours; runs that are recorded are skipped. `apt-get install dataset-fashion-mnist`.
proof: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python -m benchmarks.papers.proof.run
	$(BIN)/python -m benchmarks.papers.proof.run --pictures 5400 --epochs 10 --tuning-epochs 5
	$(BIN)/python -m benchmarks.papers.proof.run --pictures 540 --epochs 60 --tuning-epochs 30
	$(BIN)/python -m benchmarks.papers.proof.summary

# The site, in docs/_build/html; warnings are errors. Four processes, so that notebooks run beside each other.
docs: $(VENV)/.docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -j 4 -b html docs docs/_build/html

# Patch every family of timm with every method; takes about an hour, writes docs/zoo.md.
zoo: $(VENV)/.installed
	$(BIN)/python -m benchmarks.papers.zoo

# Patched models in other libraries, in an environment of its own; writes docs/works_with.md and docs/deploy.md.
ecosystem:
	test -x .ecosystem/bin/python || $(PYTHON) -m venv .ecosystem
	.ecosystem/bin/python -m pip install --quiet --editable '.[test,ecosystem]'
	OMP_NUM_THREADS=1 .ecosystem/bin/python -m benchmarks.ecosystem
	OMP_NUM_THREADS=1 .ecosystem/bin/python -m benchmarks.speed.deploy

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(TOOLS)/.installed:
	$(PYTHON) -m venv build/tools
	$(TOOLS)/python -m pip install --quiet build twine uv
	touch $@

wheel: $(TOOLS)/.installed
	rm -rf dist
	$(TOOLS)/python -m build
	$(TOOLS)/twine check --strict dist/*

# The wheel alone in a new environment, away from the sources: the command, and the README's Python.
installed: wheel
	rm -rf build/installed
	$(PYTHON) -m venv build/installed
	build/installed/bin/python -m pip install --quiet dist/*.whl
	cd build && installed/bin/contconv env && installed/bin/python -I ../tests/installed_readme.py

# All tests, and Inductor on a model of every method, with the lowest versions that pyproject.toml allows, and with the
# newest, pre-releases too.
oldest: $(TOOLS)/.installed
	$(PYTHON) -m venv --clear build/oldest
	$(UV) build/oldest/bin/python --resolution lowest-direct --editable '.[test]'
	OMP_NUM_THREADS=1 build/oldest/bin/python -m pytest --numprocesses 2 --dist worksteal
	OMP_NUM_THREADS=1 build/oldest/bin/python -m pytest -m slow tests/models/test_inductor.py

newest: $(TOOLS)/.installed
	$(PYTHON) -m venv --clear build/newest
	$(UV) build/newest/bin/python --prerelease allow --upgrade --editable '.[test]'
	OMP_NUM_THREADS=1 build/newest/bin/python -m pytest --numprocesses 2 --dist worksteal
	OMP_NUM_THREADS=1 build/newest/bin/python -m pytest -m slow tests/models/test_inductor.py

clean:
	rm -rf $(VENV) dist build demo_output
