"""What ``MaskedAdamW`` and ``masked_parameters`` take and refuse; what is refused changes nothing."""

import copy

import pytest
import torch
from torch import nn

import fps_kernels as fps
from tests.support.models import Classifier, images, labelled
from tests.support.training import RATES, copy_of, loss_of, selected, train


def test_state_of_another_selection_is_refused():
    model = Classifier()
    a, b = (
        fps.MaskedAdamW(fps.masked_parameters(model, fps.select(model, [images()], scorer=fps.Random(seed))))
        for seed in (1, 2)
    )
    train(model, a, [labelled()])
    with pytest.raises(ValueError, match="state is of another selection"):
        b.load_state_dict(a.state_dict())
    assert not b.state


def test_a_damaged_state_is_refused_before_anything_is_loaded():
    model = Classifier()
    optimizer = fps.MaskedAdamW(fps.masked_parameters(model, selected(model)), **RATES)
    train(model, optimizer, [labelled()])
    kept = {p: {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()}

    def damaged(change):
        state = copy.deepcopy(optimizer.state_dict())
        change(state["state"][2])
        return state

    for state, match in (
        (damaged(lambda s: s.pop("exp_avg_sq")), "state of parameter 2 lacks exp_avg_sq"),
        (damaged(lambda s: s.update(exp_avg=torch.zeros(3))), r"parameter 2: exp_avg has shape \[3\], expected"),
        (torch.optim.AdamW(model.parameters()).state_dict(), "state is of another optimizer"),
    ):
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(state)
    for p, state in kept.items():
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in state.items())


def test_a_failed_group_changes_nothing():
    model = Classifier()
    groups = fps.masked_parameters(model, {"hidden.weight": torch.eye(20, 12).bool()})
    optimizer = fps.MaskedAdamW(groups, **RATES)
    before = optimizer.selections()
    other = model.out.weight
    for group, error, match in (
        ({"params": [other, model.hidden.weight]}, ValueError, "more than one parameter group"),
        ({"params": [other, other]}, ValueError, r"params\[1\] appears twice in its group"),
        ({"params": [other, 3]}, TypeError, r"params\[1\] must be a tensor, got int"),
        ({"params": {other}}, TypeError, "give a list instead of a set"),
        ({"params": [other * 2]}, ValueError, "non-leaf"),
        ({"params": [other], "selections": []}, ValueError, "selections must have one item per parameter, got 0 for 1"),
        ({"params": [other], "names": ["a", "b"]}, ValueError, "names must have one item per parameter, got 2 for 1"),
        (
            {"params": [other], "selections": [torch.eye(2)]},
            TypeError,
            r"selection of params\[0\] must be a WeightSelection",
        ),
        ({"params": [other], "lr": "fast"}, TypeError, "lr must be a number or a tensor, got 'fast'"),
        ({"params": [other], "betas": (0.9,)}, TypeError, r"betas must be two numbers, got \(0.9,\)"),
        ({"params": [nn.Parameter(torch.randn(1, 3).expand(4, 3))]}, ValueError, "is an expanded tensor"),
        (
            {"params": [nn.Parameter(torch.randn(4, 6, 3, 3)[:, ::2])]},
            ValueError,
            r"params\[0\]: strides .* make it contiguous",
        ),
    ):
        with pytest.raises(error, match=match):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
        assert optimizer.selections() == before


