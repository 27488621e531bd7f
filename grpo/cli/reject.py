"""Sample questions many times, and keep the answers that are worth learning from: rejection sampling.

grpo reject --model runs/quickstart --samples 8 --out rows/zero.jsonl
grpo reject --model runs/quickstart --questions more.jsonl --samples 8 --require accuracy=1 format=1 --out rows/more.jsonl
grpo reject --model runs/gsm8k --samples 16 --pass-rate 0.1 0.9 --per-question 2 --out rows/gsm8k.jsonl
grpo reject --model runs/gsm8k --samples 16 --out rows/cold.jsonl --rewrite-with Qwen/Qwen2.5-7B-Instruct

docs/rejection.md has the rules, in their order. Started again with the same questions and sampling, it goes on where it was
interrupted; other thresholds are applied to the samples that are there.
"""

from __future__ import annotations

import argparse
import glob
import os
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from grpo.check.at_once import IsToCome, check_data, check_functions, nothing_is_to_come
from grpo.cli.model_options import add_options
from grpo.config import Config, ModelConfig, RunConfig
from grpo.data.files import FORMATS
from grpo.data.hub_names import check_model
from grpo.inference.options import (
    check_options,
    check_trusted_rewards,
    is_supervised,
    named_settings,
    run_directory,
    with_own_chat_template,
)
from grpo.observe.console import errors_for_users, positive
from grpo.rejection.rules import Rules
from grpo.rejection.template import read_template
from grpo.system.parser import Parser
from grpo.system.terminal import say


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    with errors_for_users():
        check(options)
        from grpo.rejection.reject import table_of
        from grpo.system import distributed

        found = run(options)
        if os.environ.get("RANK", "0") == "0":
            out = Path(options.out)
            say(f"\n{table_of(found)}\n\nrows       {out}\ndropped    {out.with_suffix('.dropped.jsonl')}")
            say(f"pass rates {out.with_suffix('.pass_rates.jsonl')}")
        distributed.stop()


def check(
    options: argparse.Namespace,
    *,
    run: Config | None = None,
    is_to_come: IsToCome = nothing_is_to_come,
    asks_hub: bool = True,
) -> None:
    """What is wrong with the options, told before torch is imported.

    Args:
        run: the configuration of the run that `options.model` is going to be, where it is to come.
        is_to_come: whether a model or file of that name is made before the command runs, and is not looked for.
        asks_hub: whether models that may be of the hub are looked for there.

    Raises:
        ValueError: an option has no effect or is out of range, or what it names is missing or cannot be used.
    """
    _check_effects(options)
    for name, setting in ((options.model, "--model"), (options.rewrite_with, "--rewrite-with")):
        if name is not None and not is_to_come(name):
            check_model(name, setting, asks_hub=asks_hub)
    is_made = not is_to_come(options.model)
    if options.set and not options.config and (run_directory(options.model) if is_made else run) is None:
        raise ValueError(
            f"--set is {' '.join(options.set)}; it overrides settings of --config or of a run, and {options.model!r} belongs to "
            "no run. Leave it out, or name a --config."
        )
    check_options(options, is_made=is_made)
    read_template(options.rewrite_template)
    check_questions(options, is_made=is_made)
    rules_of(options, is_to_come)
    settings = named_settings(options, is_made=is_made)
    if settings is None and run is not None:
        settings = with_own_chat_template(run)
    if settings is None:
        settings = Config(model=ModelConfig(name=options.model), run=RunConfig(dir="", steps=1))
    _check_one_turn(settings, options)
    if options.questions is None and settings.data.name is None:
        raise ValueError(
            "--questions is missing; the model belongs to no run that has some. Name a file, or a YAML with data."
        )
    check_trusted_rewards(settings.rewards, options, asks=False)
    check_functions(settings)
    if not is_to_come(options.questions):
        asked = _with_questions(settings, options.questions)
        evaluation = asked.evaluation.model_copy(update={"num_questions": 0})  # held-out questions are not sampled
        check_data(asked.model_copy(update={"evaluation": evaluation}), is_to_come)


