# Two commands set everything up on a machine with Python >= 3.11 and make:
#   make demo    environment, installation, the main job
#   make test    environment, installation, all tests but those of `make drills`
# Both can be repeated; the environment (.venv) is made once.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# SevenNet does not go together with other guests: an environment of its own
GUEST  := .venv-sevennet
# neither does MACE
MACE   := .venv-mace
# CHGNet would go together with SevenNet, but brings pymatgen along
CHGNET := .venv-chgnet
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test fast drills lint sevennet mace chgnet help clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/installed  ## install, then an i-PI run of a Cu-Au/water cluster that learns while it runs (a few minutes)
	@echo "== tumbaga run cuau-water"
	$(BIN)/tumbaga run cuau-water

test: lint  ## install, then lint, types, import contracts and all tests but the drills
	@echo "== tests"
	$(BIN)/pytest -q

fast: $(VENV)/installed-dev  ## the quick ones of the tests (three minutes)
	$(BIN)/pytest -q -m "not slow"

drills: $(VENV)/installed-dev  ## the tests that are left out of `make test`: faults again and again (ten minutes)
	$(BIN)/pytest -q -m drill

lint: $(VENV)/installed-dev  ## lint, types, import contracts
	@echo "== lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "== types"
	$(BIN)/mypy
	@echo "== import contracts"
	$(BIN)/lint-imports

sevennet: $(GUEST)/installed  ## the tests of the SevenNet back end, in an environment of its own
	@echo "== tests of the SevenNet back end"
	$(GUEST)/bin/pytest -q tests/driver/test_sevennet.py tests/driver/test_sevennet_training.py

mace: $(MACE)/installed  ## the tests of the MACE back end, in an environment of its own
	@echo "== tests of the MACE back end"
	$(MACE)/bin/pytest -q tests/driver/test_mace.py tests/driver/test_exporting.py

chgnet: $(CHGNET)/installed  ## the tests of the CHGNet back end, in an environment of its own
	@echo "== tests of the CHGNet back end"
	$(CHGNET)/bin/pytest -q tests/driver/test_chgnet.py tests/driver/test_chgnet_training.py

$(BIN)/python:
	@echo "== environment in $(VENV)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tumbaga needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "== installing tumbaga (PyTorch is the large part)"
	$(PIP) install --progress-bar off -q -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "== installing what the tests need"
	$(PIP) install --progress-bar off -q -c constraints.txt -e '.[dev,xtb,export]'
	@touch $@

$(GUEST)/installed: $(VENV)/installed
	@echo "== environment in $(GUEST)"
	$(BIN)/python benchmarks/embedded.py --setup
	$(GUEST)/bin/python -m pip --disable-pip-version-check install --progress-bar off -q -c constraints.txt -e '.[sevennet]' pytest pytest-timeout pytest-xdist psutil
	@touch $@

$(MACE)/installed: $(BIN)/python pyproject.toml constraints-mace.txt
	@echo "== environment in $(MACE)"
	$(BIN)/python -m venv $(MACE)
	$(MACE)/bin/python -m pip --disable-pip-version-check install --progress-bar off -q -c constraints-mace.txt -e '.[mace]' pytest pytest-timeout pytest-xdist psutil
	@touch $@

$(CHGNET)/installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "== environment in $(CHGNET)"
	$(BIN)/python -m venv $(CHGNET)
	$(CHGNET)/bin/python -m pip --disable-pip-version-check install --progress-bar off -q -c constraints.txt -e '.[chgnet]' pytest pytest-timeout pytest-xdist psutil
	@touch $@

clean:  ## remove the environments and everything built
	rm -rf $(VENV) $(GUEST) $(MACE) $(CHGNET) .venv-falcon dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