def test_parameters_put_in_by_hand_are_refused():
    model = Classifier()
    optimizer = fps.MaskedAdamW([model.hidden.weight])
    optimizer.param_groups[0]["params"].append(model.out.weight)
    before = copy_of(model)
    loss_of(model, labelled()).backward()
    with pytest.raises(ValueError, match=r"a parameter of shape \[12, 20\] is new: add it with add_param_group"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_named_parameters():
    model, twin = Classifier(), Classifier()
    twin.load_state_dict(model.state_dict())
    batch = labelled()
    train(model, fps.MaskedAdamW(model.named_parameters(), **RATES), [batch])
    train(twin, fps.MaskedAdamW(twin.parameters(), **RATES), [batch])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    with pytest.raises(TypeError, match="big.weight cannot be tuned"):
        fps.MaskedAdamW(nn.ModuleDict({"big": nn.Linear(2, 2).double()}).named_parameters())


def test_tied_weights_by_either_name():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    mask = torch.eye(3).bool()
    (group,) = fps.masked_parameters(model, {"b.weight": mask})
    assert group["params"][0] is model["a"].weight
    with pytest.raises(ValueError, match=r"a.weight and b.weight are one parameter: name it once"):
        fps.masked_parameters(model, {"a.weight": mask, "b.weight": mask})


def test_bad_input():
    model = Classifier()
    selection = selected(model)
    groups = fps.masked_parameters(model, selection)
    for kwargs, match in (
        ({"lr": -1.0}, "lr must not be negative"),
        ({"lr": float("nan")}, "lr must not be negative"),
        ({"betas": (1.0, 0.9)}, r"betas must lie in \[0, 1\)"),
        ({"eps": -1e-8}, "eps must not be negative"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
    ):
        with pytest.raises(ValueError, match=match):
            fps.MaskedAdamW(groups, **kwargs)
    with pytest.raises(ValueError, match="another model: this one has no parameter"):
        fps.masked_parameters(nn.Linear(3, 3), selection)
    with pytest.raises(ValueError, match="the selection is empty"):
        fps.masked_parameters(model, {})
    with pytest.raises(ValueError, match="embed.weight is selected but does not require gradients"):
        frozen = Classifier()
        frozen.embed.requires_grad_(False)
        fps.masked_parameters(frozen, selection)
    with pytest.raises(TypeError, match=r"params\[0\] cannot be tuned: its dtype is torch.float64"):
        fps.MaskedAdamW([nn.Parameter(torch.ones(2, dtype=torch.float64))])
    with pytest.raises(ValueError, match=r"has shape \[20, 12\], its selection is for \[12, 20\]"):
        fps.MaskedAdamW([{"params": [model.hidden.weight], "selections": [selection["out.weight"]]}])
    with pytest.raises(ValueError, match="sparse"):
        embedding = nn.Embedding(4, 3, sparse=True)
        optimizer = fps.MaskedAdamW(embedding.parameters())
        embedding(torch.tensor([1])).sum().backward()
        optimizer.step()


def test_a_state_from_before_there_were_all_options():
    model = Classifier()
    selection = selected(model)
    optimizer = fps.MaskedAdamW(fps.masked_parameters(model, selection), **RATES)
    train(model, optimizer, [labelled()])
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["maximize"], group["capturable"]
    for of_one in state["state"].values():
        of_one["step"] = float(of_one["step"])
    twin = copy.deepcopy(model)
    loaded = fps.MaskedAdamW(fps.masked_parameters(twin, selection), **RATES)
    loaded.load_state_dict(state)
    assert all(group["maximize"] is False and group["capturable"] is False for group in loaded.param_groups)
    batch = labelled()
    for one, own in ((model, optimizer), (twin, loaded)):
        train(one, own, [batch])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_betas_are_numbers_or_tensors():
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="betas must be two numbers or two tensors, got one of each"):
        fps.MaskedAdamW([p], betas=(torch.tensor(0.9), 0.999))
    with pytest.raises(ValueError, match=r"betas\[1\] must hold one number, got shape \[2\]"):
        fps.MaskedAdamW([p], betas=(torch.tensor(0.9), torch.tensor([0.9, 0.9])))
    q = nn.Parameter(torch.ones(3))
    tensors = fps.MaskedAdamW([p], betas=(torch.tensor(0.8), torch.tensor(0.9)))
    numbers = fps.MaskedAdamW([q], betas=(0.800000011920929, 0.8999999761581421))
    for _ in range(3):
        for one, optimizer in ((p, tensors), (q, numbers)):
            one.grad = torch.tensor([1.0, 2.0, 3.0])
            optimizer.step()
    assert torch.equal(p, q)


def test_it_says_what_it_is_told_and_no_checksums():
    model = torch.nn.Linear(4, 3)
    tuner = fps.attach(model, {"weight": torch.eye(3, 4, dtype=torch.bool)})
    said = repr(fps.MaskedAdamW(tuner, lr=0.5))
    assert said.startswith("MaskedAdamW (\nParameter Group 0\n")
    assert "    lr: 0.5\n" in said
    assert "checksum" not in said
