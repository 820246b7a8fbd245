"""The documentation: every Python block runs, every command exists, and the site builds without a warning."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import fps_kernels as fps
from tests.docs.test_readme import commands_in, unknown_options

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(DOCS)): page for page in sorted(DOCS.rglob("*.md"))}
WITH_CODE = [name for name, page in PAGES.items() if "```python\n" in page.read_text()]


def small_model(*_: object, num_classes: int = 10, **__: object) -> torch.nn.Module:
    """What the pages get when they ask timm for a pretrained model."""
    made = timm.models.VisionTransformer(
        img_size=32, patch_size=8, num_classes=num_classes, embed_dim=32, depth=2, num_heads=2, global_pool="avg"
    )
    made.pretrained_cfg = {"input_size": (3, 32, 32)}
    return made


@pytest.mark.parametrize("name", WITH_CODE)
def test_code(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Planning needs the real name, whose model is never allocated.
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: small_model(*a, **k) if "pretrained" in k else real(*a, **k))
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    for label in range(2):  # the folder that pages read images from
        folder = tmp_path / "images" / "train" / str(label)
        folder.mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (40, 36), (60 * label, 10 * i, 90)).save(folder / f"{i}.png")
    scope = {"fps": fps, "model": small_model(), "loader": loader, "__name__": "__main__"}
    blocks = re.findall(r"```python\n(.*?)```", PAGES[name].read_text(), re.DOTALL)
    for number, block in enumerate(blocks):
        exec(compile(block, f"{name}, block {number}", "exec"), scope)


@pytest.mark.parametrize("name", list(PAGES))
def test_commands_exist(name):
    for command in commands_in(PAGES[name].read_text()):
        assert not unknown_options(command), command


def test_the_site_builds(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "site" / "api" / "index.html").read_text()
    assert not re.search(r":(class|func|meth|attr|data|mod|exc):", page)
    for public in (name for name in fps.__all__ if name not in ("gps", "memory")):
        assert f"fps_kernels.{public}" in page, public


def test_paths_that_are_named_exist():
    """In guides, workflows and settings: files move, and what names them is forgotten."""
    named = re.compile(r"(?<![\w/.-])(?:fps_kernels|benchmarks|kernel_lab|tests|csrc|docs)/[\w./-]*\w")
    made = ("benchmarks/results/", "docs/plots/", "fps_kernels/libfps_kernels.so")  # by commands, or by the build
    guides = [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.yaml"), ROOT / "Makefile", *DOCS.rglob("*.md")]
    for page in [*guides, *(ROOT / ".github").rglob("*.*")]:
        for path in set(named.findall(page.read_text())):
            assert path.startswith(made) or (ROOT / path).exists(), f"{page.relative_to(ROOT)} names {path}"
