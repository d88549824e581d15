"""Tests with the engines themselves: `make test-engines` downloads them and runs these."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Not here: the engines' own memory is theirs."""


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Path:
    """A folder in which fastlogits is installed, with its entry points; the environment itself lacks it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for part in ("fastlogits", "kernels"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / part, source / part)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(source)]
    subprocess.run(install, check=True)
    return target
