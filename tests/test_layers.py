"""The folders of grpo/ are layers: each imports those below it and none above, and no modules import each other in a circle."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers import ROOT

LAYERS = [
    "types",
    "text",
    "algorithm",
    "config",
    "system",
    "policy",
    "data",
    "rollout",
    "scoring",
    "turns",
    "observe",
    "report",
    "training",
    "run",
    "assembly",
    "trainer",
    "sft",
    "inference",
    "serving",
    "evaluation",
    "export",
    "rejection",
    "check",
    "pipeline",
    "cli",
    "__main__",
]
"""From the ground up. CONTRIBUTING.md says what each is for."""

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "grpo").rglob("*.py"))
}


def imports(path: Path, *, for_types: bool = True) -> set[str]:
    """Modules of this package that a file imports anywhere in it, also within functions; and for its annotations alone."""
    found, tree = set(), ast.parse(path.read_text())
    if not for_types:
        tree.body = [node for node in tree.body if ast.unparse(node).partition("\n")[0] != "if TYPE_CHECKING:"]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            inner = [f"{node.module}.{each.name}" for each in node.names]
            found |= {name if name in FILES else node.module for name in inner}
        elif isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
    return {name for name in found if name in FILES}


GRAPH = {name: imports(path) for name, path in FILES.items()}


def layer(module: str) -> int:
    return LAYERS.index(module.split(".")[1])


def test_the_guide_for_contributors_says_what_each_layer_is_for():
    guide = (ROOT / "CONTRIBUTING.md").read_text().split("## Where a change goes")[1].split("## Add")[0]
    rows = [row.split("|")[1] for row in guide.splitlines() if row.startswith("| `")]
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == [
        each for each in LAYERS if each != "__main__"
    ]


def test_every_folder_is_a_layer():
    assert {name.split(".")[1] for name in FILES if "." in name} == set(LAYERS)


@pytest.mark.parametrize("module", [name for name in FILES if name != "grpo"])
def test_no_module_imports_one_of_a_layer_above(module: str):
    above = {name for name in GRAPH[module] if name != "grpo" and layer(name) > layer(module)}
    assert not above, f"{module} imports {', '.join(sorted(above))}; move what it needs down, or hand it in"


def test_there_is_no_circle():
    graph = {name: imports(path, for_types=False) - {name} for name, path in FILES.items() if name != "grpo"}
    TopologicalSorter(graph).prepare()


def test_the_test_sees_imports():
    assert {"grpo.types", "grpo.config", "grpo.run.loop"} <= GRAPH["grpo.trainer"]


def test_no_module_is_too_long_to_read_at_once():
    lengths = {name: len(path.read_text().splitlines()) for name, path in FILES.items() if "kernels" not in name}
    longest = max(lengths, key=lambda name: lengths[name])
    assert lengths[longest] <= 600, f"{longest} has {lengths[longest]} lines; find the part of it that is a module"
    assert lengths["grpo.trainer"] <= 260, "a trainer is the loop alone"


@pytest.mark.parametrize("package", ["datasets", "peft"])
def test_a_package_that_takes_a_second_to_import_is_imported_where_it_is_used(package: str):
    """Most runs read JSON lines and train all weights. DeepSpeed's, accelerate's and transformers' modules cannot be helped."""
    found = []
    for name, path in FILES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                found += [name for each in node.names if each.name.partition(".")[0] == package]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == package:
                found.append(name)
    assert not found, f"{', '.join(found)} import {package} with the module; import it in the functions that use it"
