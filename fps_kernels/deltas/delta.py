"""The tuned entries of a model, apart from the model."""

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fps_kernels import ops
from fps_kernels.deltas.buffers import check_places, loss_of
from fps_kernels.deltas.file_format import DeltaContent, read_file, write_file
from fps_kernels.selection import Selection
from fps_kernels.selection.summary import html_of
from fps_kernels.storage.checked_file import Path_
from fps_kernels.tuning.compact_values import SelectedEntries
from fps_kernels.tuning.tuned_weight import TunedWeight
from fps_kernels.weights.fingerprint import fingerprint
from fps_kernels.weights.survey import Survey


@dataclass(eq=False)
class Delta(DeltaContent):
    """The tuned entries of a model, apart from the model.

    Attributes:
        selection: which entries; ``selection.dense`` names the parameters that are stored whole.
        values: for each weight its tuned values ``[nnz]`` in CSR order, float32 or bfloat16, on the CPU.
        dense: tuned parameters that are stored whole, by name, float32 or bfloat16, on the CPU.
        base: :func:`fingerprint` of the model that they belong to.
        versions: of the packages that wrote it.
        buffers: buffers that changed, such as the statistics of batch norms, whole, by name, in their own dtype, on the CPU.
            ``delta.buffers.clear()`` takes them out.
        buffers_left_out: names of buffers that changed and that it does not hold: the base with this delta is not the tuned
            model, and whatever applies it warns.
        added: values are added to those of the base, beside weights that were never written (``attach(..., beside=True)``).
    """

    def __post_init__(self) -> None:
        # To what, what was there before, and what was written: of a sharded model, the part of this process.
        self._applied: tuple[weakref.ref[nn.Module], dict[str, Tensor], Delta] | None = None
        # Where entries lie in memory, by weight, device and strides: found once, so that changing tasks only touches them.
        self._places: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_applied": None, "_places": {}}  # a copy is applied to nothing

    @property
    def entries(self) -> int:
        """Tuned numbers that it holds; those of buffers are not counted."""
        return self.selection.nnz + sum(t.numel() for t in self.dense.values())

    def __repr__(self) -> str:
        whole = sum(t.numel() for t in self.dense.values())
        more = f", {len(self.buffers)} buffers" if self.buffers else ""
        more += f", {len(self.buffers_left_out)} changed buffers left out" if self.buffers_left_out else ""
        entries = f"{self.selection.nnz:,} entries of {len(self.values)} weights"
        return f"Delta({entries}{', added to base' * self.added}, {whole:,} in {len(self.dense)} whole{more})"

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        return html_of(self.selection, repr(self))

    def check_written(self) -> None:
        """Refuse a delta whose values are no weights.

        Raises:
            ValueError: its values are added to those of the base.
        """
        if self.added:
            raise ValueError(
                "the delta's values are added beside a base that is never written: attach(model, delta.selection, "
                "beside=True) and tuner.load_state_dict(delta.values), or fps.merge_into_dense(model, delta)"
            )

    # ------------------------------------------------------------------------------------------------ on a model

    @torch.no_grad()
    def apply_(self, model: nn.Module, *, check_base: bool = True) -> None:
        """Write the tuned entries and the buffers into a model of the same base; everything else keeps its bits.

        The values that were there are kept until :meth:`revert_`: as much memory as the delta has entries. Where the entries
        lie is kept for the next time: 8 bytes an entry. A delta without buffers that changed (``buffers_left_out``) is
        applied with a warning.

        Args:
            model: the base model, on any device, in float32, bfloat16 or float16. Values of floating-point buffers are
                converted as those of parameters are.
            check_base: compare fingerprints first, which reads some entries of each parameter.

        Raises:
            ValueError: a model of another base, one that is attached, or this delta is applied already. The model is
                unchanged then.
        """
        if self._applied is not None and self._applied[0]() is not None:
            raise ValueError("this delta is applied already: revert it first, or load it a second time")
        self.check_written()
        survey = Survey.of(model)
        here = self._here(survey)
        parameters = here._checked(_memories(survey))
        buffers = check_places(self.buffers, _buffers_of(model))
        if check_base and fingerprint(survey) != self.base:
            raise ValueError(
                "the delta is of another base model, or this one was changed since (is another delta applied?): the "
                "fingerprints differ (a float16 copy of a float32 base has another one, too); check_base=False applies it "
                "all the same"
            )
        before: dict[str, Tensor] = {}
        for name in self.selection:
            memory, places = here._entries(name, parameters[name])
            before[name] = memory[places]
        for name in self.dense:
            before[name] = parameters[name].detach().clone()
        for name, b in buffers.items():
            before[name] = b.clone()
        here._write(parameters, buffers)
        self._applied = weakref.ref(model), before, here
        self._warn_of_buffers()

    @torch.no_grad()
    def revert_(self, model: nn.Module) -> None:
        """Write back what :meth:`apply_` found, bit for bit.

        Raises:
            ValueError: it is not applied to this model, or the model was converted or attached since, or has other
                buffers. The model is unchanged then.
        """
        if self._applied is None or self._applied[0]() is not model:
            raise ValueError("this delta is not applied to this model: apply_ it first")
        _, before, here = self._applied
        parameters = here._checked(_memories(Survey.of(model)))
        # What it was applied with: the delta's own buffers may have been taken out since.
        parameters |= check_places({n: b for n, b in before.items() if n not in parameters}, _buffers_of(model))
        for name, values in before.items():
            p = parameters[name]
            if (p.dtype, p.device) != (values.dtype, values.device):
                raise ValueError(
                    f"{name} was {values.dtype} on {values.device} when the delta was applied and is {p.dtype} on "
                    f"{p.device} now: convert the model back first"
                )
        for name, values in before.items():
            if name in self.selection:
                memory, places = here._entries(name, parameters[name])
                memory[places] = values
            else:
                parameters[name].detach().copy_(values)
        self._applied = None

    @torch.no_grad()
    def write_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tuned entries and buffers into the tensors of a checkpoint of the base model, by name, without a way back.

        Values of a delta that is added to its base are added to what the tensors hold.

        Raises:
            ValueError: tensors that are missing or of another shape or dtype. Nothing is written then.
        """
        self._write(self._checked(tensors), check_places(self.buffers, tensors))
        self._warn_of_buffers()

    def _here(self, survey: Survey) -> "Delta":
        """The part of it that belongs to this process's pieces of a sharded model; all of it for any other."""
        if not survey.sharded:
            return self
        self.selection.pick(survey.parameters)  # names and shapes
        weights, values, dense = dict(self.selection.weights), dict(self.values), dict(self.dense)
        if attached := next((m.name for m in survey.modules.values() if isinstance(m, SelectedEntries)), None):
            raise ValueError(f"{attached} is attached: detach its tuner first")
        for name, shard in survey.sharded.items():
            if name in weights:
                part, weights[name] = weights[name].within(shard.piece(weights[name].layout))
                values[name] = values[name][part]
            elif name in dense:
                if dense[name].shape != shard.parameter.shape:
                    found = list(shard.parameter.shape)
                    raise ValueError(f"the delta is of another model: {name} has shape {found} here")
                first, last = shard.bounds[shard.rank]
                dense[name] = dense[name].narrow(shard.dim, first, last - first)
        selection = Selection(weights, self.selection.dense, description=dict(self.selection.description))
        return Delta(selection, values, dense, self.base, self.versions, self.buffers, self.buffers_left_out)

    def _warn_of_buffers(self) -> None:
        if self.buffers_left_out:
            warnings.warn(
                f"{loss_of(self.buffers_left_out)}: what it is applied to does not predict what the tuned model did; save "
                "the delta with buffers=True",
                stacklevel=4,  # whoever called what calls this, behind torch.no_grad
            )

    def _write(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        for name in self.selection:
            memory, places = self._entries(name, parameters[name])
            values = self.values[name].to(memory.device)
            memory[places] = (memory[places].float() + values if self.added else values).to(memory.dtype)
        for name, values in self.dense.items():
            parameters[name].detach().copy_(values)
        for name, values in self.buffers.items():
            buffers[name].copy_(values)

    def _entries(self, name: str, p: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A view of a parameter's memory, and the indices of the chosen entries in it."""
        key = (name, p.device, p.stride())
        if key in self._places:
            view = self.selection[name].layout.memory(p).view
            places = self._places[key]
        else:
            here = self.selection[name].to(p.device)
            view, columns = here.in_memory(p)
            flat = view.is_contiguous()
            places = (here.rows() * view.shape[1] + columns,) if flat else (here.rows(), columns.long())
            self._places[key] = places
        return view.view(-1) if len(places) == 1 else view, places

    def _checked(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        picked = self.selection.pick(parameters)
        for name, p in picked.items():
            if isinstance(p, TunedWeight):
                raise ValueError(f"{name} is attached: detach its tuner first")
            if p.dtype not in ops.FLOAT_DTYPES:
                raise ValueError(f"{name} is {p.dtype}, not float32, bfloat16 or float16")
            if name in self.dense and self.dense[name].shape != p.shape:
                raise ValueError(f"the delta is of another model: {name} has shape {list(p.shape)} here")
            if name in self.values:
                try:
                    self.selection[name].layout.memory(p)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
        return picked

    # ------------------------------------------------------------------------------------------------ as a file

    def save(self, path: Path_, dtype: torch.dtype | None = None) -> None:
        """Write a safetensors file: columns in as few bits as they need, values in ``dtype``; see ``docs/format.md``.

        Buffers are written bit by bit.

        Args:
            path: where; what is there is replaced at once, or stays if the writing fails.
            dtype: ``torch.float32`` or ``torch.bfloat16`` for the values; as they are if not given.

        Raises:
            ValueError: another dtype, or a buffer of a dtype that files have no place for (complex, 8-bit floating-point).
        """
        if dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
        write_file(path, self, dtype)

    @classmethod
    def load(cls, path: Path_) -> "Delta":
        """Read a file written by :meth:`save`; everything in it is checked.

        Raises:
            ValueError: the file is no delta, is cut off or changed, or what it says does not fit together.
            OSError: it cannot be read.
        """
        return cls(**vars(read_file(path)))


def _memories(survey: Survey) -> dict[str, Tensor]:
    """Parameters by name, of sharded ones the piece that lies here."""
    return {**survey.parameters, **{name: shard.local for name, shard in survey.sharded.items()}}


def _buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_buffers(remove_duplicate=False))
