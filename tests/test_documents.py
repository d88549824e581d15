"""What the documents show: their code compiles and names only what there is, their links lead somewhere."""

import ast
import doctest
import re
import runpy
from pathlib import Path

import pytest

import fastlogits as fl

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md")),
    *(str(p.relative_to(ROOT)) for p in ROOT.glob("kernels/fastlogits_kernels/*/README.md")),
]
KERNELS = [name for name in DOCUMENTS if name.startswith("kernels/")]


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


@pytest.mark.parametrize("name", KERNELS)
def test_names_of_kernels_exist(name):
    """What the README of a folder of kernels writes as code is a name of the kernels, or a file beside it."""
    sources = " ".join(path.read_text() for path in ROOT.glob("kernels/**/*.py"))
    known = set(re.findall(r"\w+", sources))
    for code in re.findall(r"`([^`\n]+)`", (ROOT / name).read_text()):
        if code.endswith(".py"):
            assert ((ROOT / name).parent / code).exists(), code
        elif re.fullmatch(r"[\w.]+", code):
            assert set(re.findall(r"\w+", code)) <= known, code


def test_the_picture_of_the_selection_is_as_it_is_drawn():
    drawn = runpy.run_path(str(ROOT / "docs/figures/selection.py"))
    assert drawn["OUT"].read_text() == drawn["picture"]()
