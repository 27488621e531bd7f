"""Which test questions share ten words in a row with a training question, and how much of them?

Ten words may be a phrase that many problems have ("where m and n are relatively prime positive integers"), so the share of a
question's words that one training question has is told too, and the worst come first.

grpo contamination --train openai/gsm8k --train-subset main --benchmarks gsm8k
grpo contamination --train train.jsonl --benchmarks mine,math500 --data mine=questions.jsonl math500=math500.jsonl

Exits with 0 if there are none, with 1 if there are some, and with 2 if a setting is wrong.
"""

import argparse
from collections.abc import Iterator

from grpo.config import DataConfig
from grpo.data import registry as benchmarks
from grpo.data.contamination import NUM_WORDS, overlaps
from grpo.data.rows import load_rows
from grpo.observe.bar import Bar
from grpo.observe.console import errors_for_users
from grpo.system.parser import Parser
from grpo.system.terminal import say

ROWS_PER_SIGN = 256
"""Training questions between two signs of life."""


def watched(train: list[str], name: str) -> Iterator[str]:
    """The questions, with a bar of how many have been compared with a benchmark."""
    with Bar(name, total=len(train), most_tokens=0) as bar:
        for number, question in enumerate(train, 1):
            yield question
            if number % ROWS_PER_SIGN == 0:
                bar.add(ROWS_PER_SIGN)
        bar.add(len(train) % ROWS_PER_SIGN)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, metavar="FILE_OR_HUB_ID", help="the training questions")
    parser.add_argument("--train-subset", metavar="NAME", help="configuration of a hub data set, such as main")
    parser.add_argument("--train-split", default="train", metavar="NAME")
    parser.add_argument("--question-column", default="question", metavar="NAME", help="of the training data")
    parser.add_argument("--answer-column", default="answer", metavar="NAME", help="of the training data")
    benchmarks.add_arguments(parser)
    parser.add_argument(
        "--words", type=int, default=NUM_WORDS, metavar="N", help="how many in a row; default: %(default)s"
    )
    parser.add_argument(
        "--show", type=int, default=5, metavar="N", help="examples of each benchmark; default: %(default)s"
    )
    arguments = parser.parse_args()
    if arguments.words < 2:
        parser.error(f"--words is {arguments.words}; every text shares single words. Set it to 2 or more.")
    from datasets import disable_progress_bars

    num_found = 0
    disable_progress_bars()
    with errors_for_users():
        names, data = benchmarks.named(arguments)
        columns = {"question_column": arguments.question_column, "answer_column": arguments.answer_column}
        source = {"name": arguments.train, "subset": arguments.train_subset, "split": arguments.train_split}
        train = [row["question"] for row in load_rows(DataConfig(**source, **columns), reads_answer=False)]
        for name in names:
            test = [row["question"] for row in benchmarks.load(name, data.get(name))]
            found = overlaps(watched(train, name), test, num_words=arguments.words)
            num_found += len(found)
            half = sum(each.share >= 0.5 for each in found)
            say(
                f"{name}: {len(found)} of {len(test):,} questions ({len(found) / len(test):.1%}) share {arguments.words} words "
                f"in a row with one of {len(train):,} training questions; {half} share half of their words or more with one"
            )
            for each in sorted(found, key=lambda each: -each.share)[: arguments.show]:
                say(f"  {each.share:.0%} of its words: ... {each.words} ...")
                say(f"    test      {test[each.test]!r}\n    training  {train[each.train]!r}")
    raise SystemExit(int(num_found > 0))
