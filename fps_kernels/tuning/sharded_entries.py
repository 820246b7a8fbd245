"""Attached weights that ``fully_shard`` has cut: each process owns the values of its piece, and nobody a dense gradient.

A layer's node gives the gradient of all chosen entries, of this process's data. When the backward pass is over what all
processes found is added up in one exchange, and each keeps what belongs to its piece.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd import Variable
from torch.utils import _pytree as pytree

from fps_kernels.selection import WeightSelection
from fps_kernels.tuning.agreement import Seen
from fps_kernels.tuning.compact_values import SelectedEntries
from fps_kernels.weights.exchange import Division
from fps_kernels.weights.shards import Shard, gatherer_of, gradient_rules, local_part

# Its name before torch 2.14, and since.
_REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
_ALIGNED = 4  # float32 numbers of 16 bytes: each weight's part of an exchange begins at a multiple of them


class ShardedEntries(SelectedEntries):
    """The chosen entries of one weight of which this process has a piece.

    Attributes:
        values: a DTensor, float32 ``[world * longest]``: of each process the values of its piece, in CSR order, with zeros
            up to the longest.
        shard: the weight's.
        division: of all chosen entries, in CSR order.
        leaf: float32 ``[nnz]`` without memory: where autograd adds up the gradient of this process's data.
    """

    is_sharded = True
    leaf: Tensor

    def __init__(
        self,
        name: str,
        owner: nn.Module,
        weight: nn.Parameter,
        selection: WeightSelection,
        hold: Callable[[SelectedEntries], None],
        shard: Shard,
    ) -> None:
        pieces = [selection.within(shard.piece(selection.layout, rank)) for rank in range(len(shard.bounds))]
        self.shard = shard
        self.division = Division(shard, tuple(where for where, _ in pieces), selection.nnz)
        self._here = pieces[shard.rank][1].to(shard.local.device)
        longest = max(self.division.lengths())
        self.longest = max(1, -(-longest // _ALIGNED)) * _ALIGNED
        super().__init__(name, owner, weight, selection, hold)

    @property
    def here(self) -> WeightSelection:
        """The entries of the piece."""
        return self._here

    def memory(self) -> tuple[Tensor, Tensor, Tensor]:
        """The piece's memory as a matrix, with the CSR of the entries there."""
        view, columns = self._here.in_memory(self.shard.local)
        return view, self._here.row_offsets, columns

    def _held(self) -> Tensor:
        return self._here.of(self.shard.local)

    def _as_parameter(self, held: Tensor) -> nn.Parameter:
        padded = held.new_zeros(self.longest)
        padded[: held.numel()] = held
        return nn.Parameter(self.distributed(padded))

    def distributed(self, local: Tensor) -> Tensor:
        """A DTensor of what each process has, ``[longest]``."""
        from torch.distributed.tensor import DTensor, Replicate
        from torch.distributed.tensor import Shard as Placement

        of: Any = self.shard.parameter
        placements = [Replicate() if p.is_replicate() else Placement(0) for p in of.placements]
        made: Tensor = DTensor.from_local(local, of.device_mesh, placements, run_check=False)
        return made

    def _look(self) -> Seen:
        weight = self._place[0][2]
        if "leaf" not in self.__dict__:
            self.__dict__["leaf"] = torch.zeros(1, device=self.shard.device).expand(self.selection.nnz).requires_grad_()
        seen = Seen(self, self.values, weight)
        seen.values = self.leaf
        seen.numbers = local_part(self.values).detach()[: self._here.nnz]
        seen.stored = self.shard.local
        return seen

    def load(self, values: Tensor) -> None:
        """Take over this process's part of values ``[nnz]``."""
        super().load(self.division.own(values))

    def follow_shard(self) -> bool:
        """Look where the piece lies now: to convert a model gives its pieces other memory. Whether it had moved."""
        stored = self.shard.local
        if stored.data_ptr() == self.seen.stored.data_ptr() and stored.dtype == self.seen.stored.dtype:
            return False
        self.seen.stored = stored
        return True

    def _stands_in(self, found: Any) -> bool:
        return found is self.shard.parameter  # while the module does not run

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        numbers = self.seen.numbers
        if fn(numbers).device != numbers.device:
            raise RuntimeError(f"{self.name} is attached and sharded: move the model before it is sharded")
        self.settle()  # values stay float32
        return self


