"""One page to look at a run, or to compare several: curves, evaluations, completions, settings. It needs no network.

grpo report runs/quickstart
grpo report runs/a runs/b --out compare.html --png figures --pdf figures
grpo report runs/quickstart --picture curves.png --panels "Accuracy,Length by verdict,What becomes of a completion"
"""

import argparse
from pathlib import Path

from grpo.observe.console import errors_for_users
from grpo.system.parser import Parser


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="what run.dir named; up to 8")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: report.html in the run's directory, or here for several runs"
    )
    parser.add_argument("--max-completions", type=int, metavar="N", help="of each kind in all; default: 20,000")
    parser.add_argument("--png", type=Path, metavar="DIR", help="also write each curve as a PNG, for a paper")
    parser.add_argument("--pdf", type=Path, metavar="DIR", help="the same as PDF")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw some panels as one PNG, PDF or SVG")
    parser.add_argument(
        "--panels", metavar="TITLES", help="of --picture, with commas between them; default: those of curves.png"
    )
    arguments = parser.parse_args()
    titles = [title.strip() for title in (arguments.panels or "").split(",") if title.strip()]
    if arguments.panels is not None and not titles:
        parser.error(f"--panels is {arguments.panels!r}; it names no panel. Name some by their titles on the page.")
    if titles and arguments.picture is None:
        parser.error("--panels says what --picture draws. Give --picture FILE too.")
    with errors_for_users():
        from grpo.report import check_places, read_runs, remarks, save_figures, save_picture, write_page_of
        from grpo.report.page import MAX_COMPLETIONS

        check_places(arguments.out, arguments.png, arguments.pdf, picture=arguments.picture)
        limit = MAX_COMPLETIONS if arguments.max_completions is None else arguments.max_completions
        out = arguments.out or (arguments.runs[0] if len(arguments.runs) == 1 else Path()) / "report.html"
        runs = read_runs(arguments.runs, max_completions=limit)
        if arguments.picture is not None:  # first, since a title may be wrong
            save_picture(arguments.runs, arguments.picture, titles)
        try:
            size = write_page_of(runs, out)
        except OSError as error:
            if not str(error.filename).startswith(str(out)):
                raise
            raise ValueError(
                f"--out is {str(out)!r}; no page can be written there ({error.strerror}). Name a file in another directory."
            ) from error
        print(f"{out}  {size / 1e6:.1f} MB")
        for line in remarks(runs):
            print(line)
        for directory, suffix in ((arguments.png, "png"), (arguments.pdf, "pdf")):
            if directory is not None:
                figures = save_figures(arguments.runs, directory, suffix=suffix)
                print(f"{directory}  {len(figures)} figures ({suffix})")
        if arguments.picture is not None:
            print(arguments.picture)
