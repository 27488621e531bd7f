"""Which template suits the model? The preflight check in all of them, without a run: nothing is written, nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.check.dry_run import ANEW, at_start, changed
from grpo.config import OF_CHAT, Config, DataConfig, PreflightConfig, RewardConfig
from grpo.data.prompts import TEMPLATES, build_prompts, use_chat_template
from grpo.data.rows import load_rows
from grpo.policy.tokenizer import load_tokenizer
from grpo.run import preflight
from grpo.run.preflight import Result, Skipped
from grpo.trainer import Trainer


def check(config: Config, *, templates: Sequence[str] = tuple(TEMPLATES), num_questions: int | None = None) -> int:
    """Try the configured template and `templates`, and print what came of it; every process calls it. With an environment the
    configured one alone.

    Args:
        num_questions: None: as configured.

    Returns:
        0 if the configured template can be trained with, also if there are warnings; 1 if it is refused.

    Raises:
        ValueError: as Trainer, if no template has prompts.
    """
    config = at_start(config)
    num_questions = (
        num_questions or config.preflight.num_questions or PreflightConfig.model_fields["num_questions"].default
    )
    wanted = list(dict.fromkeys([config.data.template, *templates]))
    if config.environment.function is not None:  # what it says has the form of the configured one
        wanted = wanted[:1]
    rows = load_rows(config.data, reads_answer=False) if len(wanted) > 1 else []
    tokenizer = load_tokenizer(config.model)
    use_chat_template(tokenizer, config.data)
    skipped: list[Skipped] = []
    while len(wanted) > 1 and (reason := _unfit(config, wanted[0], rows, tokenizer)) is not None:
        skipped.append(Skipped(wanted.pop(0), reason))
    with TemporaryDirectory(prefix="grpo-check-") as directory:
        trainer = Trainer(_quiet(config, wanted[0], directory))
        result = trainer.preflight.examine(num_questions=num_questions, templates=wanted)
        trainer.close()
    result = Result([*skipped, *result.templates], result.audits, result.leaked, result.num_held_out, result.seconds)
    trainer.processes.say(preflight.report(result))
    return int(result.verdict == "refuse")


def _unfit(config: Config, template: str, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why there are no prompts of a template; None if there are."""
    try:
        build_prompts(rows, tokenizer, _with_template(config, template).data)
    except ValueError as error:
        return str(error)
    return None


def _with_template(config: Config, template: str) -> Config:
    names = OF_CHAT if template != "chat" else ()
    return changed(config, data={"template": template, **{name: DataConfig().model_dump()[name] for name in names}})


def _quiet(config: Config, template: str, directory: str) -> Config:
    """With the format watched too, whatever is rewarded: it tells an answer that is wrong from one that is not found."""
    config = _with_template(config, template)
    if all(reward.function != "format" for reward in config.rewards):
        config = config.model_copy(update={"rewards": [*config.rewards, RewardConfig(function="format", weight=0)]})
    run = {**ANEW, "dir": str(Path(directory) / "run")}
    return changed(config, run=run, logging={"wandb": "disabled", "completions_every": 0})
