# Each target makes the environments it needs, from nothing.
PYTHON ?= python3
BIN := .venv/bin
# The build of torch without CUDA; another one works as well.
TORCH ?= torch==2.13.0

.PHONY: demo docs test coverage test-short test-backends test-slow test-oldest mutants lint figures clean

demo: .venv/examples
	$(BIN)/python examples/fit.py --seeds 1 --out demo --overwrite

# The tests of losses and metric, and the lines that they must reach, all of them but those for torch.
LOSS_TESTS := tests/losses tests/test_metrics.py tests/test_spread.py
LOSS_CODE := keras_drsl/spread.py,keras_drsl/losses/*,keras_drsl/metrics.py

# All behaviour on TensorFlow.
test: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=15 $(LOSS_TESTS:%=--ignore=%)
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=15 --cov --cov-report= $(LOSS_TESTS)
	$(BIN)/python -m coverage report --fail-under=100 --include='$(LOSS_CODE)' --omit='*/fused_torch.py'

# What share of the lines all tests reach.
coverage: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov

# Many tests compile equal programs.
JAX := KERAS_BACKEND=jax JAX_COMPILATION_CACHE_DIR=.venv-jax/compiled JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

# One small case per behaviour that depends on the backend, on the two other backends.
SHORT_TESTS := -m 'short and not slow and not more' tests

test-short: .venv-jax/test .venv-torch/test
	$(JAX) .venv-jax/bin/python -m pytest -n 2 --dist worksteal $(SHORT_TESTS)
	KERAS_BACKEND=torch .venv-torch/bin/python -m pytest -n 2 --dist worksteal $(SHORT_TESTS)

# Everything that is not about TensorFlow, on all backends.
BACKEND_TESTS := -m 'not slow' tests/attacks tests/benchmarks tests/certificates tests/density tests/evaluation tests/losses tests/training tests/test_backend.py tests/test_callbacks.py \
	tests/test_distribution.py tests/test_features.py tests/test_heads.py tests/test_inputs.py tests/test_metrics.py tests/test_models.py \
	tests/test_multilabel.py tests/test_options.py tests/test_positions.py tests/test_random_models.py tests/test_spread.py \
	tests/test_threat.py
# Large networks, also the slow ones.
REAL_MODELS := -m '' tests/test_real_models.py

test-backends: .venv/test .venv-jax/test .venv-torch/test
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest $(BACKEND_TESTS)
	$(JAX) .venv-jax/bin/python -m pytest $(BACKEND_TESTS)
	KERAS_BACKEND=torch .venv-torch/bin/python -m pytest $(BACKEND_TESTS)
	$(JAX) .venv-jax/bin/python -m pytest $(REAL_MODELS)
	KERAS_BACKEND=torch .venv-torch/bin/python -m pytest $(REAL_MODELS)

# Tests of several minutes: other libraries, killed processes, studies. torchattacks asks for a version of requests that
# is too old for others, and adv-lib for another torch.
test-slow: .venv/test
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --no-deps torchattacks adv-lib tqdm
	$(BIN)/python -m pip install --quiet --editable '.[hub,ray]'
	REQUIRE_ALL=1 $(BIN)/python -m pytest -m "slow or more"

# The oldest Keras that pyproject.toml admits, with the TensorFlow of its day.
test-oldest: .venv-oldest/test
	.venv-oldest/bin/python -m pytest $(LOSS_TESTS)

.venv-jax/test .venv-torch/test .venv-oldest/test: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --editable . pytest pytest-xdist hypothesis scikit-learn $(PACKAGES)
	touch $@
.venv-jax/test: PACKAGES = jax
.venv-torch/test: PACKAGES = '$(TORCH)'
.venv-oldest/test: PACKAGES = 'keras==3.8.*' 'tensorflow==2.18.*'

# About an hour on two cores. A run that was stopped goes on where it was.
mutants: .venv/dev
	$(BIN)/python tests/mutants.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in site/; a warning, such as a link that leads nowhere, is an error.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# All pictures of README and docs, from results/.
figures: .venv/examples
	$(BIN)/python -m studies.figures

clean:
	rm -rf .venv .venv-* demo site build dist *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/%: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
