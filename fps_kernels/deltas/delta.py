"""Tuned entries as a small file: save, load, apply, take back, compare and merge."""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fps_kernels import ops
from fps_kernels._version import __version__
from fps_kernels.selection import Selection, WeightSelection
from fps_kernels.storage.bits import bits_for, pack, packed_size, unpack
from fps_kernels.storage.checked_file import Path_, distrusted, read, texts_by_name, whole_number, whole_numbers, write
from fps_kernels.tuning.attaching import Tuner
from fps_kernels.tuning.tuned_weight import TunedWeight
from fps_kernels.weights.fingerprint import fingerprint, own_parameters
from fps_kernels.weights.matrix import MatrixLayout

FORMAT = "fps_kernels.delta.1"
_WORTH_SPARSE = 0.5  # a weight that changed in more of its entries is stored whole


@dataclass(frozen=True)
class Conflict:
    """Entries of one parameter that two deltas both changed, to different values.

    Attributes:
        name: the parameter.
        entries: how many.
        largest: the largest difference between the two values.
    """

    name: str
    entries: int
    largest: float


@dataclass(eq=False)
class Delta:
    """The tuned entries of a model, apart from the model.

    Attributes:
        selection: which entries; ``selection.dense`` names the parameters that are stored whole.
        values: for each weight its tuned values ``[nnz]`` in CSR order, float32 or bfloat16, on the CPU.
        dense: tuned parameters that are stored whole, by name, float32 or bfloat16, on the CPU.
        base: :func:`fingerprint` of the model that they belong to.
        versions: of the packages that wrote it.
    """

    selection: Selection
    values: dict[str, Tensor]
    dense: dict[str, Tensor]
    base: str
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._applied: tuple[weakref.ref[nn.Module], dict[str, Tensor]] | None = None
        # Where entries lie in memory, by weight, device and strides: found once, so that changing tasks only touches them.
        self._places: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_applied": None, "_places": {}}  # a copy is applied to nothing

    @property
    def entries(self) -> int:
        """Numbers that it holds."""
        return self.selection.nnz + sum(t.numel() for t in self.dense.values())

    def __repr__(self) -> str:
        whole = sum(t.numel() for t in self.dense.values())
        return f"Delta({self.selection.nnz:,} entries of {len(self.values)} weights, {whole:,} in {len(self.dense)} whole)"

    # ------------------------------------------------------------------------------------------------ on a model

    @torch.no_grad()
    def apply_(self, model: nn.Module, *, check_base: bool = True) -> None:
        """Write the tuned entries into a model of the same base; everything else keeps its bits.

        The values that were there are kept until :meth:`revert_`: as much memory as the delta has entries. Where the entries
        lie is kept for the next time: 8 bytes an entry.

        Args:
            model: the base model, on any device, in float32, bfloat16 or float16.
            check_base: compare fingerprints first, which reads some entries of each parameter.

        Raises:
            ValueError: a model of another base, one that is attached, or this delta is applied already. The model is
                unchanged then.
        """
        if self._applied is not None and self._applied[0]() is not None:
            raise ValueError("this delta is applied already: revert it first, or load it a second time")
        parameters = self._checked(dict(model.named_parameters(remove_duplicate=False)))
        if check_base and fingerprint(model) != self.base:
            raise ValueError(
                "the delta is of another base model, or this one was changed since (is another delta applied?): the "
                "fingerprints differ (a float16 copy of a float32 base has another one, too); check_base=False applies it "
                "all the same"
            )
        before: dict[str, Tensor] = {}
        for name in self.selection:
            memory, places = self._entries(name, parameters[name])
            before[name] = memory[places]
        for name in self.dense:
            before[name] = parameters[name].detach().clone()
        self._write(parameters)
        self._applied = weakref.ref(model), before

    @torch.no_grad()
    def revert_(self, model: nn.Module) -> None:
        """Write back what :meth:`apply_` found, bit for bit.

        Raises:
            ValueError: it is not applied to this model, or the model was converted or attached since. The model is
                unchanged then.
        """
        if self._applied is None or self._applied[0]() is not model:
            raise ValueError("this delta is not applied to this model: apply_ it first")
        before = self._applied[1]
        parameters = self._checked(dict(model.named_parameters(remove_duplicate=False)))
        for name, values in before.items():
            p = parameters[name]
            if (p.dtype, p.device) != (values.dtype, values.device):
                raise ValueError(
                    f"{name} was {values.dtype} on {values.device} when the delta was applied and is {p.dtype} on "
                    f"{p.device} now: convert the model back first"
                )
        for name, values in before.items():
            if name in self.dense:
                parameters[name].detach().copy_(values)
            else:
                memory, places = self._entries(name, parameters[name])
                memory[places] = values
        self._applied = None

    @torch.no_grad()
    def write_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the tuned entries into the tensors of a checkpoint of the base model, by name, without a way back.

        Raises:
            ValueError: tensors that are missing or of another shape or dtype. Nothing is written then.
        """
        self._write(self._checked(tensors))

    def _write(self, parameters: Mapping[str, Tensor]) -> None:
        for name in self.selection:
            memory, places = self._entries(name, parameters[name])
            memory[places] = self.values[name].to(memory.device, memory.dtype)
        for name, values in self.dense.items():
            parameters[name].detach().copy_(values)

    def _entries(self, name: str, p: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A view of a parameter's memory, and the indices of the chosen entries in it."""
        chosen = self.selection[name]
        view, position = chosen.layout.writable_matrix(p)
        flat = view.is_contiguous()
        key = (name, p.device, p.stride())
        if key not in self._places:
            here = chosen.to(p.device)
            columns = (here.columns if position is None else position[here.columns.long()]).long()
            self._places[key] = (here.rows() * view.shape[1] + columns,) if flat else (here.rows(), columns)
        return view.view(-1) if flat else view, self._places[key]

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
                    self.selection[name].layout.writable_matrix(p)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
        return picked

    # ------------------------------------------------------------------------------------------------ as a file

    def save(self, path: Path_, dtype: torch.dtype | None = None) -> None:
        """Write a safetensors file: columns in as few bits as they need, values in ``dtype``; see ``docs/format.md``.

        Args:
            path: where; what is there is replaced at once, or stays if the writing fails.
            dtype: ``torch.float32`` or ``torch.bfloat16`` for the values; as they are if not given.

        Raises:
            ValueError: another dtype.
        """
        if dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
        weights: dict[str, Any] = {}
        packed: list[Tensor] = []
        values: dict[torch.dtype, list[Tensor]] = {torch.float32: [], torch.bfloat16: []}
        for name, w in self.selection.weights.items():
            lengths = w.row_offsets.diff()
            described: dict[str, Any] = {"shape": list(w.layout.parameter_shape), "entries": w.nnz}
            if w.layout.transposed:
                described["transposed"] = True
            if w.nnz and bool((lengths == lengths[0]).all()):
                described["row_length"] = int(lengths[0])
            else:
                packed.append(pack(lengths, bits_for(int(lengths.max()) if lengths.numel() else 0)))
                described["row_bits"] = bits_for(int(lengths.max()) if lengths.numel() else 0)
            packed.append(pack(w.columns, bits_for(w.layout.shape[1] - 1)))
            _append(values, described, self.values[name], dtype)
            weights[name] = described
        dense = {}
        for name, t in self.dense.items():
            dense[name] = {"shape": list(t.shape)}
            _append(values, dense[name], t, dtype)
        content = {
            "base": self.base,
            "weights": weights,
            "dense": dense,
            "description": self.selection.description,
            "density": self.selection.density,
            "versions": self.versions,
        }
        tensors = {"indices": torch.cat(packed)} if packed else {}
        tensors |= {_STORED[d]: torch.cat(parts) for d, parts in values.items() if parts}
        write(path, FORMAT, content, tensors)

    @classmethod
    def load(cls, path: Path_) -> "Delta":
        """Read a file written by :meth:`save`; everything in it is checked.

        Raises:
            ValueError: the file is no delta, is cut off or changed, or what it says does not fit together.
            OSError: it cannot be read.
        """
        content, tensors = read(path, FORMAT, "delta")
        with distrusted(path):
            return _read(content, tensors)


