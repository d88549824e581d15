"""Export these kernels as a kernel of the Hugging Face Hub: ``python -m fastlogits_kernels.export DIR``.

What is written is a repository that the ``kernels`` package loads, from a folder or from the Hub:

    DIR/build/torch-universal/   the kernels, with relative imports and a namespace of operations of their own
    DIR/build/torch-cuda/        the same, for versions of ``kernels`` that want a backend's name
    DIR/build/torch-cpu/         the same: operations take their torch path
    DIR/torch-ext/, build.toml   the source that ``kernel-builder`` takes
    DIR/README.md                the card

The namespace holds a hash of the sources, so that any number of versions, and the installed package, live side by side.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

NAME = "fastlogits-kernels"
MODULE = NAME.replace("-", "_")
VERSION = 0
"""The Hub's convention for kernels whose interface may still change."""
_VARIANTS = {"torch-universal": "cuda", "torch-cuda": "cuda", "torch-cpu": "cpu"}
_SOURCE = Path(__file__).parent
_PUBLIC = {
    "runtime.bits": ("pack_bits", "unpack_bits", "words"),
    "draw": ("draw",),
    "pointwise.mask": ("Bans", "mask_tokens", "mask_tokens_"),
    "pointwise.pack_ids": ("pack_ids",),
    "selection.launch": ("Selection", "select", "select_tokens", "takes_rules", "takes_scores"),
    "rules": ("Rule",),
    "truncate.dispatch": ("truncate",),
}
"""What the exported package offers by its own name; the rest is in its modules."""

_CARD = f"""---
license: apache-2.0
tags: [kernel]
---
# {NAME}

Logits processors as a few Triton launches: token masks, folds of pointwise maps, truncations without a sort, and draws
whose noise depends on a request's seed, its position and the token alone. Each operation has a torch path for the CPU.

```python
from kernels import get_local_kernel

kernels = get_local_kernel(path)
kept = kernels.truncate(logits, (kernels.Rule("top_k", 50), kernels.Rule("top_p", 0.9)))
```

Exported from fastlogits, which has the processors of transformers on top of these. Python 3.10 and torch 2.6 or newer.
"""

_BUILD = f"""[general]
name = "{NAME}"
version = {VERSION}
license = "Apache-2.0"
backends = ["cuda", "cpu"]

[torch-noarch]
"""

_OPS = """import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name: str) -> str:
    \"\"\"The name of an operation with its namespace.\"\"\"
    return f"{namespace}::{{op_name}}"
"""

# As older versions of kernels look for it: a folder of the module's name, whose names are those of the variant.
_COMPATIBLE = f'''"""The same package, where older versions of kernels look for it."""

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).parents[1] / "__init__.py"
_name = f"{MODULE}_{{abs(hash(_path)):x}}"
_spec = importlib.util.spec_from_file_location(_name, _path)
_module = sys.modules[_name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
__all__ = _module.__all__
globals().update({{name: getattr(_module, name) for name in __all__}})
'''


def export(folder: Path) -> str:
    """Write the repository; what an earlier export left in the folder is replaced.

    Args:
        folder: where to; made if it isn't there.

    Returns:
        The namespace of the exported operations.

    Raises:
        ValueError: the folder holds something that no export has written.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "build.toml").exists():
        raise ValueError(f"{folder} is not empty, and holds no earlier export; name a new folder")
    files = _rewritten()
    contents = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    namespace = f"_{MODULE}_{contents[:12]}"
    for part in ("build", "torch-ext"):
        shutil.rmtree(folder / part, ignore_errors=True)
    _write(folder / "torch-ext" / MODULE, files)
    for variant, backend in _VARIANTS.items():
        path = folder / "build" / variant
        _write(path, {**files, "_ops.py": _OPS.format(namespace=namespace), f"{MODULE}/__init__.py": _COMPATIBLE})
        (path / "metadata.json").write_text(json.dumps(_metadata(path, namespace, backend), indent=2) + "\n")
    _write(folder, {"build.toml": _BUILD, "README.md": _CARD})
    return namespace


def _rewritten() -> dict[str, str]:
    """The sources by path, with relative imports, and operations in the namespace that ``_ops`` names."""
    paths = [path for path in sorted(_SOURCE.rglob("*.py")) if path != Path(__file__)]
    files = {}
    for path in paths:
        place = path.relative_to(_SOURCE)
        files[place.as_posix()] = _relative(path.read_text(), "." * len(place.parts))
    lines = [f"from .{module} import {', '.join(names)}" for module, names in _PUBLIC.items()]
    listed = sorted(name for names in _PUBLIC.values() for name in names)
    files["__init__.py"] += "\n" + "\n".join(lines) + f"\n\n__all__ = {listed!r}\n"
    return files


def _relative(source: str, root: str) -> str:
    """A source whose imports go by ``root``, the dots that lead from it to the package."""
    source = re.sub(
        r"^(\s*from )fastlogits_kernels\.?(\S*) import ", rf"\1{root}\2 import ", source, flags=re.MULTILINE
    )
    source = source.replace('NAMESPACE = "fastlogits"', "NAMESPACE = _hub_ops.name")
    found = source.replace("torch.ops.fastlogits.", "_hub_ops.")
    if "_hub_ops" in found:
        future = "from __future__ import annotations\n"
        found = found.replace(future, f"{future}\nfrom {root}_ops import ops as _hub_ops\n", 1)
    return found


def _metadata(path: Path, namespace: str, backend: str) -> dict[str, object]:
    digests = {
        str(file.relative_to(path)): base64.b64encode(hashlib.sha256(file.read_bytes()).digest()).decode()
        for file in sorted(path.rglob("*.py"))
    }
    return {
        "id": namespace,
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def main() -> None:
    """Export to the folder that the command line names."""
    parser = argparse.ArgumentParser("python -m fastlogits_kernels.export", description="Export a kernel for the Hub.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args().folder
    print(f"{folder}: {NAME}, operations in torch.ops.{export(folder)}")


if __name__ == "__main__":
    main()
