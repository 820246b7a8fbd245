"""Tuned weights for inference servers, in the forms that vLLM and TRL read. Neither is installed here: what they do with a
message is written down below as their sources have it."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fps_kernels as fps
from fps_kernels.deltas.weight_sync import WeightPatch, WeightReceiver, WeightSync, read_patches, write_patches


class Mixed(nn.Module):
    """Layouts of several kinds: linear, convolution, one that is used from the other side."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.lift = nn.ConvTranspose2d(6, 4, 2)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.lift(self.conv(x).relu()).mean((2, 3)))


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def tuned(request):
    torch.manual_seed(0)
    model = Mixed().to(request.param)
    x = torch.randn(4, 3, 8, 8, dtype=request.param)
    base = copy.deepcopy(model)
    selection = fps.select(model, [x], budget=fps.PerNeuron(2), progress=False)
    assert len(selection) == 2
    tuner = fps.attach(model, selection)
    optimizer = fps.MaskedAdamW(tuner, lr=0.1)

    def step():
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    yield model, tuner, base, step
    tuner.detach()


def as_vllm_does(model: nn.Module, patches: list[WeightPatch]) -> None:
    """``load_checkpoint_weight_patches``: flat values at flat indices of the checkpoint's tensor, or all of it."""
    parameters = dict(model.named_parameters())
    for patch in patches:
        assert patch.values.dtype == patch.dtype
        assert not patch.values.isnan().any()
        whole = parameters[patch.name].detach()
        assert tuple(whole.shape) == patch.shape
        if patch.indices is None:
            whole.copy_(patch.values.view(whole.shape))
            continue
        assert patch.indices.dtype == torch.int32
        assert bool((patch.indices.diff() > 0).all())
        masked = torch.full(patch.shape, float("nan"), dtype=patch.dtype).flatten()
        masked[patch.indices.long()] = patch.values
        masked = masked.view(patch.shape)
        whole.copy_(torch.where(masked.isnan(), whole, masked.to(whole.dtype)))


def as_trl_does(model: nn.Module, path) -> None:
    """``iter_sparse_patches`` and ``gap_delta_decode``."""
    tensors, parameters = load_file(path), dict(model.named_parameters())
    for name in sorted(k[: -len(".val")] for k in tensors if k.endswith(".val")):
        positions = torch.cumsum(tensors[f"{name}.idx"].long() + 1, dim=0) - 1
        parameters[name].detach().view(-1)[positions] = tensors[f"{name}.val"].to(parameters[name].dtype)


