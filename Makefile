# The README's two commands, for a machine that has python3 (3.11 or newer) and make:
#
#   make demo    installs FL-WB into .venv and runs the main job on real digits
#   make test    installs the development tools too and runs the tests
#
# ARGS is passed on (`make demo ARGS="experiment=non_overlapping"`, `make test ARGS=tests/test_cli.py`),
# PIP_ARGS goes to pip. PyPI's torch for Linux is a CUDA build of some gigabytes; where a CPU build
# will do, point pip at PyTorch's index of those: `make demo PIP_ARGS="--extra-index-url URL"`.

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
VENV := .venv
INSTALL := $(VENV)/bin/python -m pip install --quiet -c constraints.txt $(PIP_ARGS)

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(VENV)/bin/fl-wb client.send_few_pictures=true $(or $(ARGS),experiment=two_targets)

# Three processes, also on two cores: a third of the time is waiting, for Flower's processes. Files in
# their order: xdist's own, those of many tests first, leaves the long deployment for the end.
test: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

# mypy reads the package as it installs, with strategies/, clients/ and conf/ inside fl_wb.
lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	rm -rf build $(VENV)/package
	$(INSTALL) --no-deps --target $(VENV)/package .
	cd $(VENV)/package && ../bin/python -m mypy --config-file ../../pyproject.toml -p fl_wb

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Stamp files: a second call installs nothing.
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing FL-WB and what it needs into $(VENV) (some minutes the first time)"
	$(INSTALL) -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing FL-WB and its development tools into $(VENV) (some minutes the first time)"
	$(INSTALL) -e ".[dev]"
	touch $(VENV)/installed $@
