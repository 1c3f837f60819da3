# From nothing to done: each target makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-backends test-oldest lint clean

demo: .venv/examples
	$(BIN)/python examples/fit.py --out demo --overwrite

test: .venv/test
	$(BIN)/python -m pytest --cov --cov-report= --durations=15
	$(BIN)/python -m coverage report
	$(BIN)/python -m coverage report --fail-under=100 --include='keras_drsl/spread.py,keras_drsl/losses/*,keras_drsl/metrics.py'

# The attacks against those of another library; torchattacks asks for a version of requests that is too old for others.
test-slow: .venv/test
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --no-deps torchattacks
	$(BIN)/python -m pytest -m slow

# The tests of what runs on every backend, each in an environment of its own.
BACKEND_TESTS := tests/test_spread.py tests/test_one_pass.py tests/test_metrics.py tests/losses tests/attacks tests/evaluation \
	tests/test_distribution.py tests/test_benchmarks.py tests/test_training.py tests/test_callbacks.py
# No build of torch for a graphics card is needed to test on a processor; 2.13.0 has one without.
TORCH ?= torch==2.13.0

test-backends: .venv/test .venv-jax/test .venv-torch/test
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest $(BACKEND_TESTS)
	KERAS_BACKEND=jax .venv-jax/bin/python -m pytest $(BACKEND_TESTS)
	KERAS_BACKEND=torch .venv-torch/bin/python -m pytest $(BACKEND_TESTS)

# The oldest Keras that pyproject.toml admits, with the TensorFlow of its day.
test-oldest: .venv-oldest/test
	.venv-oldest/bin/python -m pytest tests/test_spread.py tests/test_one_pass.py tests/test_metrics.py tests/losses

.venv-jax/test .venv-torch/test .venv-oldest/test: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --editable . pytest hypothesis $(PACKAGES)
	touch $@
.venv-jax/test: PACKAGES = jax
.venv-torch/test: PACKAGES = '$(TORCH)'
.venv-oldest/test: PACKAGES = 'keras==3.8.*' 'tensorflow==2.18.*'

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-* demo build dist *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/%: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
