"""A model of which only chosen entries are trained."""

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from fps_kernels.selection import Selection
from fps_kernels.selection.summary import html_of
from fps_kernels.tuning.agreement import Agreement, Scope
from fps_kernels.tuning.compact_values import SelectedEntries
from fps_kernels.tuning.groups import Options, grouped
from fps_kernels.tuning.optimizer_checks import checksums
from fps_kernels.tuning.places import Place, all_there, find_places
from fps_kernels.tuning.sharded_entries import GradientExchange, ShardedEntries
from fps_kernels.tuning.tuned_weight import become_plain, lengthen
from fps_kernels.weights.buffers import BufferNotes
from fps_kernels.weights.exchange import Division, gathered
from fps_kernels.weights.shards import Shard, local_part


class Tuner:
    """A model of which only chosen entries are trained; made by :func:`attach`, a context manager that detaches at its end.

    Attributes:
        model: the model.
        compact: the values of the chosen entries, float32 ``[nnz]`` parameters in CSR order, by the names of their weights.
        dense: the parameters that are trained whole, by name.
        base: fingerprint of the model as it was attached.
        buffers: what tells which persistent buffers, such as the statistics of batch norms, changed since then.
    """

    def __init__(
        self,
        model: nn.Module,
        entries: dict[str, SelectedEntries],
        dense: dict[str, nn.Parameter],
        description: dict[str, str],
        base: str,
        buffers: BufferNotes,
    ) -> None:
        self.model = model
        self._entries = entries
        self.dense = dense
        self.base = base
        self.buffers = buffers
        self._description = description
        self._frozen: dict[nn.Parameter, bool] = {}
        self._loading: RemovableHandle | None = None
        self._scope: Scope | None = None
        self._exchange: GradientExchange | None = None
        self._twins: dict[Tensor, Tensor] = {}
        self._compared = False
        self._found: list[Place] | None = None

    @property
    def compact(self) -> dict[str, nn.Parameter]:
        """The values of the chosen entries, float32 ``[nnz]`` in CSR order, by the names of their weights."""
        self.settle()
        return {name: e.values for name, e in self._entries.items()}

    @property
    def selection(self) -> Selection:
        """What was attached."""
        self.settle()
        weights = {name: e.selection for name, e in self._entries.items()}
        return Selection(weights, tuple(self.dense), description=dict(self._description))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trained parameter: the compact ones by the names of their weights, then the dense ones."""
        yield from self.compact.items()
        yield from self.dense.items()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every trained parameter, for any optimizer of ``torch.optim``.

        Example:
            >>> optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
        """
        for _, p in self.named_parameters():
            yield p

    def param_groups(self, options: Options | None = None) -> list[dict[str, Any]]:
        """Parameter groups for any optimizer.

        Args:
            options: ``options(name, parameter)`` gives the group options of a parameter, such as
                ``{"lr": 1e-4, "weight_decay": 0.0}``; parameters with equal options share a group.

        Example:
            >>> groups = tuner.param_groups(lambda name, p: {"weight_decay": 0.0 if name in tuner.dense else 0.05})
            >>> optimizer = fps.MaskedAdamW(groups, lr=1e-3)
        """
        groups = grouped(self.named_parameters(), options)
        return [{"params": list(members.values()), **chosen} for chosen, members in groups]

    def settle(self) -> None:
        """Let values and weights agree: of whichever changed, however it was, the other takes over what it holds.

        This happens by itself at the begin of every forward pass outside a compiled graph, before and after every step of a
        ``torch.optim.Optimizer``, and with everything that reads values or weights from here, from ``model.state_dict()`` or
        by :func:`fps_kernels.save_delta` and its like. Call it after changing ``compact`` values by hand in front of
        anything else, such as ``module.weight`` itself. Where both changed the values count.

        Raises:
            ValueError: values on another device than their weight.
        """
        if self._scope is not None:
            self._scope.agreement.settle()

    def write_back(self) -> None:
        """Write the compact values into the weights, whatever these hold. See :meth:`settle`, which is mostly wanted."""
        for e in self._entries.values():
            e.write_back()

    @property
    def agreement(self) -> Agreement:
        """Of all its weights.

        Raises:
            ValueError: the tuner is detached.
        """
        if self._scope is None:
            raise ValueError("the tuner is detached")
        return self._scope.agreement

    @property
    def attached(self) -> bool:
        """Whether the weights still follow the values."""
        return self._scope is not None

    @property
    def is_sharded(self) -> bool:
        """Whether each process has a part of the values: ``fully_shard`` has cut the model's weights."""
        return any(e.is_sharded for e in self._entries.values())

    @property
    def weights(self) -> int:
        """Number of weights of which entries are chosen."""
        return len(self._entries)

    def check_places(self) -> list[Place]:
        """Where its parameters are in the model: each step of a path to each, found anew only where one is not there.

        Raises:
            ValueError: the model has other parameters by now than when it was attached. With one's name, and what to do.
        """
        if self._found is None or not all_there(self._found):
            self._found = None
            self._found = self._places()
        return self._found

    def _places(self) -> list[Place]:
        wanted: dict[str, Tensor] = {
            name: e.shard.parameter if isinstance(e, ShardedEntries) else e.weight for name, e in self._entries.items()
        }
        places, missing = find_places(self.model, {**wanted, **self.dense}, self._twins)
        for e in self._entries.values():
            e.check_place()
            places.append((e._parameters, "values", e.own))
        if missing:
            what = (
                "its selected values reach no weight" if missing[0] in wanted else "it is trained whole, and would not move"
            )
            raise ValueError(
                f"{missing[0]} was replaced since attach(), by itself or with its module: {what}. Attach again, after "
                "whatever replaces parameters (a new head, resized embeddings, sharding)"
            )
        return places

    def compare_across_processes(self, group: Any) -> None:
        """Once: refuse to train if the processes of a group chose different entries. All of them have to call it.

        Raises:
            RuntimeError: on every process, if selections differ.
        """
        if self._compared:
            return
        self._compared = True
        first = next(iter(self._entries.values()))
        device = first.shard.device if isinstance(first, ShardedEntries) else first.own.device
        mine = torch.tensor([self._checksum()], dtype=torch.int64, device=device)
        everyone = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(everyone, mine, group=group)
        sums = [int(one) for one in everyone]
        other = next((rank for rank, one in enumerate(sums) if one != sums[0]), None)
        if other is not None:
            raise RuntimeError(
                f"process {other} of {len(sums)} attached another selection than process 0, and gradients would be averaged "
                "entry by entry over different entries: let select() choose in all processes at once, or choose in one of "
                "them and load its file in all"
            )

    def compare_under_ddp(self) -> None:
        """:meth:`compare_across_processes` where a pass of ``DistributedDataParallel`` is under way."""
        if (wrapped := DistributedDataParallel._active_ddp_module) is not None:
            self.compare_across_processes(wrapped.process_group)

    def _checksum(self) -> int:
        sums = checksums([e.selection for e in self._entries.values()])
        return zlib.crc32(repr((list(self._entries), sums, list(self.dense))).encode())

    def state_dict(self) -> dict[str, Tensor]:
        """The compact values, float32 ``[nnz]``, by the names of their weights: all of them also where a process has a part,
        the same on all processes, which then have to ask together.

        ``model.state_dict()`` holds the tuned model. Where weights are bfloat16 or float16 these values are more precise, so
        that a resumed run goes on with the same bits only if they are saved and loaded too.
        """
        return self.whole(self.compact)

    def whole(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that lie as compact values or dense parameters do, by their names: what all processes have of them.

        Of a model that is not sharded, what is given. All processes of a sharded one have to call this together.
        """
        found = {name: v.detach() for name, v in values.items()}
        parts: dict[str, tuple[Division, Tensor]] = {}
        for name, v in found.items():
            e = self._entries.get(name)
            if isinstance(e, ShardedEntries):
                parts[name] = e.division, local_part(v)[: e.here.nnz]
            elif local_part(v) is not v:
                parts[name] = Division.of_all(Shard.of(name, self.model, name, v)), local_part(v).flatten()
        divisions, own = [division for division, _ in parts.values()], [part for _, part in parts.values()]
        for name, whole in zip(parts, gathered(divisions, own), strict=True):
            found[name] = whole if name in self._entries else whole.view(found[name].shape)
        return found

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward passes of a sharded model add up gradients on their own process; the first one after it exchanges
        the sum. As with ``set_requires_gradient_sync``, gradients of what is trained whole are kept unsharded meanwhile.

        Example:
            >>> for i, (x, y) in enumerate(micro_batches):
            ...     with tuner.no_sync() if i < last else nullcontext():
            ...         loss(model(x), y).backward()

        Raises:
            ValueError: the model is not sharded: DistributedDataParallel has a ``no_sync`` of its own, and one process
                exchanges nothing.
        """
        if self._exchange is None:
            raise ValueError("no_sync() is for sharded models: use that of DistributedDataParallel")
        model: Any = self.model
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load compact values and write them into the weights.

        Raises:
            ValueError: names or shapes that are not this tuner's; nothing is loaded then.
        """
        self.settle()
        if missing := sorted(self._entries.keys() ^ state.keys()):
            raise ValueError(f"the state is of another tuner: {missing[0]} is in one of the two only")
        for name, e in self._entries.items():
            if state[name].shape != (e.selection.nnz,):
                found = list(state[name].shape)
                raise ValueError(f"the state is of another selection: {name} has {found} values, not [{e.selection.nnz}]")
        for name, e in self._entries.items():
            e.load(state[name])

    def detach(self) -> None:
        """Leave a plain model with the tuned weights; parameters require gradients as before :func:`attach`.

        An optimizer that was made for this tuner refuses to step from now on. A second call does nothing.
        """
        try:
            for e in self._entries.values():
                e.settle()
        finally:
            for e in self._entries.values():
                if e.attached:
                    lengthen(e.owner)
                    become_plain(e.release())
            for p, flag in self._frozen.items():
                p.requires_grad_(flag)
            self._frozen.clear()
            if self._exchange is not None:
                self._exchange.remove()
                self._exchange = None
            if self._scope is not None:
                self._scope.remove()
                self._scope = None
            if self._loading is not None:
                self._loading.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        chosen = sum(e.selection.nnz for e in self._entries.values())
        whole = sum(p.numel() for p in self.dense.values())
        return f"Tuner({chosen} entries of {len(self._entries)} weights, {whole} in {len(self.dense)} dense parameters)"

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        return html_of(self.selection, f"{self!r}{'' if self.attached else ', detached'}")