def _check_effects(options: argparse.Namespace) -> None:
    for name in REWRITING if options.rewrite_with is None else ():
        if (value := getattr(options, name)) is not None:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{option} is {value}; it has no effect without --rewrite-with. Leave it out, or name a model."
            )
    if options.rewrite_with is not None and options.tags:
        raise ValueError("--tags has no effect with --rewrite-with. Leave it out: --rewrite-template can ask for tags.")
    if options.questions and any(each.partition("=")[0].startswith("data.where") for each in options.set):
        raise ValueError(
            "--set data.where chooses among the run's own questions, and has no effect on --questions. Leave one of the two out, "
            "or let --questions name a YAML whose section data has a where."
        )


REWRITING = ("rewrite_template", "rewrite_temperature", "rewrite_max_tokens", "rewrite_samples")
"""Options that have no effect without --rewrite-with."""


def _check_one_turn(settings: Config, options: argparse.Namespace) -> None:
    """Raises ValueError if answers would not be those of the run, which has more than a model to answer."""
    if options.tools or (options.tools is None and settings.tools.functions):
        where = "--tools" if options.tools else f"tools.functions of {options.config or options.model}"
        raise ValueError(
            f"{where} names tools; grpo reject calls none, and the answers would not be those of the run. Give --tools without a "
            "name to sample without them, or name a YAML without tools (--config)."
        )
    if settings.environment.function is not None:
        raise ValueError(
            f"environment.function of {options.config or options.model} is {settings.environment.function!r}; grpo reject "
            "has no environment, and an answer is one turn. Name a YAML without one (--config)."
        )


def check_questions(options: argparse.Namespace, *, is_made: bool = True) -> None:
    """Raises ValueError if what the options name has rows to learn from, and no questions."""
    run = run_directory(options.model) if is_made else None
    path = options.config or (run and run / "config.yaml")
    if options.questions is None and path is not None and is_supervised(Path(path)):
        named = f"--config is {path!r}" if options.config else f"--model is {options.model!r}"
        raise ValueError(
            f"{named}, of supervised training: its data are rows with their completions, and no questions to sample. Name "
            "questions with --questions (a file, or a YAML with data), or with --config a YAML of `grpo train`, whose template, "
            "rewards, sampling and questions are taken."
        )


