#!/usr/bin/env bash
# Install this library and its development tools into .venv, in one resolver run; EXTRAS=vllm,hub adds others of pyproject.toml's.
# With an NVIDIA driver: torch as PyPI has it. Without: the CPU build, which is 200 MB instead of several GB.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
cpu_index=https://download.pytorch.org/whl/cpu

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "$("$python" --version) is too old; grpo needs Python 3.11 or newer. Run: make PYTHON=/path/to/python3.12 ..." >&2
  exit 2
}
reachable() { "$python" -c "import urllib.request as u; u.urlopen('$1/torch/', timeout=5)" 2>/dev/null; }

torch=()
if ! nvidia-smi >/dev/null 2>&1; then
  torch=("torch==2.13.0") # a version that has a CPU build; pip prefers 2.13.0+cpu wherever it finds one
  if [ "$(uname -s)" = Linux ] && reachable "$cpu_index"; then torch+=(--extra-index-url "$cpu_index"); fi
fi
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet "${torch[@]}" --editable ".[dev${EXTRAS:+,$EXTRAS}]"
touch .venv/installed
echo "installed in .venv; next: source .venv/bin/activate, then grpo train --config quickstart"
