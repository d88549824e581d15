"""The layout: importable from anywhere, in the way of nothing."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from transformers import dependency_versions_table

import fastlogits

ROOT = Path(__file__).parents[1]
USE_TRANSFORMERS = """
import sys
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import import_utils
LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
print(import_utils.is_kernels_available(), getattr(sys.modules.get("kernels"), "__file__", None))
"""


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_imports_from_the_repository_root():
    assert python(USE_TRANSFORMERS) == "False None"


def test_transformers_imports_from_the_repository_root_beside_the_package_named_kernels(tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    # The version that this transformers asks for, else, where the index lacks it, the newest.
    for requirement in (dependency_versions_table.deps["kernels"], "kernels"):
        installed = subprocess.run([*install, requirement], capture_output=True, text=True, check=False)
        if installed.returncode == 0:
            break
    else:
        pytest.skip(f"no package index: {installed.stderr.strip().splitlines()[-1]}")
    python(USE_TRANSFORMERS, PYTHONPATH=str(tmp_path))
    assert python("import kernels; print(kernels.__file__)", PYTHONPATH=str(tmp_path)).startswith(str(tmp_path))


def test_importing_fastlogits_imports_neither_transformers_nor_triton():
    loaded = python(
        "import sys, fastlogits; print([m for m in ('transformers', 'triton', 'torch') if m in sys.modules])"
    )
    assert loaded == "[]"


def test_public_names():
    for name in fastlogits.__all__:
        value = getattr(fastlogits, name)
        assert value.__doc__, name
        assert name in dir(fastlogits)
    with pytest.raises(AttributeError, match="has no attribute 'TopQ'"):
        fastlogits.TopQ  # noqa: B018
    assert python("from fastlogits import *; print(TokenMask.__name__)") == "TokenMask"
    stub = (ROOT / "fastlogits" / "__init__.py").read_text()
    for name, home in fastlogits._HOME.items():
        assert re.search(rf"from fastlogits\.{re.escape(home)} import (\(\s*)?{name} as {name}", stub), name


def test_wheel_holds_both_packages_and_their_types(tmp_path):
    source = tmp_path / "source"
    for part in ("fastlogits", "kernels"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / part, source / part)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    if built.returncode and "No matching distribution" in built.stderr:
        pytest.skip("no package index for the build backend")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("fastlogits-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "fastlogits/__init__.py",
        "fastlogits/py.typed",
        "fastlogits/processors/first_step.py",
        "fastlogits_kernels/mask_tokens.py",
        "fastlogits_kernels/py.typed",
    } <= names
    assert not any(name.startswith(("kernels/", "tests/", "benchmarks/")) for name in names)


def test_without_triton_the_torch_path_serves():
    code = """
import sys
sys.modules["triton"] = None
import torch, fastlogits as fl
run = fl.SuppressFirstTokens([1]).for_run(2)
print(run(torch.zeros(1, 2).long(), torch.zeros(1, 3)).tolist(), sys.modules["triton"])
"""
    assert python(code) == "[[0.0, -inf, 0.0]] None"
