"""Tuned weights for inference servers while training goes on: where the entries lie once, then two bytes for each of them.

In reinforcement learning a trainer sends its weights to the servers that generate after every step or so. Those who tune
everything find out what changed by comparing with a copy. A selection says it beforehand, and it never changes.

Two forms that servers read: vLLM's ``CheckpointWeightPatch`` (name, shape, dtype, values, flat indices) and the sparse
safetensors files of TRL's delta weight sync (``{name}.idx``: gaps between positions in 16 bits, ``{name}.val``: bfloat16).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fps_kernels.deltas.delta import Delta
from fps_kernels.selection import WeightSelection
from fps_kernels.storage.atomic import replaced_at_once
from fps_kernels.storage.checked_file import Path_
from fps_kernels.tuning.beside import BesideTuner
from fps_kernels.tuning.tuner import Tuner

_ENCODING = "gap_delta"  # TRL's name of it
_MOST = 2**31 - 1  # positions are int32


@dataclass(frozen=True)
class WeightPatch:
    """New values of one weight, in the fields of vLLM's ``CheckpointWeightPatch``: ``CheckpointWeightPatch(**vars(patch))``.

    Attributes:
        name: of the parameter.
        shape: of all of it.
        dtype: of the values.
        values: ``[n]``, in the order of the indices.
        indices: int32 ``[n]``, ascending: row-major positions in the parameter; ``None``: all of them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor
    indices: Tensor | None = None

    def apply_(self, tensor: Tensor) -> None:
        """Write it into a parameter, or a tensor of a checkpoint.

        Raises:
            ValueError: one of another shape.
        """
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"{self.name} has shape {list(tensor.shape)}, the patch is for {list(self.shape)}")
        flat = tensor.detach().reshape(-1)  # a copy, where the tensor is not contiguous
        values = self.values.to(tensor.device, tensor.dtype)
        if self.indices is None:
            flat.copy_(values)
        else:
            flat[self.indices.long().to(tensor.device)] = values
        if not tensor.is_contiguous():
            tensor.detach().copy_(flat.view(tensor.shape))


