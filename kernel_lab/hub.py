"""The Triton kernels as a project for Hugging Face ``kernels``: ``python -m kernel_lab.hub FOLDER``.

Everything comes from ``fps_kernels/ops``, whose GPU side needs nothing but torch, Triton and the standard library. What is
written has two parts: the project that ``kernel-builder`` takes (``build.toml`` and ``torch-ext/``), and what it makes of
it (``build/torch-cuda`` and ``build/torch-rocm``), which ``kernels.get_local_kernel(FOLDER)`` loads as it is. Imports are
relative, since a kernel is loaded from anywhere, and ops are registered under a name made of the sources' checksum, since
two versions may be loaded in one process.
"""

import argparse
import hashlib
import json
import re
import shutil
from pathlib import Path

OPS = Path(__file__).parents[1] / "fps_kernels" / "ops"
NAME, VERSION = "fps-kernels", 1
BACKENDS = ("cuda", "rocm")
_ABSOLUTE = re.compile(r"^(\s*)from fps_kernels\.ops(?:\.([\w.]+))? import ", re.MULTILINE)

_BUILD = f"""[general]
name = "{NAME}"
version = {VERSION}
license = "apache-2.0"
backends = [{", ".join(f'"{name}"' for name in BACKENDS)}]

[torch-noarch]
"""

# What the rule in _dispatch.py asks on a CPU.
_NATIVE = '''"""The kernels for CPUs are C++, and not part of this package."""


def unavailable_reason() -> str:
    """Why they cannot run."""
    return "this package has the kernels for GPUs alone; pip install fps-kernels-torch brings those for CPUs"
'''

_CARD = """---
license: apache-2.0
tags: [kernels]
---

Triton kernels of fps_kernels: column norms of activations, top-k and other choices by |W| · activation without a score
matrix, gradients at chosen entries, a masked AdamW, packing in 8 bits.

```python
from kernels import get_kernel

ops = get_kernel("{name}")
columns = ops.score_topk(W, activation, 4)  # the four columns of each row with the largest |W| * activation
```
"""


def sources() -> dict[str, str]:
    """The files of the package by their paths in it, as they are here."""
    files = [path for path in sorted(OPS.rglob("*.py")) if not path.name.startswith("native")]
    return {str(path.relative_to(OPS)): path.read_text(encoding="utf-8") for path in files}


def package() -> dict[str, str]:
    """The same with relative imports and a namespace of its own, and with what stands for the C++ kernels.

    Raises:
        ValueError: a file that imports from somewhere else in this project.
    """
    found = sources()
    digest = hashlib.sha256("".join(f"{name}\n{text}" for name, text in found.items()).encode()).hexdigest()[:12]
    made = {"native.py": _NATIVE}
    for name, text in found.items():
        dots = "." * (name.count("/") + 1)
        relative = _ABSOLUTE.sub(rf"\1from {dots}\2 import ", text)
        made[name] = relative.replace("fps_kernels::", f"fps_kernels_{digest}::")
        if left := re.search(r"^\s*(?:from|import) fps_kernels\b.*", made[name], re.MULTILINE):
            raise ValueError(f"fps_kernels/ops/{name} imports from outside of the ops: {left[0].strip()}")
    return made


def write(folder: Path) -> None:
    """Write the project, in place of what was there of it.

    Raises:
        ValueError: the folder holds something else.
    """
    ours = {"build.toml", "README.md", "torch-ext", "build"}
    if folder.exists() and (others := {path.name for path in folder.iterdir()} - ours):
        raise ValueError(f"{folder} holds {sorted(others)[0]}, which is no part of it: give another folder")
    files = package()
    places: dict[Path, str | None] = {folder / "torch-ext" / NAME.replace("-", "_"): None}
    places |= {folder / "build" / f"torch-{backend}": backend for backend in BACKENDS}
    for name in ("torch-ext", "build"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for place, backend in places.items():
        for name, text in files.items():
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        if backend is not None:
            (place / "metadata.json").write_text(json.dumps(_metadata(files, backend), indent=1) + "\n", encoding="utf-8")
    (folder / "build.toml").write_text(_BUILD, encoding="utf-8")
    (folder / "README.md").write_text(_CARD.format(name=NAME), encoding="utf-8")


def _metadata(files: dict[str, str], backend: str) -> dict[str, object]:
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
    return {
        "id": f"_{NAME.replace('-', '_')}_{backend}_{digest}",
        "name": NAME,
        "version": VERSION,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }


def main(arguments: list[str] | None = None) -> None:
    """Write it."""
    parser = argparse.ArgumentParser(prog="python -m kernel_lab.hub", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    write(folder)
    print(f"written: {folder}")


if __name__ == "__main__":
    main()
