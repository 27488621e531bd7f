.PHONY: setup quickstart test check

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
