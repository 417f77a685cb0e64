# Needs python3 >= 3.11 and a package index, nothing else: each target makes the environment that it runs in.
PYTHON ?= python3
INSTALL = -m pip install -qq --disable-pip-version-check

.PHONY: demo test test-nightly test-zoo lint bench clean
.DELETE_ON_ERROR:

demo: .venv/.demo
	.venv/bin/datafree demo

test: lint
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2

# All random networks, not only the first few: some ten minutes on one core.
test-nightly: .venv/.dev
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 -m "nightly or not nightly" tests/test_random_networks.py

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# The newest torch, torchvision and timm, without the pins of constraints.txt.
test-zoo: .venv-zoo/.zoo
	OMP_NUM_THREADS=1 .venv-zoo/bin/python -m pytest -q -n 2 tests_zoo

# Hours on two cores where no results are there yet; each one that is there is kept. Needs ../shared/data or $$DATAFREE_DATA.
bench: .venv/.dev
	OMP_NUM_THREADS=1 .venv/bin/python benchmarks/bench.py benchmarks/grids/*.json
	OMP_NUM_THREADS=1 .venv/bin/python benchmarks/estimate.py --collect digits digits-vit resnet20 resnet56 mobilenetv1_025
	.venv/bin/python benchmarks/speed.py
	OMP_NUM_THREADS=1 .venv/bin/python benchmarks/export.py
	.venv/bin/python benchmarks/table.py

clean:
	rm -rf .venv .venv-zoo

# The empty file .made marks a fresh environment: both are made anew when what they are made from changes.
.venv/.made: pyproject.toml constraints.txt
.venv-zoo/.made: pyproject.toml
.venv/.made .venv-zoo/.made:
	@$(PYTHON) -c 'import sys; sys.exit("datafree needs Python 3.11 or newer: make PYTHON=/path/to/python3" if sys.version_info < (3, 11) else 0)'
	@echo "making $(@D) (the first time it fetches torch, which takes a while)"
	@$(PYTHON) -m venv --clear $(@D)
	@touch $@

.venv/.demo: .venv/.made
	@.venv/bin/python $(INSTALL) -c constraints.txt -e .
	@touch $@

.venv/.dev: .venv/.made
	@.venv/bin/python $(INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@

.venv-zoo/.zoo: .venv-zoo/.made
	@.venv-zoo/bin/python $(INSTALL) --upgrade -e '.[timm]' pytest pytest-xdist
	@touch $@
