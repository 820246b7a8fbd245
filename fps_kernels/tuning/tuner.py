"""A model of which only chosen entries are trained."""

from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fps_kernels.selection import Selection
from fps_kernels.tuning.compact_values import SelectedEntries
from fps_kernels.tuning.groups import Options, grouped
from fps_kernels.tuning.tuned_weight import become_plain


class Tuner:
    """A model of which only chosen entries are trained; made by :func:`attach`, a context manager that detaches at its end.

    Attributes:
        model: the model.
        compact: the values of the chosen entries, float32 ``[nnz]`` parameters in CSR order, by the names of their weights.
        dense: the parameters that are trained whole, by name.
        base: fingerprint of the model as it was attached.
    """

    def __init__(
        self,
        model: nn.Module,
        entries: dict[str, SelectedEntries],
        dense: dict[str, nn.Parameter],
        description: dict[str, str],
        base: str,
    ) -> None:
        self.model = model
        self._entries = entries
        self.dense = dense
        self.base = base
        self._description = description
        self._frozen: dict[nn.Parameter, bool] = {}
        self._loading: RemovableHandle | None = None

    @property
    def compact(self) -> dict[str, nn.Parameter]:
        """The values of the chosen entries, float32 ``[nnz]`` in CSR order, by the names of their weights."""
        return {name: e.values for name, e in self._entries.items()}

    @property
    def selection(self) -> Selection:
        """What was attached."""
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

    def write_back(self) -> None:
        """Write the compact values into the weights. Optimizers that are a ``torch.optim.Optimizer`` do so by themselves.

        So does the next forward pass outside a compiled graph, and ``model.state_dict()``; call this after changing
        ``compact`` values by hand in front of anything else.
        """
        for e in self._entries.values():
            e.write_back()

    def state_dict(self) -> dict[str, Tensor]:
        """The compact values, float32, by the names of their weights.

        ``model.state_dict()`` holds the tuned model. Where weights are bfloat16 or float16 these values are more precise, so
        that a resumed run goes on with the same bits only if they are saved and loaded too.
        """
        return {name: p.detach() for name, p in self.compact.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load compact values and write them into the weights.

        Raises:
            ValueError: names or shapes that are not this tuner's; nothing is loaded then.
        """
        compact = self.compact
        if missing := sorted(compact.keys() ^ state.keys()):
            raise ValueError(f"the state is of another tuner: {missing[0]} is in one of the two only")
        for name, p in compact.items():
            if state[name].shape != p.shape:
                raise ValueError(
                    f"the state is of another selection: {name} has {list(state[name].shape)} values, not {list(p.shape)}"
                )
        for name, p in compact.items():
            p.copy_(state[name])
        self.write_back()

    def detach(self) -> None:
        """Leave a plain model with the tuned weights; parameters require gradients as before :func:`attach`.

        An optimizer that was made for this tuner refuses to step from now on. A second call does nothing.
        """
        try:
            for e in self._entries.values():
                if e.attached:
                    e.synchronise()
        finally:
            for e in self._entries.values():
                if e.attached:
                    become_plain(e.release())  # type: ignore[arg-type]
            for p, flag in self._frozen.items():
                p.requires_grad_(flag)
            self._frozen.clear()
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
