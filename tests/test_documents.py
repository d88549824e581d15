"""What the documents show: their code compiles and names only what there is, their links lead somewhere."""

import ast
import doctest
import re
from pathlib import Path

import pytest

import fastlogits as fl

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md")),
]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_code_compiles_and_names_what_there_is(name):
    for block in re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "fastlogits":
                assert all(hasattr(fl, alias.name) for alias in node.names), ast.unparse(node)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fl":
                assert hasattr(fl, node.attr), ast.unparse(node)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text()):
        assert link.startswith("https://") or ((ROOT / name).parent / link).exists(), link


def test_of_the_plots_the_repository_keeps_what_documents_show():
    shown = {
        path
        for name in DOCUMENTS
        for path in re.findall(r"\]\((benchmarks/results/[^)]+)\)", (ROOT / name).read_text())
    }
    kept = re.findall(r"^!(.*)$", (ROOT / ".gitignore").read_text(), re.MULTILINE)
    assert sorted(kept) == sorted(path for path in shown if path.endswith((".png", ".svg")))


def test_the_processor_of_contributing_passes_its_test(device):
    names = {"__name__": "contributing"}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL):
        exec(block, names)
    tested = [value for name, value in names.items() if name.startswith("test_")]
    assert tested
    for test in tested:
        test(device)
    cls = names["NoShoutingAtFirst"]
    for example in doctest.DocTestFinder().find(cls, globs=names):
        assert not doctest.DocTestRunner().run(example).failed
