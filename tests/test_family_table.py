"""docs/families.md says what is found by trying."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import transformers
from helpers import ROOT, TINY

from grpo.check import families
from grpo.check.families import FAMILIES, HEAD, Family, try_family
from grpo.system import distributed

DOCUMENT = (ROOT / "docs" / "families.md").read_text()
MADE_WITH = re.findall(r"with transformers (\S+),", DOCUMENT)[0]
ROWS = {cells[1].strip("`"): cells for line in DOCUMENT.splitlines() if (cells := line.strip("| ").split(" | "))[1:]}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_the_table_says_of_a_family_what_is_found(family: Family):
    if family.model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not have this family")
    found = [family.models, f"`{family.model_type}`", *try_family(family, TINY / "model").cells]
    written = [*ROWS[family.model_type], ""][:5]
    if transformers.__version__ == MADE_WITH:
        assert written == found
    assert written[:4] == found[:4]


def test_the_table_has_each_family_once_and_the_head_that_the_script_writes():
    distributed.stop()
    assert [*ROWS][1:] == [family.model_type for family in FAMILIES]
    assert DOCUMENT.startswith(HEAD.format(version=MADE_WITH))


def test_the_script_writes_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(families, "FAMILIES", FAMILIES[:1])
    monkeypatch.setattr(sys, "argv", ["make_family_table.py", "--out", str(tmp_path / "families.md")])
    runpy.run_path(str(ROOT / "scripts/make_family_table.py"), run_name="__main__")
    written = (tmp_path / "families.md").read_text()
    assert written.startswith(HEAD.format(version=transformers.__version__))
    assert f"`{FAMILIES[0].model_type}`" in written