_STORED = {torch.float32: "values_float32", torch.bfloat16: "values_bfloat16"}


def _append(
    values: dict[torch.dtype, list[Tensor]], described: dict[str, Any], tensor: Tensor, dtype: torch.dtype | None
) -> None:
    stored = dtype or (torch.bfloat16 if tensor.dtype == torch.bfloat16 else torch.float32)
    values[stored].append(tensor.detach().reshape(-1).to("cpu", stored))
    if stored == torch.bfloat16:
        described["bfloat16"] = True


class _Stream:
    """Takes parts of a tensor from the front."""

    def __init__(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        if tensor.dtype != dtype or tensor.dim() != 1:
            raise ValueError(f"{name} must be one-dimensional {dtype}, found {tensor.dtype} {list(tensor.shape)}")
        self.name, self.rest = name, tensor

    def take(self, count: int) -> Tensor:
        if not 0 <= count <= self.rest.numel():
            raise ValueError(f"{self.name} has {self.rest.numel()} items left, {count} are needed")
        part, self.rest = self.rest[:count], self.rest[count:]
        return part

    def check_empty(self) -> None:
        if self.rest.numel():
            raise ValueError(f"{self.name} has {self.rest.numel()} items too many")


def _read(content: dict[str, Any], tensors: dict[str, Tensor]) -> Delta:
    indices = _Stream("indices", tensors.get("indices", torch.empty(0, dtype=torch.uint8)), torch.uint8)
    streams = {d: _Stream(n, tensors.get(n, torch.empty(0, dtype=d)), d) for d, n in _STORED.items()}
    if extra := sorted(tensors.keys() - {"indices", *_STORED.values()}):
        raise ValueError(f"it has a tensor {extra[0]!r} that does not belong there")
    weights, values, dense = {}, {}, {}
    for name, said in content["weights"].items():
        layout = MatrixLayout.described(said["shape"], said.get("transposed", False))
        O, C = layout.shape
        nnz = whole_number(said["entries"])
        if nnz > O * C or max(nnz, O, C) > ops.MAX_NNZ:
            raise ValueError(f"{name} of shape {said['shape']} cannot have {nnz} chosen entries")
        values[name] = streams[_stored(said)].take(nnz)
        if "row_length" in said:  # checked against what the file holds before anything of that size is made
            if whole_number(said["row_length"], 1) * O != nnz:
                raise ValueError(f"{name} has {nnz} entries, not {said['row_length']} in each of {O} rows")
            row_offsets = torch.arange(O + 1, dtype=torch.int64) * said["row_length"]
        else:
            bits = whole_number(said["row_bits"], 1)
            if bits > 31:
                raise ValueError(f"{name} has row lengths of {bits} bits")
            lengths = unpack(indices.take(packed_size(O, bits)), O, bits)
            row_offsets = torch.zeros(O + 1, dtype=torch.int64)
            row_offsets[1:] = lengths.long().cumsum(0)
            if int(row_offsets[-1]) != nnz:
                raise ValueError(f"{name}: its rows have {int(row_offsets[-1])} entries, not {nnz}")
        bits = bits_for(C - 1)
        columns = unpack(indices.take(packed_size(nnz, bits)), nnz, bits)
        try:
            weights[name] = WeightSelection(layout, row_offsets.int(), columns)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
    for name, said in content["dense"].items():
        shape = whole_numbers(said["shape"])
        count = 1
        for size in shape:
            count *= size
        dense[name] = streams[_stored(said)].take(count).view(shape)
    for stream in (indices, *streams.values()):
        stream.check_empty()
    if not isinstance(content["base"], str):
        raise ValueError(f"its base is {content['base']!r}")
    selection = Selection(weights, tuple(dense), description=texts_by_name(content["description"]))
    return Delta(selection, values, dense, content["base"], texts_by_name(content["versions"]))


def _stored(said: Mapping[str, Any]) -> torch.dtype:
    return torch.bfloat16 if said.get("bfloat16") else torch.float32


# ------------------------------------------------------------------------------------------------ making deltas


def save_delta(tuner: Tuner, path: Path_, dtype: torch.dtype | None = None) -> None:
    """Write what a tuner has tuned so far to a small safetensors file, at most 6 bytes an entry, or 4 in bfloat16.

    Args:
        tuner: from :func:`fps_kernels.attach`, detached or not.
        path: where; what is there is replaced at once, or stays if the writing fails.
        dtype: ``torch.float32`` or ``torch.bfloat16`` for the values; if not given, compact values are float32.

    Raises:
        ValueError: another dtype.

    Example:
        >>> fps.save_delta(tuner, "task.safetensors")
        >>> fps.load_delta("task.safetensors").apply_(base_model)
    """
    delta_of(tuner).save(path, dtype)


def load_delta(path: Path_) -> Delta:
    """Read a file of :func:`save_delta`; see :meth:`Delta.load`.

    Example:
        >>> delta = fps.load_delta("task.safetensors")
        >>> delta.apply_(model)
        >>> delta.revert_(model)
    """
    return Delta.load(path)


def delta_of(tuner: Tuner) -> Delta:
    """What a tuner has tuned so far, as a delta to the model that was attached."""
    values = {name: p.detach().to("cpu", copy=True) for name, p in tuner.compact.items()}
    dense = {name: p.detach().to("cpu", copy=True) for name, p in tuner.dense.items()}
    return Delta(tuner.selection.to("cpu"), values, dense, tuner.base, _versions())


@torch.no_grad()
def diff(base: nn.Module, tuned: nn.Module) -> Delta:
    """What changed from one model to another, bit by bit.

    Args:
        base: the model before.
        tuned: the model after, with the same parameters, on the same device and of the same dtypes.

    Returns:
        A delta to ``base``: the changed entries of each weight, whole parameters where more than half of one changed.

    Raises:
        ValueError: models with different parameters, or changes in parameters of another dtype.
    """
    before, after = own_parameters(base), own_parameters(tuned)
    if different := sorted(before.keys() ^ after.keys()):
        raise ValueError(f"the models have different parameters: only one has {different[0]}")
    masks, values, dense = {}, {}, {}
    for name, p in before.items():
        q = after[name]
        if p.shape != q.shape or p.dtype != q.dtype or p.device != q.device:
            raise ValueError(
                f"{name} is {p.dtype} {list(p.shape)} on {p.device} in one and {q.dtype} {list(q.shape)} on {q.device} in "
                "the other"
            )
        if p.dtype not in ops.FLOAT_DTYPES:
            if not torch.equal(p, q):
                raise ValueError(f"{name} is {p.dtype}: a delta holds float32, bfloat16 or float16")
            continue
        changed = _bits(p) != _bits(q)
        count = int(changed.sum())
        if not count:
            continue
        if p.dim() >= 2 and count <= _WORTH_SPARSE * p.numel():
            masks[name] = WeightSelection.from_mask(changed).to("cpu")
            values[name] = q.detach()[changed].cpu()
        else:
            dense[name] = q.detach().to("cpu", copy=True)
    selection = Selection(masks, tuple(dense), description={"scorer": "difference of two models"})
    return Delta(selection, values, dense, fingerprint(base), _versions())


def merge(
    deltas: Sequence[Delta], on_conflict: Literal["error", "first", "last", "mean"] = "error"
) -> tuple[Delta, list[Conflict]]:
    """Several deltas to one base as one.

    Args:
        deltas: at least one, all of one base.
        on_conflict: what becomes of an entry to which two deltas give different values: an error, the value of the first
            or the last delta that has it, or the mean of all that have it.

    Returns:
        The merged delta, values in float32, and one :class:`Conflict` for each parameter that has any.

    Raises:
        ValueError: no delta, deltas of different bases or of different shapes, or conflicts where they are errors.
    """
    if on_conflict not in ("error", "first", "last", "mean"):
        raise ValueError(f"on_conflict must be error, first, last or mean, got {on_conflict!r}")
    if not deltas:
        raise ValueError("there is no delta to merge")
    if len({delta.base for delta in deltas}) > 1:
        raise ValueError("the deltas are of different base models: their fingerprints differ")
    names = dict.fromkeys(name for delta in deltas for name in (*delta.values, *delta.dense))
    weights, values, dense, conflicts = {}, {}, {}, []
    for name in names:
        parts = [(d.selection.weights.get(name), d.values.get(name, d.dense.get(name))) for d in deltas]
        found, conflict = _merged(name, [(w, v) for w, v in parts if v is not None], on_conflict)
        conflicts += [conflict] if conflict else []
        if isinstance(found, Tensor):
            dense[name] = found
        else:
            weights[name], values[name] = found
    selection = Selection(weights, tuple(dense), description={"scorer": f"{len(deltas)} deltas merged"})
    return Delta(selection, values, dense, deltas[0].base, _versions()), conflicts


def _merged(
    name: str, parts: list[tuple[WeightSelection | None, Tensor]], on_conflict: str
) -> tuple[Tensor | tuple[WeightSelection, Tensor], Conflict | None]:
    shapes = {tuple(v.shape) if w is None else w.layout.parameter_shape for w, v in parts}
    layouts = {w.layout for w, _ in parts if w is not None}
    if len(shapes) > 1 or len(layouts) > 1:
        raise ValueError(f"the deltas are of different models: {name} has several shapes")
    layout = layouts.pop() if layouts else MatrixLayout(shapes.pop())
    flat = torch.cat([_flat(w, v, layout) for w, v in parts])
    owner = torch.cat([torch.full((v.numel(),), i) for i, (_, v) in enumerate(parts)])
    every = torch.cat([(layout.matrix(v).reshape(-1) if w is None else v).float() for w, v in parts])
    order = (flat * len(parts) + owner).argsort()  # by entry, and there in the order of the deltas
    flat, every = flat[order], every[order]
    entries, group, counts = flat.unique_consecutive(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    first, last = every[ends - counts], every[ends - 1]
    lowest = torch.zeros(entries.numel()).scatter_reduce_(0, group, every, "amin", include_self=False)
    highest = torch.zeros(entries.numel()).scatter_reduce_(0, group, every, "amax", include_self=False)
    differs = (lowest != highest) & ~(lowest.isnan() & highest.isnan() & first.isnan() & last.isnan())
    conflict = None
    if bool(differs.any()):
        conflict = Conflict(name, int(differs.sum()), float((highest - lowest)[differs].max()))
        if on_conflict == "error":
            raise ValueError(
                f"{conflict.entries} entries of {name} have different values in several deltas (by up to "
                f"{conflict.largest:.3g}): choose on_conflict='first', 'last' or 'mean'"
            )
    mean = torch.zeros(entries.numel()).index_add_(0, group, every) / counts
    merged = {"first": first, "last": last, "mean": torch.where(differs, mean, first), "error": first}[on_conflict]
    if any(w is None for w, _ in parts):
        O, C = layout.shape
        whole = torch.empty(O * C)
        whole[entries] = merged  # some delta has every entry
        return layout.unmatrix(whole.view(O, C)).contiguous(), conflict
    return (WeightSelection.from_flat(layout, entries), merged), conflict


def _flat(w: WeightSelection | None, values: Tensor, layout: MatrixLayout) -> Tensor:
    return torch.arange(values.numel()) if w is None else w.flat()


def _bits(p: Tensor) -> Tensor:
    return p.detach().contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()])


def _versions() -> dict[str, str]:
    return {"fps_kernels": __version__, "torch": str(torch.__version__)}
