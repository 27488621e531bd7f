"""Write docs/families.md: which families of models train, sample natively, or are refused, and why. Takes a minute on a CPU.

python scripts/make_family_table.py
"""

import argparse
from pathlib import Path

import transformers

from grpo.check import families

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "families.md")
    out = parser.parse_args().out
    transformers.utils.logging.set_verbosity_error()
    out.write_text(families.document(families.rows(ROOT / "configs" / "quickstart" / "model")))
    print(out)


if __name__ == "__main__":
    main()
