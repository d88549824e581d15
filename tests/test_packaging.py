"""The layout: importable from anywhere, in the way of nothing."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from transformers import dependency_versions_table

import fastlogits
from tests import public_names

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


def pip_of(python: Path) -> list[str]:
    """The pip of the tests, for an environment that has none: making one takes seconds."""
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    return [*pip, "install", "--quiet", "--no-compile"]


def test_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_imports_from_the_repository_root():
    assert python(USE_TRANSFORMERS) == "False None"


def test_transformers_imports_from_the_repository_root_beside_the_package_named_kernels(tmp_path):
    install = [*pip_of(Path(sys.executable)), "--no-deps", "--target", str(tmp_path)]
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
    names = {}
    exec("from fastlogits import *", names)
    assert set(fastlogits.__all__) <= set(names)


def test_type_checkers_see_the_public_names():
    text = public_names.PATH.read_text()
    assert text == public_names.generated(text), "run python -m tests.public_names"


SMOKE = """
import sys
sys.path.extend(sys.argv[1].split(","))
import socket
def refuse(*arguments, **options):
    raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
import fastlogits, fastlogits_kernels
for module in (fastlogits, fastlogits_kernels):
    assert module.__file__.startswith(sys.prefix), module.__file__
for name in fastlogits.__all__:
    getattr(fastlogits, name)
import torch
processors = fastlogits.LogitsProcessorList([fastlogits.TemperatureLogitsWarper(0.5), fastlogits.TopKLogitsWarper(1)])
print(processors(torch.tensor([[1]]), torch.tensor([[1.0, 2.0]])).tolist())
"""


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The wheel and the sdist, built from a copy of what the repository holds."""
    folder = tmp_path_factory.mktemp("distributions")
    source = folder / "source"
    for part in ("fastlogits", "kernels"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source / part)
    # The backend in an environment of its own, as an installer calls it: here it is asked for both.
    python = folder / "backend" / "bin" / "python"
    venv.create(folder / "backend")
    installed = subprocess.run([*pip_of(python), "setuptools>=77"], capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"no package index for the build backend: {installed.stderr.strip()[-200:]}")
    build = "import setuptools.build_meta as b; b.build_sdist('..'); b.build_wheel('..')"
    built = subprocess.run([str(python), "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,), (sdist,) = folder.glob("fastlogits-*.whl"), folder.glob("fastlogits-*.tar.gz")
    return {"wheel": wheel, "sdist": sdist, "backend": folder / "backend"}


def test_wheel_holds_both_packages_their_types_and_the_licence(distributions):
    names = set(zipfile.ZipFile(distributions["wheel"]).namelist())
    assert {
        "fastlogits/__init__.py",
        "fastlogits/inspect/watch.html",
        "fastlogits/py.typed",
        "fastlogits/processors/masks.py",
        "fastlogits_kernels/pointwise/mask.py",
        "fastlogits_kernels/py.typed",
    } <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not any(name.startswith(("kernels/", "tests/", "benchmarks/")) for name in names)
    with tarfile.open(distributions["sdist"]) as sdist:
        assert any(name.count("/") == 1 and name.endswith("/LICENSE") for name in sdist.getnames())


def install(distributions, kind, *more: str) -> Path:
    """The Python of the build backend's environment, once it has what was built."""
    python = distributions["backend"] / "bin" / "python"
    command = [*pip_of(python), "--no-deps", "--no-build-isolation", *more, str(distributions[kind])]
    installed = subprocess.run(command, env=without_checkout(), capture_output=True, text=True, check=False)
    assert installed.returncode == 0, installed.stderr
    return python


def without_checkout() -> dict[str, str]:
    """The environment, without a path on which pip would find fastlogits installed already."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_the_sdist_installs_what_the_wheel_holds(distributions, tmp_path):
    """To the byte, so that what runs from one runs from the other."""
    install(distributions, "sdist", "--target", str(tmp_path))
    found = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    wheel = zipfile.ZipFile(distributions["wheel"])
    packages = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    assert packages
    assert {name: data for name, data in found.items() if name.startswith(("fastlogits/", "fastlogits_k"))} == packages


def test_installed_alone_it_runs_and_asks_no_network(distributions, tmp_path):
    python = install(distributions, "wheel")
    # torch and transformers are those of the tests, behind what was installed: the checkout is not on the path.
    there = ",".join(path for path in sys.path if path.endswith("site-packages"))
    done = subprocess.run(
        [str(python), "-c", SMOKE, there],
        cwd=tmp_path, env=without_checkout(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[-inf, 4.0]]"
