"""The buffers of a delta: what a model with batch norms changes beside its weights."""

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor, nn

from fps_kernels.deltas.file_format import can_hold
from fps_kernels.weights.buffers import has_values, persistent_buffers, same_bits

_NAMED = 3  # buffers that a message names


def first_of(names: Iterable[str]) -> str:
    """Names for a message: the first three, and how many more."""
    listed = list(names)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return ", ".join(listed[:_NAMED]) + more


def loss_of(names: Iterable[str]) -> str:
    """What a warning says first of changed buffers that a delta does not hold."""
    listed = list(names)
    many = f"{len(listed)} buffers" if len(listed) > 1 else "a buffer"
    return f"training changed {many} ({first_of(listed)}) of the model, which the delta does not hold"


def check_places(held: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffers that values are to be written into, by the names of these.

    Args:
        held: the values.
        buffers: of the model, or the tensors of a checkpoint.

    Raises:
        ValueError: one that is missing, has no values or memory of its own, or is of another shape or kind of dtype: a
            floating one may be of another floating dtype, any other must be the same.
    """
    picked = {}
    for name, values in held.items():
        b = buffers.get(name)
        if b is None:
            raise ValueError(f"the delta is of another model: this one has no buffer {name!r}")
        if b.shape != values.shape:
            raise ValueError(
                f"the delta is of another model: the buffer {name} has shape {list(b.shape)} here and {list(values.shape)} "
                "in the delta"
            )
        if b.dtype != values.dtype and not (b.is_floating_point() and values.is_floating_point()):
            raise ValueError(f"the buffer {name} is {b.dtype} here and {values.dtype} in the delta: convert the model back")
        if b.is_meta:
            raise ValueError(f"the buffer {name} is on the meta device and has no values: load the model first")
        if any(size > 1 and stride == 0 for size, stride in zip(b.shape, b.stride(), strict=True)):
            raise ValueError(f"the buffer {name} is an expanded tensor, whose entries share memory: register a clone of it")
        picked[name] = b.detach()
    return picked


def held_and_left_out(changed: Mapping[str, Tensor], wanted: Collection[str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Copies on the CPU of those changed buffers that are wanted and that a file can hold, and the names of the others."""
    held = {n: b.detach().to("cpu", copy=True).contiguous() for n, b in changed.items() if n in wanted and can_hold(b)}
    return held, tuple(n for n in changed if n not in held)


def changed_between(base: nn.Module, tuned: nn.Module, strict: bool) -> dict[str, Tensor]:
    """The persistent buffers of a model that have other bits than those of another, by name.

    Args:
        base: the model before.
        tuned: the model after.
        strict: refuse buffers that no delta can tell of, instead of giving them back as changed.

    Raises:
        ValueError: ``strict``, and one that only one model has, or of another shape, dtype or device, or of a dtype that
            deltas do not hold.
    """
    before, after = persistent_buffers(base), persistent_buffers(tuned)
    if strict and (different := sorted(before.keys() ^ after.keys())):
        raise ValueError(f"the models have different buffers: only one has {different[0]}")
    changed = {}
    for name, b in after.items():
        a = before.get(name)
        if strict and a is not None:
            check_alike(name, a, b)
        if a is None or (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            changed[name] = b
        elif has_values(a) and has_values(b) and not same_bits(a, b):
            changed[name] = b
            if strict and not can_hold(b):
                raise ValueError(
                    f"the buffer {name} is {b.dtype}, which a delta does not hold: buffers=False leaves all out"
                )
    return changed


def check_alike(name: str, p: Tensor, q: Tensor) -> None:
    """Refuse two tensors that differ in more than their numbers.

    Raises:
        ValueError: another shape, dtype or device.
    """
    if p.shape != q.shape or p.dtype != q.dtype or p.device != q.device:
        raise ValueError(
            f"{name} is {p.dtype} {list(p.shape)} on {p.device} in one and {q.dtype} {list(q.shape)} on {q.device} in "
            "the other"
        )
