# From nothing to done: each target makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/examples
	$(BIN)/python examples/fit.py --out demo --overwrite

test: .venv/test
	$(BIN)/python -m pytest --cov --cov-report=
	$(BIN)/python -m coverage report
	$(BIN)/python -m coverage report --fail-under=100 --include='keras_drsl/spread.py,keras_drsl/losses/*,keras_drsl/metrics.py'

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv demo build dist *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/%: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
