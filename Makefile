PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PYTEST_ARGS ?=
export FLWR_TELEMETRY_ENABLED = 0
export RAY_USAGE_STATS_ENABLED = 0

.PHONY: demo test check bench docs clean

demo: $(VENV)/.installed
	$(BIN)/fedmi run scenarios/quickstart.toml --out runs/quickstart

test: $(VENV)/.installed
	$(BIN)/pytest $(PYTEST_ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test PYTEST_ARGS='-m ""'

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/round_overhead.py
	$(BIN)/python benchmarks/mi_face.py
	$(BIN)/python benchmarks/inverting_gradients.py
	$(BIN)/python benchmarks/interval_coverage.py
	$(BIN)/python benchmarks/secagg_round.py
	$(BIN)/python benchmarks/homomorphic.py
	$(BIN)/python benchmarks/dp_sgd.py
	$(BIN)/python benchmarks/mask_recovery.py
	$(BIN)/python benchmarks/bit_flips.py
	$(BIN)/python benchmarks/encrypted_inference.py
	$(BIN)/python benchmarks/query_monitor.py
	$(BIN)/python benchmarks/federated_averaging.py

docs: $(VENV)/.installed
	$(BIN)/python docs/make_architecture.py
	$(BIN)/python docs/make_readme.py
	$(BIN)/python docs/make_figures.py

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,report,smpc]'
	touch $@

clean:
	rm -rf $(VENV) runs
