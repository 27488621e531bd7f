.PHONY: setup quickstart r1 lint check fast test tests gpu

setup: .venv/installed

.venv/installed: pyproject.toml scripts/install.sh
	scripts/install.sh

# Train a tiny model on the CPU in about two minutes.
quickstart: setup
	.venv/bin/grpo train --config quickstart

# The path from R1-Zero to R1 with a tiny model, on the CPU in about twelve minutes.
r1: setup
	.venv/bin/grpo r1 r1-tiny

# A worker per core; docs/testing.md says which tests run where.
PYTEST = .venv/bin/python -m pytest -n auto --dist loadgroup --no-loadscope-reorder

# Format, lint, types and the fast tests, side by side.
check:
	$(MAKE) --no-print-directory --jobs=2 lint fast

fast: setup
	$(PYTEST) -m "not slow"

# Format, lint, types and all tests that need neither a GPU nor a network.
test: lint tests

tests: setup
	$(PYTEST)

lint: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

# What CI cannot see, on all GPUs of this machine: make gpu ARGS="--only zero learns". Without .venv, in the environment's Python.
gpu:
	$(or $(wildcard .venv/bin/python),python) scripts/check_gpu.py $(ARGS)
