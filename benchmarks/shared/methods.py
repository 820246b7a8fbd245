"""Every way of tuning that the benchmarks compare, each as a model and an optimizer made for it."""

import copy
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fps_kernels as fps
from fps_kernels.selection import Selection

# Every linear map of a block of a ViT.
TARGETS = re.compile(r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])")


@dataclass
class Contestant:
    """A model that is ready to be tuned.

    Attributes:
        model: what is called.
        optimizer: of what is trained.
        before_step: called between the backward pass and the step.
        keeping: what the forward pass is run inside of.
        selection: the entries that are tuned, where there are any.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    before_step: Callable[[], object] = lambda: None
    keeping: AbstractContextManager[Any] = field(default_factory=nullcontext)
    selection: Selection | None = None

    def step(self, x: Tensor, y: Tensor) -> float:
        """One step of training."""
        self.optimizer.zero_grad()
        with self.keeping:
            loss = F.cross_entropy(self.model(x).float(), y)
        loss.backward()
        self.before_step()
        self.optimizer.step()
        return float(loss.detach())

    @property
    def trained(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])


def in_8_bits(contestant: Contestant) -> Contestant:
    """The same with what backward keeps in 8 bits."""
    contestant.keeping = fps.kept()
    return contestant


def _is_head(name: str) -> bool:
    return name.removeprefix("base_model.model.").startswith("head.")


def _adamw(model: nn.Module, lr: float, head_lr: float | None = None) -> torch.optim.Optimizer:
    """Over what requires gradients; the head, which starts from nothing, may learn at a rate of its own."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault(head_lr if head_lr is not None and _is_head(name) else lr, []).append(p)
    return torch.optim.AdamW(
        [{"params": params, "lr": rate} for rate, params in groups.items()], lr=lr, weight_decay=0.0, fused=True
    )


def full(model: nn.Module, lr: float = 1e-4, head_lr: float | None = None) -> Contestant:
    """Every parameter."""
    return Contestant(model, _adamw(model, lr, head_lr))


def head_only(model: nn.Module, lr: float = 1e-3) -> Contestant:
    """The classifier head."""
    for name, p in model.named_parameters():
        p.requires_grad_(_is_head(name))
    return Contestant(model, _adamw(model, lr))


def floor(model: nn.Module, lr: float = 1e-3) -> Contestant:
    """No method, but the least that reaches every layer: forward pass and gradients of the inputs, for one bias."""
    for name, p in model.named_parameters():
        p.requires_grad_(name == "patch_embed.proj.bias")
    return Contestant(model, _adamw(model, lr))


def biases_and_head(model: nn.Module, lr: float = 1e-3, head_lr: float | None = None) -> Contestant:
    """What selections train whole besides the chosen entries."""
    dense = fps.select(model, [torch.zeros(1, 3, *model.patch_embed.img_size)], scorer=fps.Random(0)).dense
    for name, p in model.named_parameters():
        p.requires_grad_(name in dense)
    return Contestant(model, _adamw(model, lr, head_lr))


def _with_peft(model: nn.Module, config: peft.PeftConfig, lr: float, head_lr: float | None) -> Contestant:
    wrapped = peft.get_peft_model(model, config)
    for name, p in wrapped.named_parameters():  # the biases, as the other methods have them
        if name.endswith(".bias") and TARGETS.search(name):
            p.requires_grad_(True)
    return Contestant(wrapped, _adamw(wrapped, lr, head_lr))


def _targets(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and TARGETS.fullmatch(name)]


def lora(model: nn.Module, rank: int = 8, lr: float = 1e-3, head_lr: float | None = None) -> Contestant:
    """LoRA (Hu et al., ICLR 2022) on every linear map of the blocks, as PEFT has it."""
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_targets(model), modules_to_save=["head"])
    return _with_peft(model, config, lr, head_lr)


def shira(model: nn.Module, rank: int, lr: float = 1e-3, head_lr: float | None = None, seed: int = 0) -> Contestant:
    """SHiRA (Bhardwaj et al., NeurIPS 2024) as PEFT has it: ``rank * (inputs + outputs)`` random entries a layer."""
    config = peft.ShiraConfig(r=rank, target_modules=_targets(model), modules_to_save=["head"], random_seed=seed)
    return _with_peft(model, config, lr, head_lr)


def supertuning(model: nn.Module, density: float, lr: float = 1e-3, head_lr: float | None = None) -> Contestant:
    """Super-Tuning (arXiv 2607.09287) as PEFT has it: the largest weights of every layer."""
    config = peft.SupertuningConfig(sparsity=1 - density, target_modules=_targets(model), modules_to_save=["head"])
    return _with_peft(model, config, lr, head_lr)


def masked_gradient(model: nn.Module, selection: Selection, lr: float = 1e-3) -> Contestant:
    """Dense gradients multiplied by dense masks, and a dense AdamW: how GPS and others train their choices."""
    masks = selection.masks()
    for name, p in model.named_parameters():
        p.requires_grad_(name in masks or name in selection.dense)
    named = dict(model.named_parameters())

    def mask() -> None:
        for name, entries in masks.items():
            named[name].grad.mul_(entries)

    return Contestant(model, _adamw(model, lr), mask)


def attached(
    model: nn.Module, selection: Selection, lr: float = 1e-3, head_lr: float | None = None, keep_bits: int | None = None
) -> Contestant:
    """This package."""
    tuner = fps.attach(model, selection, keep_bits=keep_bits)
    groups = tuner.param_groups(lambda name, _: {"lr": head_lr if head_lr is not None and _is_head(name) else lr})
    return Contestant(model, fps.MaskedAdamW(groups, lr=lr, weight_decay=0.0), selection=selection)


def in_bfloat16(model: nn.Module) -> nn.Module:
    """The model with bfloat16 weights, which takes images of any dtype."""
    model.to(torch.bfloat16).register_forward_pre_hook(lambda _, given: tuple(t.to(torch.bfloat16) for t in given))
    return model


def autocast(contestant: Contestant) -> Contestant:
    """The same with float32 weights that are multiplied in bfloat16."""
    contestant.keeping = torch.autocast("cpu", torch.bfloat16)
    return contestant


def weights(contestant: Contestant) -> dict[str, Tensor]:
    """The matrices of a tuned model under the names that the plain model has; a PEFT model is merged and spent."""
    model = contestant.model
    if isinstance(model, peft.PeftModel):
        model = model.merge_and_unload()
    return {name: p.detach() for name, p in model.named_parameters() if p.dim() > 1 and not _is_head(name)}


def budget_of_peft(selection: Selection) -> tuple[int, float]:
    """SHiRA's nearest rank and Super-Tuning's density for as many entries as a selection has in the blocks."""
    blocks = [w for name, w in selection.items() if name.startswith("blocks")]
    nnz = sum(w.nnz for w in blocks)
    rank = max(1, round(nnz / sum(sum(w.layout.shape) for w in blocks)))
    return rank, nnz / sum(w.layout.shape[0] * w.layout.shape[1] for w in blocks)


def fresh(model: nn.Module) -> nn.Module:
    """A copy to tune."""
    return copy.deepcopy(model)
