"""Where deltas come from: a tuner, a file, two models."""

import warnings

import torch
from torch import Tensor, nn

from fps_kernels import ops
from fps_kernels._version import __version__
from fps_kernels.deltas.buffers import changed_between, check_alike, held_and_left_out, loss_of
from fps_kernels.deltas.delta import Delta
from fps_kernels.selection import Selection, WeightSelection
from fps_kernels.storage.checked_file import Path_
from fps_kernels.tuning.beside import BesideTuner
from fps_kernels.tuning.compact_values import settle
from fps_kernels.tuning.tuner import Tuner
from fps_kernels.weights.fingerprint import fingerprint, own_parameters

_WORTH_SPARSE = 0.5  # a weight that changed in more of its entries is stored whole


def save_delta(tuner: Tuner, path: Path_, dtype: torch.dtype | None = None, buffers: bool = False) -> None:
    """Write what a tuner has tuned so far to a small safetensors file, at most 6 bytes an entry, or 4 in bfloat16.

    A model with batch norms, or others that keep statistics, changes its buffers while it is tuned in training mode. Without
    them the base model does not predict what the tuned one does: a warning says so where they changed and are left out.

    All processes of a sharded model have to call this; the first of them writes the same file as one process would.

    Args:
        tuner: from :func:`fps_kernels.attach`, detached or not.
        path: where; what is there is replaced at once, or stays if the writing fails.
        dtype: ``torch.float32`` or ``torch.bfloat16`` for the values; if not given, compact values are float32.
        buffers: also hold the persistent buffers that changed since :func:`fps_kernels.attach`, whole and bit by bit.

    Raises:
        ValueError: another dtype, or parameters of the model that were replaced since it was attached.

    Example:
        >>> fps.save_delta(tuner, "task.safetensors", buffers=True)
        >>> fps.load_delta("task.safetensors").apply_(base_model)
    """
    delta = delta_of(tuner, buffers)
    if not tuner.is_sharded:
        delta.save(path, dtype)
    else:
        try:
            if torch.distributed.get_rank() == 0:
                delta.save(path, dtype)
        finally:  # whoever reads it next finds it
            torch.distributed.barrier()
    if delta.buffers_left_out:
        cure = (
            "a base model has no place for them (they are new, or of another shape), or a file has none for their dtype"
            if buffers
            else "what it is applied to will not predict what this model does; buffers=True holds them"
        )
        warnings.warn(f"{loss_of(delta.buffers_left_out)}: {cure}", stacklevel=2)


def load_delta(path: Path_) -> Delta:
    """Read a file of :func:`save_delta`; see :meth:`Delta.load`.

    Example:
        >>> delta = fps.load_delta("task.safetensors")
        >>> delta.apply_(model)
        >>> delta.revert_(model)
    """
    return Delta.load(path)


def delta_of(tuner: Tuner, buffers: bool = False) -> Delta:
    """What a tuner has tuned so far, as a delta to the model that was attached; see :func:`save_delta`.

    Raises:
        ValueError: the model has other parameters by now: what they hold would not be in the delta.
    """
    if tuner.attached:
        tuner.check_places()
    values = {name: v.to("cpu", copy=True) for name, v in tuner.state_dict().items()}
    dense = {name: p.to("cpu", copy=True) for name, p in tuner.whole(tuner.dense).items()}
    changed = tuner.buffers.changed(tuner.model)
    held, left_out = held_and_left_out(changed, {n for n, b in changed.items() if buffers and tuner.buffers.has(n, b.shape)})
    added = isinstance(tuner, BesideTuner)
    return Delta(tuner.selection.to("cpu"), values, dense, tuner.base, package_versions(), held, left_out, added)


@torch.no_grad()
def diff(base: nn.Module, tuned: nn.Module, buffers: bool = True) -> Delta:
    """What changed from one model to another, bit by bit: ``base`` with it is ``tuned``.

    Args:
        base: the model before.
        tuned: the model after, with the same parameters and persistent buffers, on the same device and of the same dtypes.
        buffers: also hold the buffers that changed; if not, only their names are noted (``buffers_left_out``).

    Returns:
        A delta to ``base``: the changed entries of each weight, whole parameters where more than half of one changed, whole
        buffers.

    Raises:
        ValueError: models with different parameters or buffers, or changes in parameters of another dtype.

    Example:
        >>> fps.diff(base, tuned).save("task.safetensors")
    """
    for model in (base, tuned):
        settle(model)
    before, after = own_parameters(base), own_parameters(tuned)
    if different := sorted(before.keys() ^ after.keys()):
        raise ValueError(f"the models have different parameters: only one has {different[0]}")
    masks, values, dense = {}, {}, {}
    for name, p in before.items():
        q = after[name]
        check_alike(name, p, q)
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
    others = changed_between(base, tuned, strict=buffers)
    held, left_out = held_and_left_out(others, others if buffers else ())
    return Delta(selection, values, dense, fingerprint(base), package_versions(), held, left_out)


def _bits(p: Tensor) -> Tensor:
    return p.detach().contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()])


def package_versions() -> dict[str, str]:
    """What wrote a delta."""
    return {"fps_kernels": __version__, "torch": str(torch.__version__)}