class GradientExchange:
    """One exchange of all compact gradients after every backward pass of a sharded model.

    It follows what the model was told by ``set_requires_gradient_sync`` and ``set_gradient_divide_factor``: as with other
    gradients of ``fully_shard`` they are means over the processes if it was told nothing. A gradient that a process has not
    is zero. All processes have to run as many backward passes.

    Args:
        model: what :func:`fps_kernels.attach` was given.
        entries: of its weights, in an order that all processes share.

    Attributes:
        bytes_sent: of the buffers handed to reduce-scatter so far.
    """

    def __init__(self, model: nn.Module, entries: Sequence[ShardedEntries]) -> None:
        self._entries = list(entries)
        modules = dict(model.named_modules(remove_duplicate=False))
        self._gatherers = [gatherer_of(e.name, modules) for e in entries]
        self._shard = entries[0].shard
        self._task = -1
        self.bytes_sent = 0
        self._lengths = [e.longest for e in entries]
        ranks, nothing = len(self._shard.bounds), sum(e.selection.nnz for e in entries)
        index = torch.full((ranks, sum(self._lengths)), nothing, dtype=torch.int64, device="cpu")
        at = before = 0
        for e in entries:
            every = torch.arange(before, before + e.selection.nnz, device="cpu")
            for rank, where in enumerate(e.division.parts):
                part = every[where]
                index[rank, at : at + part.numel()] = part
            before += e.selection.nnz
            at += e.longest
        small = nothing < 2**31
        self._index = (index.int() if small else index).flatten().to(self._shard.device)
        # Gradients are views of one buffer, always the same ones, so that they cost no DTensors in a step.
        self._buffer = torch.zeros(sum(self._lengths), device=entries[0].shard.local.device)
        parts = self._buffer.split(self._lengths)
        self._gradients: list[Any] = [e.distributed(part) for e, part in zip(entries, parts, strict=True)]
        self._hooks: list[Any] = [e.leaf.register_post_accumulate_grad_hook(lambda _: self._queue()) for e in entries]
        self._hooks.append(model.register_forward_hook(self._watch))

    def remove(self) -> None:
        """Take part in no backward pass any more."""
        for hook in self._hooks:
            hook.remove()

    def _watch(self, module: nn.Module, args: Any, output: Any) -> None:
        # Also where no chosen entry takes part: other processes may have some that do.
        if torch.is_grad_enabled():
            for tensor in pytree.tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda _: self._queue())

    def _queue(self) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            Variable._execution_engine.queue_callback(self._finish)

    @torch.no_grad()
    def _finish(self) -> None:
        self._task = -1
        rules = gradient_rules(self._gatherers)
        if not rules.reduce:
            return  # leaves go on adding up
        leaves = [e.leaf for e in self._entries]
        grads = [leaf.grad if leaf.grad is not None else torch.zeros(leaf.shape, device=leaf.device) for leaf in leaves]
        every = torch.cat([*grads, torch.zeros(1, device=self._index.device)])
        del grads
        for leaf in leaves:
            leaf.grad = None
        sent = every.index_select(0, self._index)
        del every
        mine = torch.empty(sum(self._lengths), device=sent.device)
        shard = self._shard
        getattr(dist, _REDUCE_SCATTER)(mine, sent, group=shard.group)
        self.bytes_sent += sent.numel() * sent.element_size()
        world = len(shard.bounds)
        if shard.replicas is not None:
            dist.all_reduce(mine, group=shard.replicas)
            world *= dist.get_world_size(shard.replicas)
        if set(rules.divisors) == {None}:
            mine /= world
        else:
            for part, divisor in zip(mine.split(self._lengths), rules.divisors, strict=True):
                part /= world if divisor is None else divisor
        self._give(mine.to(self._buffer.device))

    def _give(self, mine: Tensor) -> None:
        parameters = [e.own for e in self._entries]
        if all(p.grad is None for p in parameters):
            self._buffer.copy_(mine)
            for p, gradient in zip(parameters, self._gradients, strict=True):
                if p.requires_grad:
                    p.grad = gradient
            return
        for p, gradient, part in zip(parameters, self._gradients, mine.split(self._lengths), strict=True):
            own: Any = p.grad
            if own is None:
                gradient._local_tensor.copy_(part)
                p.grad = gradient if p.requires_grad else None
            else:
                own._local_tensor.add_(part)


def divided(entries: Iterable[SelectedEntries]) -> list[ShardedEntries]:
    """Those of sharded weights."""
    return [e for e in entries if isinstance(e, ShardedEntries)]
