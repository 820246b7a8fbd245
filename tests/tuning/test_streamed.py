"""Tuning models whose weights stay in files, or lie elsewhere: what is tuned is that of the model in memory, bit for bit."""

import hashlib

import accelerate
import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fps_kernels as fps


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(24), nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(40, 24)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if torch.is_grad_enabled() else block(x)
        return self.head(x.mean(1))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6, 9, 40, generator=generator), torch.arange(6) % 5


@pytest.fixture
def whole() -> Model:
    torch.manual_seed(0)
    return Model()


def trained(model: nn.Module, selection: fps.Selection) -> fps.Tuner:
    tuner = fps.attach(model, selection, beside=True)
    optimizer = fps.MaskedAdamW(tuner, lr=1e-2)
    x, y = data()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return tuner


def same(tuner: fps.Tuner, other: fps.Tuner) -> None:
    for (name, p), q in zip(tuner.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.detach().abs().sum() > 0


def test_from_safetensors(whole, tmp_path):
    """With a head of its own, which is not in the file."""
    path = tmp_path / "model.safetensors"
    save_file({name: t for name, t in whole.state_dict().items() if not name.startswith("head")}, path)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    with init_empty_weights():
        model = Model()
    model.head = nn.Linear(24, 5)
    model.head.load_state_dict(whole.head.state_dict())
    x, _ = data()
    options = {"dense": "head.*", "progress": False}
    selection = fps.select(model, [x], **options, checkpoint=path)
    assert fps.select(whole, [x], **options).overlap(selection) == 1
    with fps.streamed(model, path):
        tuner = trained(model, selection)
        assert all(p.is_meta for p in model.blocks.parameters() if not hasattr(p, "added_entries"))
        same(tuner, trained(whole, selection))
        fps.save_delta(tuner, tmp_path / "task.safetensors")
        found = model(x).detach()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before

    delta = fps.load_delta(tmp_path / "task.safetensors")
    tensors = {**load_file(path), **{f"head.{name}": t for name, t in whole.head.state_dict().items()}}
    delta.write_into(tensors)
    torch.manual_seed(1)
    plain = Model()
    plain.load_state_dict(tensors)
    torch.testing.assert_close(plain(x), found)


@pytest.mark.parametrize("where", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_where_accelerate_keeps_weights(whole, tmp_path, where):
    x, _ = data()
    selection = fps.select(whole, [x], dense=[], progress=False)
    torch.manual_seed(0)
    model = Model()
    if where == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif where == "disk_offload":
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        places = {"stem": "cpu", "blocks.0": "cpu", "blocks.1": "disk", "blocks.2": "disk", "head": "cpu"}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    same(trained(model, selection), trained(whole, selection))


def test_what_is_refused(whole, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(whole.state_dict(), path)
    with init_empty_weights():
        model = Model()
    x, _ = data()
    selection = fps.select(model, [x], checkpoint=path, progress=False)
    with fps.streamed(model, path):
        with pytest.raises(ValueError, match="would be trained whole, and is brought in from elsewhere"):
            fps.attach(model, selection, beside=True)
        with pytest.raises(ValueError, match=r"has no values: tune beside it, attach\(..., beside=True\)"):
            fps.attach(model, fps.Selection(dict(selection.weights), ()))
    model.blocks[0].up.weight = nn.Parameter(torch.zeros(48, 24))
    with pytest.raises(ValueError, match=r"blocks.0.up.weight has values already"), fps.streamed(model, path):
        pass
