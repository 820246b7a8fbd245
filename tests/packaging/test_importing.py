"""Importing the package is cheap and safe."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_import_touches_no_gpu_and_no_optional_dependency():
    program = (
        "import sys, torch, fps_kernels;"
        "optional = ['timm', 'rich', 'typer', 'sklearn', 'torchvision', 'transformers', 'peft', 'triton', 'accelerate'];"
        "assert not torch.cuda.is_initialized();"
        "print([name for name in optional if name in sys.modules])"
    )
    baseline = "import sys, torch; print([n for n in ['triton', 'torchvision'] if n in sys.modules])"
    loaded, by_torch = (
        subprocess.run([sys.executable, "-c", p], capture_output=True, text=True, check=True).stdout.strip()
        for p in (program, baseline)
    )
    assert loaded == by_torch


def test_every_public_name_exists_and_is_documented():
    import fps_kernels as fps

    for name in fps.__all__:
        assert getattr(fps, name).__doc__, name


def test_names_are_found_when_they_are_asked_for():
    program = (
        "import sys, fps_kernels as fps\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(fps.__all__) <= set(dir(fps))\n"
        "assert fps.memory.format_bytes(2**20) == '1.0 MiB'\n"
        "from fps_kernels import select, gps, ops\n"
        "assert fps.select is select and gps.random_views and fps.ops is ops\n"
        "assert not hasattr(fps, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_what_type_checkers_see_is_what_is_imported():
    import fps_kernels as fps

    (block,) = (node for node in ast.parse(Path(fps.__file__).read_text()).body if isinstance(node, ast.If))
    told = {
        alias.name: node.module.removeprefix("fps_kernels").lstrip(".")
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    rooms = {name for name, module in told.items() if not module}
    assert rooms <= set(fps._ROOMS)
    places = {**fps._PLACES, "gps": "choosing"}  # a module beside a function
    assert {name: module for name, module in told.items() if module} == places
    assert sorted(told) == sorted(fps.__all__)
    folders = {path.parent.name for path in Path(fps.__file__).parent.glob("*/__init__.py")}
    assert set(fps._ROOMS) <= folders


def test_no_message_and_no_page_tells_to_install_extras_which_no_index_has():
    told = {
        match
        for folder in ("fps_kernels", "docs", ".")
        for path in (ROOT / folder).glob("*.md" if folder == "." else "**/*.*")
        if path.suffix in (".py", ".md")
        for match in re.findall(r"pip install '?([\w-]+)\[", path.read_text())
    }
    assert told == set()