def assert_same(model: nn.Module, other: nn.Module, dtype: torch.dtype) -> None:
    for name, p in model.state_dict().items():
        q = other.state_dict()[name]
        changed = ~torch.isclose(p, q) if p.dtype == dtype else None
        if changed is not None:
            assert torch.equal(p, q), name
        else:
            torch.testing.assert_close(p, q, rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_server_has_what_the_tuner_has(tuned, dtype):
    model, tuner, server, step = tuned
    sync = WeightSync(tuner, dtype)
    first = sync.patches()
    as_vllm_does(server, first)
    assert_same(model, server, dtype)
    receiver = WeightReceiver(first)
    for _ in range(3):
        step()
        values = sync.values()
        assert values.nbytes == sync.bytes_each_time
        as_vllm_does(server, receiver.patches(values))
        assert_same(model, server, dtype)
    assert sync.bytes_each_time == dtype.itemsize * sum(p.numel() for p in tuner.parameters())
    assert sync.bytes_at_first == sum(p.values.nbytes + (0 if p.indices is None else p.indices.nbytes) for p in first)
    with pytest.raises(ValueError, match=r"3 values, but the first message was of \d+"):
        receiver.patches(values[:3])


def test_only_what_is_tuned_is_touched(tuned):
    model, tuner, server, _ = tuned
    before = copy.deepcopy(server.state_dict())
    for patch in WeightSync(tuner, torch.float32).patches():
        patch.apply_(server.get_parameter(patch.name))
    for name, weight in tuner.selection.items():
        frozen = ~weight.mask()
        assert torch.equal(server.state_dict()[name][frozen], before[name][frozen])
    for name, p in model.state_dict().items():
        assert torch.equal(p, server.state_dict()[name]), name


def test_trls_file(tuned, tmp_path):
    model, tuner, server, _ = tuned
    path = tmp_path / "patch.safetensors"
    size = write_patches(path, WeightSync(tuner).patches(), version=7)
    assert size == path.stat().st_size
    as_trl_does(server, path)
    assert_same(model, server, torch.bfloat16)
    held = load_file(path)
    assert {t.dtype for n, t in held.items() if n.endswith(".idx")} == {torch.uint16}
    other = copy.deepcopy(server)
    for patch in read_patches(path, dict(other.named_parameters())):
        patch.apply_(other.get_parameter(patch.name))
    assert_same(server, other, torch.float32)


def test_a_delta_tells_the_same(tuned, tmp_path):
    _, tuner, _, _ = tuned
    fps.save_delta(tuner, tmp_path / "d.safetensors")
    ours, theirs = WeightSync(tuner).patches(), WeightSync(fps.load_delta(tmp_path / "d.safetensors")).patches()
    assert [p.name for p in ours] == [p.name for p in theirs]
    assert all(torch.equal(a.values, b.values) for a, b in zip(ours, theirs, strict=True))


def test_large_gaps_take_32_bits(tmp_path):
    indices = torch.tensor([5, 5 + 2**16, 5 + 2**17], dtype=torch.int32)
    patch = WeightPatch("w", (2**18,), torch.bfloat16, torch.tensor([1.0, 2, 3], dtype=torch.bfloat16), indices)
    edge = WeightPatch(
        "v", (2**18,), torch.bfloat16, patch.values, torch.tensor([2**16 - 1, 2**17 - 1, 2**17], dtype=torch.int32)
    )
    none = WeightPatch("u", (4,), torch.bfloat16, torch.empty(0, dtype=torch.bfloat16), torch.empty(0, dtype=torch.int32))
    write_patches(tmp_path / "p", [patch, edge, none])
    held = load_file(tmp_path / "p")
    assert (held["w.idx"].dtype, held["v.idx"].dtype) == (torch.uint16, torch.uint16)
    far = WeightPatch("w", (2**18,), torch.bfloat16, patch.values, torch.tensor([0, 2**16 + 1, 2**17], dtype=torch.int32))
    write_patches(tmp_path / "q", [far])
    assert load_file(tmp_path / "q")["w.idx"].dtype == torch.uint32
    for file, patches in (("p", [none, edge, patch]), ("q", [far])):
        found = read_patches(tmp_path / file, {p.name: p.shape for p in patches})
        for a, b in zip(found, patches, strict=True):
            assert torch.equal(a.indices, b.indices)
            assert torch.equal(a.values, b.values)


def test_what_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    selection = fps.select(model, [torch.randn(2, 4)], progress=False)
    with fps.attach(model, selection, beside=True) as tuner, pytest.raises(ValueError, match="added beside frozen weights"):
        WeightSync(tuner)
    with pytest.raises(ValueError, match=r"w has shape \[2\], the patch is for \[3\]"):
        WeightPatch("w", (3,), torch.float32, torch.ones(3)).apply_(torch.ones(2))
    path = tmp_path / "p"
    save_file({"w.val": torch.ones(2, dtype=torch.bfloat16)}, path, {"encoding": "raw"})
    with pytest.raises(ValueError, match="positions in the encoding 'raw'; 'gap_delta' is read"):
        read_patches(path, {"w": (3,)})
    save_file({"w.val": torch.ones(2, dtype=torch.bfloat16)}, path, {"encoding": "gap_delta"})
    with pytest.raises(ValueError, match=r"w\.idx is missing or does not belong to w\.val"):
        read_patches(path, {"w": (3,)})
    write_patches(path, [WeightPatch("w", (9,), torch.bfloat16, torch.ones(1), torch.tensor([8], dtype=torch.int32))])
    with pytest.raises(ValueError, match=r"w has positions beyond its shape \[3\]"):
        read_patches(path, {"w": (3,)})
    with pytest.raises(ValueError, match="has values of w, which is not among the shapes"):
        read_patches(path, {})
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="no safetensors file, or damaged"):
        read_patches(path, {})


def test_tensors_that_are_not_contiguous():
    target = torch.zeros(3, 4).t()
    WeightPatch("w", (4, 3), torch.float32, torch.tensor([5.0]), torch.tensor([4], dtype=torch.int32)).apply_(target)
    assert target[1, 1] == 5
    assert target.sum() == 5
    WeightPatch("w", (4, 3), torch.float32, torch.arange(12.0)).apply_(target)
    assert torch.equal(target, torch.arange(12.0).view(4, 3))