@dataclass
class WeightSync:
    """What a tuner has to tell a server, again and again.

    Args:
        tuner: attached, or a delta, which is told once.
        dtype: of the values, that of the server's weights.

    Attributes:
        bytes_at_first: of indices and values together.
        bytes_each_time: of the values alone.

    Raises:
        ValueError: values that are added beside frozen weights, which a server does not have; a weight of more than 2**31
            entries.

    Example:
        >>> sync = WeightSync(tuner)
        >>> server.receive(sync.patches())           # indices and values
        >>> for batch in batches:
        ...     train(batch)
        ...     server.receive_values(sync.values())  # on the other side: receiver.patches(values)
    """

    tuner: Tuner | Delta
    dtype: torch.dtype = torch.bfloat16
    _places: dict[str, tuple[tuple[int, ...], Tensor, Tensor | None]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        source = self.tuner
        if isinstance(source, BesideTuner) or (isinstance(source, Delta) and source.added):
            raise ValueError(
                "the values are added beside frozen weights, and a server has none: merge them first "
                "(fps.merge_into_dense), or tune without beside=True"
            )
        self._places = {name: _places_of(name, weight) for name, weight in source.selection.items()}
        self._dense = {name: tuple(p.shape) for name, p in source.dense.items()}
        for name, shape in self._dense.items():
            _check_size(name, shape)

    @property
    def bytes_at_first(self) -> int:
        """Of indices (int32) and values."""
        return self.bytes_each_time + 4 * sum(len(p) for _, p, _ in self._places.values())

    @property
    def bytes_each_time(self) -> int:
        """Of the values."""
        dense = sum(torch.Size(shape).numel() for shape in self._dense.values())
        return self.dtype.itemsize * (dense + sum(len(p) for _, p, _ in self._places.values()))

    @torch.no_grad()
    def patches(self) -> list[WeightPatch]:
        """All that is tuned, with where it lies: the first message."""
        return list(_patches(self._parts(), self._places, self._dense, self.dtype))

    @torch.no_grad()
    def values(self) -> Tensor:
        """All that is tuned in one tensor ``[n]`` of the dtype: every further message."""
        return torch.cat([part.to(self.dtype).flatten() for part in self._parts()])

    def _parts(self) -> Iterator[Tensor]:
        source = self.tuner
        values = source.values if isinstance(source, Delta) else source.state_dict()
        for name, (_, _, order) in self._places.items():
            yield values[name] if order is None else values[name][order.to(values[name].device)]
        dense = source.dense if isinstance(source, Delta) else source.whole(source.dense)
        for name in self._dense:
            yield dense[name].detach()


class WeightReceiver:
    """The other side of a :class:`WeightSync`: it knows from the first message where values lie.

    Args:
        patches: the first message.

    Example:
        >>> receiver = WeightReceiver(patches)
        >>> load_checkpoint_weight_patches(model, [CheckpointWeightPatch(**vars(p)) for p in receiver.patches(values)])
    """

    def __init__(self, patches: Iterable[WeightPatch]) -> None:
        self._known = list(patches)

    def patches(self, values: Tensor) -> list[WeightPatch]:
        """What a later message says.

        Args:
            values: ``[n]``, from :meth:`WeightSync.values`.

        Raises:
            ValueError: another number of them.
        """
        sizes = [p.values.numel() for p in self._known]
        if values.numel() != sum(sizes):
            raise ValueError(f"{values.numel()} values, but the first message was of {sum(sizes)}")
        parts = values.split(sizes)
        return [WeightPatch(p.name, p.shape, values.dtype, v, p.indices) for p, v in zip(self._known, parts, strict=True)]


def write_patches(path: Path_, patches: Iterable[WeightPatch], *, version: int = 0) -> int:
    """Write TRL's sparse safetensors file, in place of what was there, at once.

    ``{name}.idx`` holds ``position[i] - position[i - 1] - 1`` in 16 bits, or in 32 where a gap is too large, ``{name}.val``
    the values in bfloat16.

    Args:
        path: where.
        patches: of different weights.
        version: of the weights, such as the step.

    Returns:
        Bytes of the file.
    """
    tensors: dict[str, Tensor] = {}
    total = changed = 0
    for patch in patches:
        size = torch.Size(patch.shape).numel()
        positions = torch.arange(size) if patch.indices is None else patch.indices.long().cpu()
        gaps = positions.diff(prepend=torch.tensor([-1])) - 1
        small = not gaps.numel() or int(gaps.max()) <= 0xFFFF
        tensors[f"{patch.name}.idx"] = gaps.to(torch.uint16 if small else torch.uint32)
        tensors[f"{patch.name}.val"] = patch.values.detach().to("cpu", torch.bfloat16, copy=True).contiguous()
        total += size
        changed += positions.numel()
    about = {
        "sparse": True,
        "model_version": version,
        "num_changed_params": len(tensors) // 2,
        "total_changed_elements": changed,
        "total_elements": total,
        "sparsity": 1 - changed / max(1, total),
        "encoding": _ENCODING,
    }
    with replaced_at_once(path) as temporary:
        save_file(tensors, temporary, {key: str(value) for key, value in about.items()})
    return Path(path).stat().st_size


def read_patches(path: Path_, shapes: Mapping[str, Any]) -> list[WeightPatch]:
    """Read such a file.

    Args:
        path: of the file.
        shapes: of the weights by name; parameters or tensors will do.

    Raises:
        ValueError: it is no such file, is encoded in another way, or does not fit the shapes.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            encoding = (file.metadata() or {}).get("encoding")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or damaged: {error}") from error
    if encoding != _ENCODING:
        raise ValueError(f"{path} has positions in the encoding {encoding!r}; {_ENCODING!r} is read")
    found = []
    for name in sorted(key.removesuffix(".val") for key in tensors if key.endswith(".val")):
        values, gaps = tensors[f"{name}.val"], tensors.get(f"{name}.idx")
        if gaps is None or gaps.numel() != values.numel() or gaps.dtype not in (torch.uint16, torch.uint32):
            raise ValueError(f"{path}: {name}.idx is missing or does not belong to {name}.val")
        if name not in shapes:
            raise ValueError(f"{path} has values of {name}, which is not among the shapes")
        given = shapes[name]
        shape = tuple(given.shape if isinstance(given, Tensor) else given)
        positions = (gaps.long() + 1).cumsum(0) - 1
        if positions.numel() and int(positions[-1]) >= torch.Size(shape).numel():
            raise ValueError(f"{path}: {name} has positions beyond its shape {list(shape)}")
        found.append(WeightPatch(name, shape, values.dtype, values, positions.to(torch.int32)))
    return found


def _places_of(name: str, weight: WeightSelection) -> tuple[tuple[int, ...], Tensor, Tensor | None]:
    """Shape of a parameter, positions of its entries, ascending, and the order that their values take then."""
    shape = tuple(weight.layout.parameter_shape)
    _check_size(name, shape)
    held = weight.to("cpu")
    view, columns = held.in_memory(torch.empty(shape, dtype=torch.uint8))  # its memory is never touched
    positions = held.rows() * view.stride(0) + columns.long() * view.stride(1)
    if bool((positions.diff() > 0).all()):
        return shape, positions.to(torch.int32), None
    positions, order = positions.sort()
    return shape, positions.to(torch.int32), order


def _check_size(name: str, shape: tuple[int, ...]) -> None:
    if torch.Size(shape).numel() > _MOST:
        raise ValueError(f"{name} has {torch.Size(shape).numel():,} entries, and positions are told in 31 bits")


def _patches(
    parts: Iterator[Tensor],
    places: Mapping[str, tuple[tuple[int, ...], Tensor, Tensor | None]],
    dense: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> Iterator[WeightPatch]:
    for name, (shape, positions, _) in places.items():
        yield WeightPatch(name, shape, dtype, next(parts).to(dtype), positions)
    for name, shape in dense.items():
        yield WeightPatch(name, shape, dtype, next(parts).to(dtype).flatten())
