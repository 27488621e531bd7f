"""Started by test_outcomes: a run whose completions come to every end."""

from __future__ import annotations

import sys
from pathlib import Path

from test_outcomes import trainer_of

from grpo.system import distributed

trainer_of(Path(sys.argv[1])).train()
distributed.stop()
