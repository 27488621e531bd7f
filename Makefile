.PHONY: setup quickstart test check gpu

setup: .venv/installed

.venv/installed: pyproject.toml scripts/install.sh
	scripts/install.sh

# Train a tiny model on the CPU in about two minutes.
quickstart: setup
	.venv/bin/accelerate launch scripts/train_zero.py --config configs/quickstart.yaml

# Format, lint and types.
check: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

# All tests that need neither a GPU nor a network.
test: check
	.venv/bin/python -m pytest

# What CI cannot see, on all GPUs of this machine: make gpu ARGS="--only zero learns". Without .venv, in the environment's Python.
gpu:
	$(or $(wildcard .venv/bin/python),python) scripts/check_gpu.py $(ARGS)
