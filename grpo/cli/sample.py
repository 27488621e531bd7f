"""Print a group of completions for a question, with what each reward function made of each.

grpo sample --model runs/quickstart --question "What is 12+8+5-5+9?" --answer 29
grpo sample --model runs/quickstart --row 3 7 --held-out --base
grpo sample --model Qwen/Qwen2.5-0.5B --config configs/qwen1.5b.yaml --row 0 --group 4 --json
"""

import argparse
import contextlib
import sys
from dataclasses import replace
from typing import Any

from grpo.cli.model_options import add_options
from grpo.data.hub_names import check_model
from grpo.data.rows import as_asked, asked_rows
from grpo.inference.options import check_options
from grpo.observe.console import console, errors_for_users
from grpo.system.parser import Parser
from grpo.system.terminal import is_text


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--question", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument(
        "--answer", action="append", default=[], metavar="GOLD", help="gold answer; one for each --question"
    )
    parser.add_argument(
        "--row", nargs="+", type=int, default=[], metavar="N", help="rows of the run's questions, from 0"
    )
    parser.add_argument("--held-out", action="store_true", help="rows of the run's held-out questions")
    parser.add_argument("--data", metavar="FILE", help="rows of this file or hub data set")
    parser.add_argument("--group", type=int, default=8, metavar="G", help="completions per question; default: 8")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling; default: 0")
    parser.add_argument(
        "--trust-rewards", action="store_true", help="run rewards and an environment that the run's configuration names"
    )
    parser.add_argument("--json", action="store_true", help="a JSON object per completion and nothing else")
    options = parser.parse_args()
    check(parser, options)
    chatter = contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext()
    with errors_for_users(), chatter:
        check_model(options.model)
        check_options(options)
        asked = asked_rows(options.question, options.answer)
        rows = sample(options, asked)
    from grpo.inference.inspect import show_group
    from grpo.system.distributed import stop
    from grpo.system.jsonl import json_line

    stop()
    for row in rows if options.json else []:
        print(json_line(row))
    for start in range(0, 0 if options.json else len(rows), options.group):
        show_group(console(), rows[start : start + options.group])


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what contradicts itself or has no effect."""
    if bool(options.question) == bool(options.row):
        parser.error("the questions are missing or twice there; give either --question or --row.")
    if options.row and options.answer:
        parser.error(
            f"--answer is {options.answer[0]!r}; rows have their own gold answers. Leave it out, or use --question."
        )
    if options.question and (options.data or options.held_out):
        parser.error(
            "--data and --held-out choose rows; they have no effect on --question. Give --row, or leave them out."
        )
    if options.data and options.held_out:
        parser.error(f"--held-out with --data {options.data!r}; the file is taken as it is. Leave one of the two out.")
    if not all(map(is_text, options.question)):
        parser.error("--question has bytes that are no UTF-8.")
    if options.group < 1:
        parser.error(f"--group is {options.group}; there must be at least 1 completion.")


def sample(options: argparse.Namespace, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from grpo.data.prompts import build_prompts
    from grpo.inference.inspect import chosen_rows, columns_of, make_scorer, sample_groups, verdicts_left, without
    from grpo.inference.resolve_model import choose, said, trusted_environment, trusted_rewards, trusted_tools
    from grpo.policy.tokenizer import check_vocabulary, load_tokenizer
    from grpo.scoring.reward import resolve_rewards
    from grpo.turns.environment import Environment
    from grpo.turns.use import Tools

    chosen = choose(options)
    tokenizer = load_tokenizer(chosen.model)
    data = chosen.data(tokenizer, options.template, options.system)
    environment = Environment.of(trusted_environment(chosen, options))
    called = trusted_tools(chosen, options)
    tools = Tools.of(called, chosen.settings.scoring, tokenizer, data, environment=environment)
    data = data if tools is None else tools.told(data)
    if options.data:
        data = data.model_copy(update={"name": options.data, "where": None})
    asked = [{**row, "question": as_asked(row["question"], data)} for row in asked]
    rows = asked or chosen_rows(data, options.row, held_out=options.held_out, environment=environment)
    rows = rows if tools is None else tools.toolbox.observed(rows, data)
    numbers = options.row or range(len(rows))
    prompts, dropped = build_prompts(rows, tokenizer, data)
    prompts = [replace(prompt, row=numbers[prompt.row]) for prompt in prompts]
    check_vocabulary(chosen.model, tokenizer, [prompt.token_ids for prompt in prompts])
    columns = columns_of(rows)
    rewards = resolve_rewards(trusted_rewards(chosen, options)) + ([] if environment is None else [environment.reward])
    lacking = without(rewards, columns)
    verdicts = verdicts_left(chosen.settings.scoring, rewards, lacking)
    scorer = make_scorer(
        [reward for reward in rewards if reward.name not in lacking],
        columns=columns,
        sampling=chosen.sampling,
        scoring=chosen.settings.scoring.model_copy(update={"verdict": verdicts or None}),
    )
    with scorer, contextlib.nullcontext() if tools is None else tools.toolbox:
        print(f"model {chosen.model.name}, template {data.template}, {said(chosen.sampling)}, seed {options.seed}")
        for notice in [] if tools is None else tools.toolbox.notices():
            print(notice)
        for reason, num in dropped.items():
            print(f"without {num} of the questions: {reason}")
        for name, needed in lacking.items():
            print(f"without the reward {name}, which needs {', '.join(needed)}")
        sampler = chosen.load(tokenizer, longest_prompt=max(len(prompt.token_ids) for prompt in prompts))
        return sample_groups(
            prompts,
            generator=sampler.generator if tools is None else tools.around(sampler.generator),
            scorer=scorer,
            sampling=chosen.sampling,
            num_completions=options.group,
            rule=chosen.settings.algorithm.advantage_rule,
            seed=options.seed,
            judged=bool(verdicts),
        )
