"""What a run's folder keeps of a training: all that its next step depends on."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fps_kernels.runs.averaging import show, values_of
from fps_kernels.runs.images import mixed
from fps_kernels.runs.random_state import packed, random_state, restore_random_state, seed_everything, unpacked

if TYPE_CHECKING:
    from fps_kernels.runs.loop import Training


def save(run: "Training") -> None:
    """Write everything that the rest of a run depends on: the first process does so, with what others have of their own."""
    generators, states = random_state(run.loaded.device)
    others = [] if run.processes.size == 1 else run.processes.collected(packed(generators, states))
    losses = run.processes.collected(torch.stack([run.at.loss.cpu(), torch.tensor(run.at.images).double()]))
    if not run.processes.first:
        return
    tensors = {f"compact:{name}": p.detach() for name, p in run.tuner.compact.items()}
    tensors |= {f"dense:{name}": p.detach() for name, p in run.tuner.dense.items()}
    buffers = dict(run.loaded.model.named_buffers())
    tensors |= {f"buffer:{name}": buffers[name].detach() for name in run.changed_buffers()}
    for index, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer:{index}:{key}": value for key, value in state.items()}
    if run.average is not None:
        tensors |= {f"average:{name}": t for name, t in run.average.held.items()}
    tensors |= {f"random:{name}": t for name, t in states.items()} | {"loss": run.at.loss}
    for rank in range(1, run.processes.size):
        tensors |= {f"process:{rank}:random": others[rank], f"process:{rank}:loss": losses[rank]}
    content = {
        "step": run.at.step,
        "evaluated": run.at.evaluated,
        "best": run.at.best,
        "best_loss": run.at.best_loss,
        "best_epoch": run.at.best_epoch,
        "waited": run.at.waited,
        "scaler": run.scaler.state_dict(),
        "images": run.at.images,
        "last_loss": run.last_loss,
        "random": generators,
    }
    run.folder.save(content, {name: t.to("cpu", copy=True) for name, t in tensors.items()})


@torch.no_grad()
def restore(run: "Training") -> bool:
    """Go on from what was saved, if anything was.

    Raises:
        ValueError: a state that is damaged, or of another selection.
    """
    found = run.folder.load(cut=run.processes.first)
    if found is None:
        return False
    content, tensors = found
    parts: dict[str, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        kind, _, rest = name.partition(":")
        parts.setdefault(kind, {})[rest] = t
    try:
        for name, p in run.tuner.dense.items():
            p.copy_(parts["dense"][name])
        run.tuner.load_state_dict(parts.get("compact", {}))
        for name, b in run.loaded.model.named_buffers():
            if name in parts.get("buffer", {}):
                b.copy_(parts["buffer"][name])
        state: dict[int, dict[str, Tensor]] = {}
        for name, t in parts.get("optimizer", {}).items():
            index, _, key = name.partition(":")
            state.setdefault(int(index), {})[key] = t
        run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state})
        for group in run.optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # what a schedule that does not start at step 0 goes by
        for key in ("step", "evaluated", "images", "best", "best_loss", "best_epoch", "waited"):
            setattr(run.at, key, content[key])
        run.scaler.load_state_dict(content["scaler"])
        if run.average is not None:
            for name, t in run.average.held.items():
                t.copy_(parts["average"][name])
        run.at.loss.copy_(tensors["loss"])
        run.last_loss = content["last_loss"]
        _restore_own(run, content, parts)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"the state in {run.folder.path} is damaged: {error!r}") from error
    return True


def save_best(run: "Training") -> None:
    """Keep what the model has now, as the best so far."""
    tensors = {f"value:{name}": t for name, t in values_of(run.tuner).items()}
    buffers = dict(run.loaded.model.named_buffers())
    tensors |= {f"buffer:{name}": buffers[name].detach() for name in run.changed_buffers()}
    content = {"epoch": run.at.best_epoch, "accuracy": run.at.best}
    run.folder.save_best(content, {name: t.to("cpu", copy=True) for name, t in tensors.items()})


@torch.no_grad()
def restore_best(run: "Training") -> None:
    """Let the model have the best values.

    Raises:
        ValueError: they are damaged, or of another selection.
    """
    tensors = run.folder.load_best()[1]
    try:
        show(run.tuner, {name: tensors[f"value:{name}"] for name, _ in run.tuner.named_parameters()})
        for name, b in run.loaded.model.named_buffers():
            if f"buffer:{name}" in tensors:
                b.copy_(tensors[f"buffer:{name}"])
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"the best values in {run.folder.path} are damaged: {error!r}") from error


def _restore_own(run: "Training", content: dict[str, Any], parts: dict[str, dict[str, Tensor]]) -> None:
    """What each process has of its own: generators, and losses since the last record."""
    ranks, rank, own = run.processes.size, run.processes.rank, parts.get("process", {})
    before = 1 + len(own) // 2
    if before != ranks:  # as many as there are now: what others added up is the first one's
        for other in range(1, before) if rank == 0 else ():
            loss, images = own[f"{other}:loss"].tolist()
            run.at.loss += loss
            run.at.images += int(images)
        if rank:
            run.at.loss.zero_()
            run.at.images = 0
            seed_everything(mixed(run.recipe.seed, rank, run.at.step))
            return
    elif rank:
        loss, images = own[f"{rank}:loss"].tolist()
        run.at.loss.fill_(loss)
        run.at.images = int(images)
        restore_random_state(*unpacked(own[f"{rank}:random"]), run.loaded.device)
        return
    restore_random_state(content["random"], parts["random"], run.loaded.device)
