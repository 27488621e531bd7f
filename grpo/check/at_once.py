"""What is wrong with a configuration, told before torch is imported: in a second or two.

Each check is one of the run's own, which makes all of them again, and more. No code of the user's is run here.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path

from grpo.config import TASK_PREFIX, AnyConfig, Config, SupervisedConfig
from grpo.data import hub_names
from grpo.data.files import FORMATS
from grpo.data.rows import load_rows, written_rows
from grpo.run.resumable import check_newest
from grpo.scoring.reward import check_spec

MOST_BYTES = 20_000_000
"""Of a file that is read here; what is larger takes longer, and waits for the run itself."""


def check_config(config: AnyConfig, *, resumes: bool = False) -> None:
    """Raises ValueError as the run would. Of several processes the first is enough.

    Args:
        resumes: what is checked is to be run, and not to be tried beside checkpoints that may be there.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if resumes:
        check_newest(config)
    config.run.check_dir()
    hub_names.check_config(config)
    if isinstance(config, Config):
        for reward in config.rewards:
            check_spec(reward.function)
        for tool in config.tools.functions:
            check_spec(tool.function, "tools.functions", "grpo.tools")
        if config.environment.function is not None:
            check_spec(config.environment.function, "environment.function", "grpo.tools.environments")
    _check_data(config)


def _check_data(config: AnyConfig) -> None:
    data = config.data
    if isinstance(config, SupervisedConfig):
        if is_read_fast(data.name, data.split):
            for _ in written_rows(data, None):
                pass
        return
    if is_read_fast(data.name, data.split):
        load_rows(data, reads_answer=False)
    is_evaluated = data.name is not None and config.evaluation.num_questions > 0
    if is_evaluated and is_read_fast(data.eval_name or data.name, data.eval_split):
        load_rows(data, evaluation=True, reads_answer=False)


def is_read_fast(source: object, split: str = "train") -> bool:
    """Whether it is a small file of text, or a file that is not there."""
    if not isinstance(source, str) or source.startswith(TASK_PREFIX):
        return False
    if "[" in split or os.environ.get("RANK", "0") != "0":
        return False
    path = Path(source).expanduser()
    if not path.is_file():
        return path.suffix in FORMATS and not path.exists() and not glob.has_magic(source)
    return path.suffix != ".parquet" and path.stat().st_size <= MOST_BYTES
