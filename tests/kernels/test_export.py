"""The kernels as a kernel of the Hub: what is written, and that it runs without fastlogits anywhere."""

import json
import os
import re
import subprocess
import sys

import pytest
from fastlogits_kernels.export import MODULE, export

# Loads a variant as the kernels package does: under a name of its own, from a path that nothing else knows.
LOAD = """
import importlib.util, json, sys
from pathlib import Path
import torch

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fastlogits", "fastlogits_kernels"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
assert "fastlogits_kernels" not in sys.modules

def load(path):
    name = json.loads((path / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, getattr(torch.ops, name)
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-I", "-c", LOAD + code, *arguments]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    export(folder)
    return folder


def test_it_runs_without_fastlogits(exported):
    code = """
kernels, ops = load(Path(sys.argv[1]))
scores = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
kept = kernels.truncate(scores, (kernels.Rule("top_k", 2),))
assert kept.tolist() == [[-torch.inf, 3.0, 2.0, -torch.inf]]
bans = kernels.Bans(tokens=torch.tensor([1]))
for masked in (kernels.mask_tokens(kept, bans), ops.mask_tokens(kept, *bans)):
    assert masked.tolist() == [[-torch.inf, -torch.inf, 2.0, -torch.inf]]
compiled = torch.compile(lambda x: kernels.mask_tokens(x, bans) * 2, fullgraph=True, backend="aot_eager")
assert compiled(kept).tolist() == [[-torch.inf, -torch.inf, 4.0, -torch.inf]]
assert not hasattr(torch.ops.fastlogits, "mask_tokens")
print(kernels.__name__)
"""
    assert run(code, str(exported / "build" / "torch-universal")).startswith(f"_{MODULE}_")


def test_the_exported_kernel_runs_in_the_interpreter(exported, device):
    code = """
kernels, ops = load(Path(sys.argv[1]))
launch = sys.modules[kernels.__name__ + ".selection.launch"]
launch.FORCE_KERNEL = True
device = torch.device(sys.argv[2])
scores = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)).to(device)
rules = (kernels.Rule("top_k", 7), kernels.Rule("top_p", 0.8))
assert kernels.takes_scores(scores)
kept = kernels.select(scores, kernels.Selection(rules, 300, device))
print(torch.equal(kept, kernels.truncate(scores.cpu(), rules).to(device)))
"""
    environment = {} if device == "cuda" else {"TRITON_INTERPRET": "1"}
    assert run(code, str(exported / "build" / "torch-universal"), device, **environment) == "True"


def test_it_lives_beside_another_version_and_the_package(exported, tmp_path):
    other = tmp_path / "other"
    export(other)
    for path in (*other.rglob("_ops.py"), *other.rglob("metadata.json")):
        path.write_text(re.sub(rf"_{MODULE}_[0-9a-f]+", f"_{MODULE}_older", path.read_text()))
    code = """
sys.meta_path.pop(0)
sys.path.insert(0, sys.argv[3])
import fastlogits_kernels.truncate.dispatch as package
modules = [load(Path(path) / "build" / "torch-universal")[0] for path in sys.argv[1:3]]
scores = torch.tensor([[1.0, 3.0, 2.0]])
found = [module.truncate(scores, (module.Rule("top_k", 1),)).tolist() for module in (*modules, package)]
print(found[0] == found[1] == found[2], len({module.__name__ for module in modules}))
"""
    kernels = os.path.dirname(os.path.dirname(export.__code__.co_filename))
    assert run(code, str(exported), str(other), kernels) == "True 2"


def test_older_versions_of_kernels_find_a_folder_of_its_name(exported):
    code = f"""
sys.path.insert(0, sys.argv[1])
sys.meta_path.pop(0)
import {MODULE}
assert {MODULE}.__file__.startswith(sys.argv[1])
print({MODULE}.truncate(torch.tensor([[1.0, 2.0]]), ({MODULE}.Rule("top_k", 1),)).tolist())
"""
    assert run(code, str(exported / "build" / "torch-universal")) == "[[-inf, 2.0]]"


def sources_of(path):
    """The files below a folder by their paths, without the package that older versions of kernels look for."""
    found = {file.relative_to(path).as_posix(): file.read_text() for file in path.rglob("*.py")}
    return {name: text for name, text in found.items() if not name.startswith(MODULE)}


def test_what_is_written(exported):
    path = exported / "build" / "torch-universal"
    sources = sources_of(path)
    assert "selection/launch.py" in sources
    assert "export.py" not in sources
    for name, text in sources.items():
        assert not re.search(r"^\s*(from|import) fastlogits", text, re.MULTILINE), name
        assert "torch.ops.fastlogits" not in text.replace("``torch.ops.fastlogits``", ""), name
    metadata = json.loads((path / "metadata.json").read_text())
    assert set(metadata["digest"]["files"]) == {str(file.relative_to(path)) for file in path.rglob("*.py")}
    assert (metadata["name"], metadata["license"]) == ("fastlogits-kernels", "Apache-2.0")
    assert metadata["id"].isidentifier()
    for variant in ("torch-cuda", "torch-cpu"):
        assert sources_of(exported / "build" / variant) == sources
    torch_ext = exported / "torch-ext" / MODULE
    assert "_ops.py" not in sources_of(torch_ext)
    assert {*sources_of(torch_ext), "_ops.py"} == set(sources)


def test_the_namespace_is_that_of_the_sources(exported, tmp_path):
    assert export(tmp_path / "again") == json.loads((exported / "build/torch-cpu/metadata.json").read_text())["id"]
    assert export(tmp_path / "again") == export(exported)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty, and holds no earlier export"):
        export(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
