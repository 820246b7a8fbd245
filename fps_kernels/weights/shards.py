"""Parameters that ``fully_shard`` has cut over processes: the piece of each that lies here, and where the others begin.

Outside of a forward or backward pass such a model holds DTensors, of which each process has a part along one dimension.
While a module runs they are replaced by whole parameters, always the same ones, whose memory comes and goes: it is these
that the module multiplies by.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fps_kernels.weights.matrix import MatrixLayout

_WHOLE = frozenset((Tensor, nn.Parameter))


class Piece(NamedTuple):
    """What one process has of a weight.

    Attributes:
        layout: how the piece is read as a matrix.
        rows: the half-open range of the weight's rows that it is of.
        columns: and of its columns; one of the two are all.
    """

    layout: MatrixLayout
    rows: tuple[int, int]
    columns: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Shard:
    """A parameter that ``fully_shard`` has cut.

    Attributes:
        name: of the parameter.
        owner: the module that has it.
        leaf: its name there.
        parameter: the DTensor.
        dim: the dimension along which it is cut.
        bounds: for each process of ``group`` the half-open range of that dimension that it has.
        rank: of this process in ``group``.
        group: the processes that have the other pieces.
        replicas: the processes that have the same piece (hybrid sharding), ``None`` if there are none.
    """

    name: str
    owner: nn.Module
    leaf: str
    parameter: Any  # a DTensor and an nn.Parameter
    dim: int
    bounds: tuple[tuple[int, int], ...]
    rank: int
    group: Any
    replicas: Any

    @classmethod
    def of(cls, name: str, owner: nn.Module, leaf: str, parameter: Any) -> "Shard":
        """What there is to know of a DTensor.

        Raises:
            ValueError: it is cut in another way than ``fully_shard`` does.
        """
        placements, mesh = parameter.placements, parameter.device_mesh
        cut = [i for i, placement in enumerate(placements) if type(placement).__name__ == "Shard"]
        if len(cut) != 1 or any(not p.is_replicate() for i, p in enumerate(placements) if i != cut[0]) or mesh.ndim > 2:
            raise ValueError(
                f"{name} is placed as {tuple(placements)}: only what fully_shard alone has cut is served, over one "
                "dimension of a mesh, or two for hybrid sharding"
            )
        (along,) = cut
        size, dim = mesh.size(along), placements[along].dim
        entries = parameter.shape[dim]
        each = -(-entries // size)  # as torch.chunk does
        bounds = tuple((min(i * each, entries), min((i + 1) * each, entries)) for i in range(size))
        replicas = mesh.get_group(1 - along) if mesh.ndim == 2 else None
        return cls(name, owner, leaf, parameter, dim, bounds, mesh.get_local_rank(along), mesh.get_group(along), replicas)

    @property
    def local(self) -> Tensor:
        """The piece itself, as a plain tensor that shares its memory."""
        held = local_part(self.parameter)
        first, last = self.bounds[self.rank]
        shape = list(self.parameter.shape)
        shape[self.dim] = last - first
        return held.detach().view(shape)

    @property
    def device(self) -> torch.device:
        """Where processes exchange tensors: that of the mesh, also where pieces are kept in main memory."""
        kind: str = self.parameter.device_mesh.device_type
        return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())

    def piece(self, layout: MatrixLayout, rank: int | None = None) -> Piece:
        """What a process has of the weight's matrix; this process, if none is named.

        Raises:
            ValueError: its rows and columns are cut in pieces that are no ranges of either.
        """
        first, last = self.bounds[self.rank if rank is None else rank]
        shape = list(layout.parameter_shape)
        rows, columns = layout.shape
        if layout.blocks == 1 and self.dim == layout.row_dims[0]:
            step = rows // max(shape[self.dim], 1)
            ranges = (first * step, last * step), (0, columns)
        elif layout.blocks == 1 and layout.column_dims and self.dim == layout.column_dims[0]:
            step = columns // max(shape[self.dim], 1)
            ranges = (0, rows), (first * step, last * step)
        else:
            raise ValueError(
                f"{self.name} is cut along dimension {self.dim}, which divides neither its rows nor its columns"
            )
        shape[self.dim] = last - first
        return Piece(MatrixLayout(tuple(shape), layout.row_dims), *ranges)


def is_fully_sharded(kind: type[nn.Module]) -> bool:
    """Whether modules of a class were made by ``fully_shard``."""
    return any(base.__name__ == "FSDPModule" and base.__module__.startswith("torch.") for base in kind.__mro__)


def unsharded_parameters(modules: Iterable[nn.Module], shards: Mapping[str, Shard]) -> dict[str, nn.Parameter]:
    """The parameters that modules multiply by while they run, by the names of their shards. All processes have to ask: each
    weight is gathered once.

    Raises:
        ValueError: one that no module brings in, or that is no plain parameter then.
    """
    found: dict[str, nn.Parameter] = {}
    module: Any
    for module in dict.fromkeys(modules):
        if is_fully_sharded(type(module)):
            module.unshard()
            try:
                for name, shard in shards.items():
                    p = shard.owner._parameters[shard.leaf]
                    if p is not None and p is not shard.parameter:
                        found[name] = p
            finally:
                module.reshard()
    for name in shards:
        if name not in found:
            raise ValueError(f"{name} is a DTensor that fully_shard does not gather: apply fully_shard to the whole model")
        if hasattr(found[name], "device_mesh"):
            raise ValueError(f"{name} is cut by tensor parallelism as well, which is not served")
    return found


def local_part(tensor: Tensor) -> Tensor:
    """What lies here of a tensor: all, but for a DTensor."""
    if type(tensor) in _WHOLE:
        return tensor
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


class GradientRules(NamedTuple):
    """What modules of a sharded model were told of their gradients.

    Attributes:
        reduce: whether a backward pass adds them up over processes.
        divisors: of the sums, for each module; ``None`` for the number of processes.
    """

    reduce: bool
    divisors: list[float | None]


def gradient_rules(modules: Iterable[nn.Module]) -> GradientRules:
    """What ``set_requires_gradient_sync`` and ``set_gradient_divide_factor`` said.

    Args:
        modules: that ``fully_shard`` was applied to.

    Raises:
        RuntimeError: some of them add up gradients now and others do not, or sums of replicas are held back.
    """
    divisors, reducing = [], set()
    module: Any
    for module in modules:
        state = module._get_fsdp_state()
        groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
        group = next(group for group in groups if group is not None)
        divisors.append(group.gradient_divide_factor)
        reducing |= {group.reduce_grads, group.all_reduce_grads}
    if len(reducing) != 1:
        raise RuntimeError(
            "parts of the sharded model add up their gradients and others do not: call set_requires_gradient_sync of the "
            "whole model"
        )
    return GradientRules(reducing.pop(), divisors)


def gatherer_of(name: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The module that brings in a sharded parameter: the innermost one around it that ``fully_shard`` was applied to.

    Raises:
        ValueError: there is none.
    """
    path = name
    while path:
        path = path.rpartition(".")[0]
        if is_fully_sharded(type(modules[path])):
            return modules[path]
    raise ValueError(f"{name} is a DTensor that fully_shard does not gather: apply fully_shard to the whole model")
