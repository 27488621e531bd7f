"""What is wrong with a configuration, told before torch is imported: in a second or two.

Each check is one of the run's own, which makes all of them again, and more. No code of the user's is run here.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from pathlib import Path

from grpo.config import TASK_PREFIX, AnyConfig, Config, SourceConfig, SupervisedConfig
from grpo.data import hub_names, pass_rates
from grpo.data.files import FORMATS, load_table
from grpo.data.rows import load_rows, written_rows
from grpo.run.resumable import check_newest
from grpo.scoring.reward import check_spec, sure_name

MOST_BYTES = 20_000_000
"""Of a file that is read here; what is larger takes longer, and waits for the run itself."""


IsToCome = Callable[[object], bool]
"""Whether what has this name is made before the run begins, and is not looked for."""


def nothing_is_to_come(_: object) -> bool:
    return False


def check_config(
    config: AnyConfig,
    *,
    resumes: bool = False,
    is_to_come: IsToCome = nothing_is_to_come,
    asks_hub: bool = True,
) -> None:
    """Raises ValueError as the run would. Of several processes the first is enough.

    Args:
        resumes: what is checked is to be run, and not to be tried beside checkpoints that may be there.
        asks_hub: whether models and data sets that may be of the hub are looked for there.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if resumes:
        check_newest(config)
    config.run.check_dir()
    hub_names.check_config(config, is_to_come, asks_hub=asks_hub)
    check_functions(config)
    check_data(config, is_to_come)


def check_functions(config: AnyConfig) -> None:
    """Raises ValueError for a reward, a tool or an environment that cannot be found. Supervised training grades answers only."""
    is_graded = isinstance(config, Config) or config.evaluation.num_questions > 0
    for number, reward in enumerate(config.rewards if is_graded else []):
        check_spec(reward.function, f"rewards.{number}.function")
    if isinstance(config, Config):
        for tool in config.tools.functions:
            check_spec(tool.function, "tools.functions", "grpo.tools")
        if config.environment.function is not None:
            check_spec(config.environment.function, "environment.function", "grpo.tools.environments")
    if is_graded and config.scoring.verdict is not None:
        _check_verdict(config)


def _check_verdict(config: AnyConfig) -> None:
    """Where the names of the rewards are sure without running their files."""
    from grpo.scoring.answers import ENVIRONMENT, verdicts_of

    names = [sure_name(reward) for reward in config.rewards]
    if isinstance(config, Config) and config.environment.function is not None:
        names.append(ENVIRONMENT)
    if None not in names:
        verdicts_of(config.scoring.verdict, filter(None, names))


def check_data(config: AnyConfig, is_to_come: IsToCome = nothing_is_to_come) -> None:
    """Raises ValueError for files that are missing, for small ones whose rows cannot be read, and for a wrong chat template."""
    data = config.data
    if data.chat_template is not None and not is_to_come(data.chat_template):
        from grpo.data.chat_template import read_chat_template

        read_chat_template(data.chat_template)

    def is_read(source: object, split: str) -> bool:
        return not is_to_come(source) and is_read_fast(source, split)

    if isinstance(config, Config) and data.pass_rates is not None and not is_to_come(data.pass_rates):
        pass_rates.check_file(Path(data.pass_rates), data.pass_rates)
    for number, source in enumerate(data.name if isinstance(data.name, list) else []):
        if is_read(source.name, "") and not Path(source.name).expanduser().exists():
            load_table(source.name, source.subset, "train", f"data.name.{number}.name", source.revision)
    if isinstance(config, SupervisedConfig):
        if is_read(data.name, data.split):
            for _ in written_rows(data, None):
                pass
        config.check_held_out()
        if config.evaluation.num_questions > 0 and is_read(data.eval_name, data.eval_split):
            load_rows(config.parts.data, evaluation=True, reads_answer=False)
        return
    if is_read(data.name, data.split):
        load_rows(data, reads_answer=False)
    is_evaluated = data.name is not None and config.evaluation.num_questions > 0
    if is_evaluated and data.eval_name is None and is_to_come(data.name):  # files have no held-out split, listed or not
        data = data.model_copy(update={"name": [SourceConfig(name=str(data.name))]})
    if is_evaluated and data.eval_name is None and isinstance(data.name, list):
        load_rows(data, evaluation=True, reads_answer=False)
    if is_evaluated and is_read(data.eval_name or data.name, data.eval_split):
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
