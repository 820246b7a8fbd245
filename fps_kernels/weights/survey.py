"""What there is to know of a model's parameters, found in one walk and handed on."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fps_kernels.weights.kinds import KINDS
from fps_kernels.weights.matrix import is_simulated, unfit
from fps_kernels.weights.offloading import is_offloaded
from fps_kernels.weights.shards import Shard, is_fully_sharded, unsharded_parameters


@dataclass(frozen=True)
class Survey:
    """A model's parameters: what they are called, who owns them, and which of them are weights.

    It says how things stood when it was made: make a new one after parameters were replaced.

    Attributes:
        model: the model.
        modules: its modules by path, shared ones by each of their paths.
        parameters: its parameters by name, tied ones by each of their names.

    Example:
        >>> survey = Survey.of(model)
        >>> survey.matrices.keys(), survey.tied
    """

    model: nn.Module
    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]

    @classmethod
    def of(cls, model: "nn.Module | Survey") -> "Survey":
        """Look at a model; who did so before is given that back."""
        if isinstance(model, Survey):
            return model
        modules: dict[str, nn.Module] = {}
        parameters: dict[str, nn.Parameter] = {}
        kinds: dict[type[nn.Module], bool] = {}
        # As named_modules() and named_parameters() do, without a generator for each level above a module.
        left = [("", model)]
        while left:
            path, module = left.pop()
            if (kind := type(module)) not in kinds:
                kinds[kind] = is_fully_sharded(kind)
                if _has_names_of_its_own(kind):
                    for m in model.modules():
                        _reshard(m)
                    modules = dict(model.named_modules(remove_duplicate=False))
                    return cls(model, modules, dict(model.named_parameters(remove_duplicate=False)))
            if kinds[kind]:
                _reshard(module)
            modules[path] = module
            prefix = f"{path}." if path else ""
            for leaf, p in module._parameters.items():
                if p is not None:
                    parameters[prefix + leaf] = p
            if children := module._modules:
                left += [(prefix + name, child) for name, child in reversed(children.items()) if child is not None]
        return cls(model, modules, parameters)

    @cached_property
    def first_names(self) -> dict[nn.Parameter, str]:
        """The first name of every parameter."""
        found: dict[nn.Parameter, str] = {}
        for name, p in self.parameters.items():
            found.setdefault(p, name)
        return found

    @cached_property
    def tied(self) -> dict[str, str]:
        """The first name of every shared parameter, by its other names."""
        if len({id(p) for p in self.parameters.values()}) == len(self.parameters):
            return {}
        return {name: first for name, p in self.parameters.items() if (first := self.first_names[p]) != name}

    @cached_property
    def matrices(self) -> dict[str, nn.Parameter]:
        """Every parameter with two or more dimensions, by its first name."""
        matrices = {name: p for name, p in self.parameters.items() if p.dim() >= 2}
        return {name: p for name, p in matrices.items() if name not in self.tied} if self.tied else matrices

    def owner(self, name: str) -> tuple[nn.Module, str]:
        """The module that holds a parameter, and the parameter's name in it."""
        path, _, leaf = name.rpartition(".")
        return self.modules[path], leaf

    @cached_property
    def offloaded(self) -> dict[str, tuple[nn.Module, str]]:
        """Owners of the parameters that accelerate brings in when their module runs, by name."""
        return {
            name: owner for name, p in self.parameters.items() if p.is_meta and is_offloaded((owner := self.owner(name))[0])
        }

    @cached_property
    def sharded(self) -> dict[str, Shard]:
        """The pieces of the parameters that ``fully_shard`` has cut over processes, by name.

        Raises:
            ValueError: one that is cut in another way as well.
        """
        if not any(is_fully_sharded(kind) for kind in {type(module) for module in self.modules.values()}):
            return {}
        return {
            name: Shard.of(name, *self.owner(name), p) for name, p in self.parameters.items() if hasattr(p, "device_mesh")
        }

    @cached_property
    def multiplied(self) -> dict[str, nn.Parameter]:
        """The parameters that modules multiply by, by name; of sharded ones those that stand in while a module runs. All
        processes have to ask for these."""
        return {**self.parameters, **unsharded_parameters(self.modules.values(), self.sharded)}

    @cached_property
    def scripted(self) -> frozenset[str]:
        """Names of the parameters of TorchScript modules, whose multiplications nobody sees."""
        paths = [path for path, module in self.modules.items() if isinstance(module, torch.jit.ScriptModule)]
        prefixes = tuple(f"{path}." if path else "" for path in paths)
        return frozenset(name for name in self.parameters if name.startswith(prefixes))

    @property
    def device(self) -> torch.device:
        """The device of the first parameter that is there, where inputs go."""
        first = next((p for p in self.parameters.values() if not p.is_meta), None)
        return first.device if first is not None else torch.device("cpu")

    def check_has_values(self) -> None:
        """Refuse models whose parameters have no shape yet, or lie on the meta device and are not brought in when needed.

        Raises:
            ValueError: with the first such parameter's name.
        """
        for name, p in self.parameters.items():
            if type(p) is nn.Parameter and not p.is_meta:  # what nearly all are
                continue
            if isinstance(p, nn.parameter.UninitializedParameter):
                raise ValueError(f"{name} has no shape yet: run the model once, so that its lazy modules are initialised")
            if p.is_meta and not is_simulated(p) and name not in self.offloaded:
                raise ValueError(f"{name} is on the meta device and has no values: load the weights first")

    def reason_unused(self, name: str, parameter: Tensor, other_uses: Mapping[str, str]) -> str:
        """Why a weight was not seen to multiply anything.

        Args:
            name: of the weight.
            parameter: the weight.
            other_uses: where else weights went in the forward pass, by name.
        """
        if reason := unfit(self.sharded[name].local if name in self.sharded else parameter):
            return reason
        if name in other_uses:
            return f"it reached {other_uses[name]}, and was never the weight of {_MULTIPLYING}"
        if name in self.scripted:
            return "it belongs to a TorchScript module, which hides its multiplications: use the module it was made from"
        return "it was never used in the forward pass"


def _has_names_of_its_own(kind: type[nn.Module]) -> bool:
    own = kind.named_modules is nn.Module.named_modules and kind.named_parameters is nn.Module.named_parameters
    return not own or issubclass(kind, torch.jit.ScriptModule)


def _reshard(module: Any) -> None:
    """The root of a sharded model keeps its parameters whole between a forward pass and a backward pass."""
    if is_fully_sharded(type(module)):
        module.reshard()


def _enumerated(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]])


_MULTIPLYING = _enumerated([kind.NAME for kind in KINDS if kind.SCORED])


def is_compact(parameter: Tensor) -> bool:
    """Whether a parameter holds the chosen values of an attached weight: it is no parameter of the model itself then."""
    return hasattr(parameter, "selected_entries") or hasattr(parameter, "added_entries")
