"""What the documents show: their code runs, their links lead somewhere, the site has every page."""

import doctest
import logging
import re
import runpy
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
import yaml

import fastlogits as fl

ROOT = Path(__file__).parents[1]
PAGES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))
KERNELS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("kernels/fastlogits_kernels/*/README.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *PAGES, *KERNELS]
HERE = "https://github.com/fastlogits/fastlogits/blob/main/"
"""Where the repository is read; links to it are to what stands here."""
RAW = "https://raw.githubusercontent.com/fastlogits/fastlogits/main/"
SITE = "https://fastlogits.github.io/fastlogits/"


class Block(NamedTuple):
    """A block of Python in a page."""

    line: int
    code: str
    needs: str
    """A package that it needs besides, if any: named in a comment above it, ``<!-- needs: vllm -->``."""


_BLOCK = re.compile(r"(?:<!-- needs: (\w+) -->\n)?^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks_of(name):
    text = (ROOT / name).read_text()
    return [Block(text[: match.start(2)].count("\n") + 1, match[2], match[1] or "") for match in _BLOCK.finditer(text)]


@pytest.fixture
def _as_before(tmp_path, monkeypatch):
    """What a page leaves behind goes, and the memory that a page may take is little.

    A cache of requests takes nearly all that there is; filled with NaN, as all memory is here, that takes a minute.
    """
    monkeypatch.chdir(tmp_path)
    memory = psutil.virtual_memory()._replace(total=psutil.Process().memory_info().rss + 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    state, handlers = torch.get_rng_state(), list(logging.root.handlers)
    levels = {name: logging.getLogger(name).level for name in ("", "fastlogits")}
    yield
    torch.set_rng_state(state)
    fl.decode.clear()
    logging.root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.usefixtures("_as_before", "one_thread")
@pytest.mark.parametrize("name", [name for name in ("README.md", *PAGES) if blocks_of(name)])
def test_all_blocks_of_a_page_run(name):
    """In order. Those of a page build on each other; in the README each stands by itself."""
    torch.manual_seed(0)
    names = {"__name__": "page"}
    for block in blocks_of(name):
        if block.needs and find_spec(block.needs) is None:
            continue
        if name == "README.md":
            names = {"__name__": "page"}
        # Line numbers as in the page.
        exec(compile("\n" * (block.line - 1) + block.code, str(ROOT / name), "exec"), names)


def test_what_is_left_out_is_little():
    """Blocks that need an engine are the exception."""
    left_out = [name for name in PAGES for block in blocks_of(name) if block.needs]
    assert len(left_out) <= 12
    assert len([block for name in PAGES for block in blocks_of(name)]) > 40


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text()):
        if link.startswith((HERE, RAW)):
            assert (ROOT / link.removeprefix(HERE).removeprefix(RAW)).exists(), link
        elif name in ("README.md", "docs/changelog.md"):
            assert link.startswith("https://"), f"{link} leads nowhere on a package index"
        else:
            assert link.startswith("https://") or ((ROOT / name).parent / link).exists(), link


def test_the_readme_is_short():
    """It is read in five minutes, and each of its blocks at a glance."""
    assert len((ROOT / "README.md").read_bytes()) <= 9 * 1024
    assert all(block.code.count("\n") <= 20 for block in blocks_of("README.md"))


def _leaves(nav):
    for entry in nav:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else _leaves(value)


def test_the_site_has_every_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(f"docs/{page}" for page in _leaves(site["nav"])) == PAGES
    assert site["site_url"] == SITE


def test_of_the_plots_the_repository_keeps_what_documents_show():
    shown = {
        path for name in DOCUMENTS for path in re.findall(r"(benchmarks/results/[^)\s]+)\)", (ROOT / name).read_text())
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
    assert drawn["OUT"].read_text() == drawn["ON_THE_SITE"].read_text() == drawn["picture"]()


def test_the_picture_of_the_logits_is_as_it_is_drawn():
    drawn = runpy.run_path(str(ROOT / "docs/figures/logits.py"))
    assert drawn["OUT"].read_text() == drawn["picture"]()