def rules_of(options: argparse.Namespace, is_to_come: IsToCome = nothing_is_to_come) -> Rules:
    """What is kept. Raises ValueError also for a file of rows or questions that cannot be meant."""
    if Path(options.out).suffix != ".jsonl":
        raise ValueError(f"--out is {options.out!r}; the rows are JSON lines. Let its name end with .jsonl.")
    asked, is_made = Path(options.questions or ""), not is_to_come(options.questions)
    if is_made and asked.suffix in (*FORMATS, ".yaml") and not asked.exists() and not glob.has_magic(str(asked)):
        raise ValueError(f"--questions is {options.questions!r}; there is no such file. Correct the path.")
    return Rules(
        require=_required(options.require),
        **{each.name: _value(each.name, options) for each in fields(Rules) if each.name != "require"},
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    from grpo.data.pass_rates import within_pass_rates
    from grpo.data.prompts import build_prompts
    from grpo.data.rows import load_rows
    from grpo.evaluation.asked import Runtime
    from grpo.inference.inspect import columns_of, make_scorer
    from grpo.inference.resolve_model import choose, said, trusted_rewards
    from grpo.observe.bar import check_rows
    from grpo.policy.tokenizer import check_vocabulary, load_tokenizer
    from grpo.rejection.reject import Asked, reject
    from grpo.scoring.binding import reads_answer
    from grpo.scoring.reward import resolve_rewards
    from grpo.system import distributed

    rules, chosen = rules_of(options), choose(options)
    chosen = replace(chosen, settings=_with_questions(chosen.settings, options.questions))
    tokenizer = load_tokenizer(chosen.model)
    data = chosen.data(tokenizer, options.template, options.system)
    if options.questions is None and options.template is None and options.system is None:  # as the run asked them
        data.max_prompt_tokens = chosen.settings.data.max_prompt_tokens
    rewards = resolve_rewards(trusted_rewards(chosen, options))
    processes = distributed.join()
    left_out = Counter[str]()
    rows = load_rows(data, reads_answer=reads_answer(rewards), left_out=left_out)[: options.num_questions]
    rates, by_pass_rate = within_pass_rates(rows, data)
    left_out.update(by_pass_rate)
    asked = Asked(
        chosen.model, chosen.sampling, options.samples, options.seed, _rewriting(options, chosen.sampling), options.tags
    )
    scoring = chosen.settings.scoring.model_copy(update={"num_workers": options.workers})
    with make_scorer(rewards, columns=columns_of(rows), sampling=chosen.sampling, scoring=scoring) as scorer:
        reasons = processes.on_main(lambda: check_rows(scorer, rows))
        prompts, dropped = build_prompts(rows, tokenizer, data)
        prompts = [p for p in prompts if reasons[p.row] is None and rates[p.row]]
        for reason in filter(None, reasons):
            dropped[f"answer cannot be graded, e.g. {reason}"] += 1
        if not prompts:
            raise ValueError(
                f"--questions: not one of {len(rows):,} questions can be asked: "
                f"{'; '.join(f'{n:,}: {why}' for why, n in (dropped + left_out).items())}. Name others."
            )
        check_vocabulary(chosen.model, tokenizer, [prompt.token_ids for prompt in prompts])
        processes.say(
            f"model {chosen.model.name}, template {data.template}, {said(chosen.sampling)}, seed {options.seed}"
        )
        for why, num in (dropped + left_out).items():
            processes.say(f"without {num:,} of the questions: {why}")
        runtime = Runtime(
            engine=options.engine,
            max_sequences=options.max_sequences,
            kv_cache_gib=options.kv_cache_gib,
            trust_remote_code=options.trust_remote_code,
        )
        return reject(asked, prompts, scorer, rules, Path(options.out), runtime)


def _with_questions(settings: Config, questions: str | None) -> Config:
    """The settings with other questions: a YAML's whole section `data`, or a file with the columns as they are named there."""
    if questions is None:
        return settings
    if questions.endswith((".yaml", ".yml")):
        return settings.model_copy(update={"data": Config.load_questions(questions).data})
    return settings.model_copy(
        update={"data": settings.data.model_copy(update={"name": questions, "pass_rates": None, "where": None})}
    )


def _rewriting(options: argparse.Namespace, sampling: Any) -> Any:
    from grpo.policy.model_source import model_directory
    from grpo.rejection.reject import Rewriting

    if not options.rewrite_with:
        return None
    model = ModelConfig(
        name=model_directory(options.rewrite_with, setting="--rewrite-with"),
        trust_remote_code=options.trust_remote_code,
    )
    own = replace(
        sampling,
        temperature=0.6 if options.rewrite_temperature is None else options.rewrite_temperature,
        top_p=0.95 if options.rewrite_temperature is None else 1.0,
        max_tokens=options.rewrite_max_tokens or sampling.max_tokens,
        stop=(),
    )
    return Rewriting(model, read_template(options.rewrite_template), own, options.rewrite_samples or 1)


def _required(given: list[str]) -> dict[str, float]:
    found = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            found[name] = float(value or 1)
        except ValueError:
            raise ValueError(f"--require has {text!r}; it is NAME, or NAME=VALUE with a number. Correct it.") from None
    return found


def _value(name: str, options: argparse.Namespace) -> Any:
    value = getattr(options, name)
    return tuple(value) if isinstance(value, list) else value


def _parser() -> argparse.ArgumentParser:
    from grpo.rejection.rules import Rules

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument(
        "--questions",
        metavar="FILE_OR_YAML",
        help="a data set, with the columns of the run's; or a YAML, whose section data says it; default: the run's own",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="SECTION.SETTING=VALUE",
        help="override settings of --config or of the run, such as data.name",
    )
    parser.add_argument("--num-questions", type=positive, metavar="N", help="only the first N")
    parser.add_argument("--samples", type=positive, default=16, metavar="N", help="per question; default: %(default)s")
    parser.add_argument("--out", required=True, metavar="ROWS.jsonl", help="kept rows; the other files lie beside it")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling; default: %(default)s")
    parser.add_argument(
        "--trust-rewards", action="store_true", help="run reward functions that the run's configuration names"
    )
    rules = parser.add_argument_group("rules")
    rules.add_argument(
        "--require",
        nargs="+",
        default=[],
        metavar="NAME[=VALUE]",
        help="rewards that a right row has, with their least values, else 1; default: the reward that says what is right "
        "(docs/rewards.md)",
    )
    for name, what in (
        ("min_thought_words", "words of a thought"),
        ("max_foreign_words", "words of another script that the question does not have"),
        ("loop_size", "words and signs of what may loop"),
        ("loop_times", "times that make it a loop"),
        ("max_paragraph_words", "words of a paragraph"),
        ("max_thought_code", "code blocks of a thought"),
        ("per_question", "rows of a question"),
    ):
        _rule(rules, name, int, what, getattr(Rules, name))
    _rule(rules, "min_language", float, "share of the words that are in the question's language", Rules.min_language)
    _rule(rules, "max_loop", float, "share of a text in loops", Rules.max_loop)
    rules.add_argument(
        "--pass-rate",
        nargs=2,
        type=float,
        default=list(Rules.pass_rate),
        metavar=("LEAST", "MOST"),
        help="share of a question's samples that are right; default: 0 1",
    )
    rules.add_argument(
        "--choose",
        choices=("first", "shortest", "longest"),
        default=Rules.choose,
        help="which rows of a question, where more pass; default: %(default)s, in the order of sampling",
    )
    rewriting = parser.add_argument_group("rewriting")
    rewriting.add_argument(
        "--tags",
        action="store_true",
        help="write each answer in the paper's form: the text between think tags, its last \\boxed{} between answer tags",
    )
    rewriting.add_argument("--rewrite-with", metavar="M", help="a model that rewrites the kept rows; as --model")
    rewriting.add_argument("--rewrite-template", metavar="FILE", help="text with {question} and {completion}")
    rewriting.add_argument("--rewrite-temperature", type=float, metavar="T", help="default: 0.6, with top-p 0.95")
    rewriting.add_argument("--rewrite-max-tokens", type=positive, metavar="N", help="default: as --max-tokens")
    rewriting.add_argument("--rewrite-samples", type=positive, metavar="N", help="attempts at a row; default: 1")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--engine", choices=("auto", "native", "hf"), default="auto", help="see rollout.engine")
    machine.add_argument("--max-sequences", type=positive, default=512, metavar="N", help="sampled at once on a GPU")
    machine.add_argument("--kv-cache-gib", type=float, metavar="GIB", help="default: up to half of the free memory")
    workers = max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))
    machine.add_argument("--workers", type=positive, default=workers, metavar="N", help="processes that grade answers")
    return parser


def _rule(group: Any, name: str, kind: type, what: str, default: Any) -> None:
    metavar = "SHARE" if kind is float else "N"
    bound = name.partition("_")[0]
    least = {"min": "least ", "max": "most "}.get(bound, "")
    group.add_argument(
        f"--{name.replace('_', '-')}",
        type=kind,
        default=default,
        metavar=metavar,
        help=f"{least}{what}; default: {default}",
    )
