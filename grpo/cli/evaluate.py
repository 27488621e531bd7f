"""Evaluate a model as DeepSeek-R1's authors do: several samples per question at temperature 0.6 and top-p 0.95.

grpo evaluate --model runs/gsm8k --benchmarks gsm8k --samples 16
grpo evaluate --model Qwen/Qwen2.5-0.5B --benchmarks gsm8k,math500 --templates r1_zero,chat_boxed
grpo evaluate --model runs/quickstart --benchmarks mine --data mine=configs/quickstart/test.jsonl --templates chat
grpo evaluate --model runs/quickstart-game --environment runs/quickstart-game/config.yaml
grpo evaluate --endpoint http://127.0.0.1:8000/v1 --model gsm8k --benchmarks gsm8k --templates chat

The model is a run (its newest checkpoint), a checkpoint, a directory in Hugging Face format or an id of the hub; with --endpoint
it is a name at a server with OpenAI's API. Started again with the same settings, an evaluation that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.check.at_once import IsToCome, is_read_fast, nothing_is_to_come
from grpo.data import registry as benchmarks
from grpo.data.hub_names import check_model
from grpo.evaluation import asked
from grpo.inference.options import run_directory, settings_of
from grpo.observe.console import errors_for_users, positive
from grpo.policy.model_source import model_directory
from grpo.system.parser import Parser
from grpo.system.terminal import say
from grpo.turns.named import PromptDefaults, named_environment, prompt_defaults

if TYPE_CHECKING:
    from grpo.evaluation.endpoint import HostedModel


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    with errors_for_users():
        settings = check(parser, arguments)
        if not arguments.endpoint:
            settings = replace(settings, model=model_directory(arguments.model))
        from grpo.evaluation import benchmark, results
        from grpo.evaluation.sample_file import Samples
        from grpo.system import distributed

        hosted = _hosted(arguments) if arguments.endpoint else None
        runtime = asked.Runtime(
            engine=arguments.engine,
            max_sequences=arguments.max_sequences,
            kv_cache_gib=arguments.kv_cache_gib,
            num_workers=arguments.workers,
            trust_remote_code=arguments.trust_remote_code,
        )
        out = Path(arguments.out) if arguments.out else benchmark.default_out(settings.model)
        found = benchmark.evaluate(settings, out, runtime, hosted)
    if os.environ.get("RANK", "0") == "0":
        say(
            f"\n{results.report(found['results'])}\n\nsamples    {out / 'samples.jsonl'}\nresults    {out / 'results.json'}"
        )
        if hosted is not None:
            hosted.report()
        if benchmarks.PROBES_NAME in settings.benchmarks:
            samples = Samples(out / "samples.jsonl", ["benchmark"])
            say(results.transcript(samples.of({"benchmark": benchmarks.PROBES_NAME})))
    distributed.stop()


def _settings_of(arguments: argparse.Namespace) -> asked.Settings:
    """Raises ValueError if the model cannot be asked so."""
    names, data = ([], {}) if arguments.benchmarks is None else benchmarks.named(arguments)
    environment = None if arguments.environment is None else named_environment(arguments.environment)
    defaults = prompt_defaults(None if arguments.endpoint else arguments.environment, arguments.question_template)
    if arguments.templates is None and arguments.environment is None and not arguments.endpoint:
        defaults = _as_trained(arguments.model, defaults)
    top_p = asked.Settings.top_p if arguments.temperature > 0 else 1.0
    return asked.Settings(
        model=arguments.model,
        benchmarks=names,
        templates=(defaults.template if arguments.templates is None else arguments.templates).split(","),
        data=data,
        revision=arguments.revision,
        num_samples=arguments.samples,
        temperature=arguments.temperature,
        top_p=top_p if arguments.top_p is None else arguments.top_p,
        max_completion_tokens=arguments.max_tokens,
        stop=defaults.stop if arguments.stop is None else arguments.stop,
        tools=arguments.tools,
        environment=None if environment is None else environment.model_dump(mode="json"),
        question_template=defaults.question_template,
        num_questions=arguments.questions,
        system_prompt=arguments.system_prompt or (defaults.system_prompt if arguments.templates is None else None),
        dtype=arguments.dtype,
        seed=arguments.seed,
        endpoint=arguments.endpoint,
    )


def _as_trained(model: str, defaults: PromptDefaults) -> PromptDefaults:
    """With the template and the system prompt of the run that the model is of, if it is of one."""
    if (run := run_directory(model)) is None:
        return defaults
    data = settings_of(run / "config.yaml").data
    if data.template not in asked.PROMPT_FORMATS:
        return defaults
    if data.template != defaults.template:
        say(f"template {data.template}, by which {run} was trained; --templates asks otherwise")
    return replace(defaults, template=data.template, system_prompt=data.system_prompt)


def _hosted(arguments: argparse.Namespace) -> HostedModel:
    from grpo.evaluation.endpoint import Endpoint, HostedModel

    endpoint = Endpoint(
        arguments.endpoint,
        api_key_env=arguments.api_key_env,
        concurrency=arguments.concurrency or Endpoint.concurrency,
        request=arguments.request or {},
        price=(arguments.price_in or 0.0, arguments.price_out or 0.0),
    )
    return HostedModel(endpoint, arguments.model)


LOCAL = ("revision", "dtype", "engine", "max_sequences", "kv_cache_gib", "trust_remote_code")
REMOTE = ("api_key_env", "concurrency", "request", "price_in", "price_out")


def check(
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    *,
    is_to_come: IsToCome = nothing_is_to_come,
    asks_hub: bool = True,
) -> asked.Settings:
    """What is asked of the model, as it is named; what is wrong is told before torch is imported.

    Args:
        is_to_come: whether a model or file of that name is made before the command runs, and is not looked for.
        asks_hub: whether a model that may be of the hub is looked for there.

    Raises:
        ValueError: there is nothing to ask, an option has no effect, or what it names is missing or cannot be used.
    """
    if arguments.benchmarks is None and (arguments.environment is None or arguments.data):
        parser.error("the following arguments are required: --benchmarks, or an --environment that brings questions")
    for name in LOCAL if arguments.endpoint else REMOTE:
        if getattr(arguments, name) != parser.get_default(name):
            option = "--" + name.replace("_", "-")
            where, remedy = ("with", "") if arguments.endpoint else ("without", ", or name an --endpoint")
            parser.error(f"{option} {where} --endpoint has no effect. Leave it out{remedy}.")
    settings = _settings_of(arguments)
    if not arguments.endpoint and not is_to_come(arguments.model):
        check_model(arguments.model, revision=arguments.revision, asks_hub=asks_hub)
    for name, path in settings.data.items():
        if not is_to_come(path) and is_read_fast(path):
            benchmarks.load(name, path)
    if arguments.out and Path(arguments.out).is_file():
        raise ValueError(f"--out is {arguments.out!r}, a file; an evaluation is a directory. Name another.")
    return settings


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID")
    remote = parser.add_argument_group("a model that is hosted elsewhere")
    remote.add_argument(
        "--endpoint", metavar="URL", help="with its version: https://api.deepseek.com/v1; --model is a name there"
    )
    remote.add_argument("--api-key-env", metavar="NAME", help="environment variable with the key; default: no key")
    remote.add_argument("--concurrency", type=positive, metavar="N", help="requests at once; default: 32")
    remote.add_argument("--request", type=_fields, metavar="JSON", help="further fields of each request")
    remote.add_argument("--price-in", type=_not_negative, metavar="DOLLARS", help="for a million tokens read")
    remote.add_argument("--price-out", type=_not_negative, metavar="DOLLARS", help="for a million tokens written")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code that comes with the model"
    )
    parser.add_argument("--revision", default=asked.Settings.revision, help="branch, tag or commit of a hub model")
    benchmarks.add_arguments(parser, required=False)
    parser.add_argument(
        "--environment",
        metavar="NAME",
        help="that answers the model's turns, on held-out questions of its own or on those of --benchmarks: guess_number, "
        'my_game.py:Game, \'{"function": ..., "args": {...}, "max_turns": 6}\', or the YAML of a run, which also says how it '
        "is asked",
    )
    parser.add_argument(
        "--question-template",
        metavar="TEXT",
        help="around each question, {question} in it; default: that of --environment's YAML, else it stands by itself",
    )
    parser.add_argument(
        "--templates",
        metavar="A,B,...",
        help="r1_zero, r1_zero_think, chat, chat_boxed (which asks for \\boxed{}), none, none_boxed; default: that of "
        "--environment's YAML or of the run that the model is of, else r1_zero",
    )
    parser.add_argument("--system-prompt", metavar="TEXT", help="of the chat templates; default: the tokenizer's own")
    parser.add_argument(
        "--samples", type=positive, metavar="N", help="per question; default: 64 for aime2024 and amc2023, else 16"
    )
    parser.add_argument(
        "--temperature",
        type=_not_negative,
        default=asked.Settings.temperature,
        help="0: greedy, one sample; default: %(default)s",
    )
    parser.add_argument("--top-p", type=_share, help=f"default: {asked.Settings.top_p}, or 1 at temperature 0")
    parser.add_argument(
        "--max-tokens",
        type=positive,
        metavar="N",
        help="of a completion; the paper: 32768; default: the run's, else 4096, or what the model has positions for",
    )
    parser.add_argument(
        "--stop",
        nargs="+",
        metavar="TEXT",
        help="ends a completion, such as </answer>; see rollout.stop; default: as --environment's YAML, else none",
    )
    parser.add_argument(
        "--tools",
        nargs="+",
        default=[],
        metavar="NAME",
        help="that the model can call, as in tools.functions: calculator, python, my_tools.py:lookup",
    )
    parser.add_argument("--questions", type=positive, metavar="N", help="only the first N of each benchmark")
    parser.add_argument("--seed", type=int, default=asked.Settings.seed)
    parser.add_argument("--out", metavar="DIR", help="default: RUN/evaluation/STEP of a run, else evaluations/MODEL")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default=asked.Settings.dtype)
    parser.add_argument(
        "--engine", choices=("auto", "native", "hf"), default=asked.Runtime.engine, help="see rollout.engine"
    )
    parser.add_argument(
        "--max-sequences",
        type=positive,
        default=asked.Runtime.max_sequences,
        metavar="N",
        help="sampled at once on a GPU",
    )
    parser.add_argument("--kv-cache-gib", type=float, metavar="GIB", help="default: up to half of the free memory")
    workers = max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))
    parser.add_argument("--workers", type=positive, default=workers, metavar="N", help="processes that grade answers")
    return parser


def _not_negative(text: str) -> float:
    return _number(text, lambda value: 0 <= value < math.inf, "of 0 or more")


def _number(text: str, fits: Callable[[float], bool], rule: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number {rule}")
    return value


def _fields(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return found


def _share(text: str) -> float:
    return _number(text, lambda value: 0 < value <= 1, "above 0 and at most 1")
