"""What processes send each other, and what each holds, when a sharded model is tuned: ``python -m benchmarks.distributed``.

A small ViT is really trained for some steps by 2, 3 and 4 processes that ``fully_shard`` has cut it over, all of it with
torch's AdamW and then one entry for each neuron, with classifier and biases. *Sent* is what a process sends in a step, as a
ring does it: ``(n - 1) / n`` of what is gathered or added up. *Held* is what a process has between two steps: its pieces,
gradients, optimizer states, indices of chosen entries. *Peak* is the C library's count of memory in use, looked at every
millisecond, above what it was before the model was made; activations are in it.

A formula gives *sent* and *held* of any model and number of processes; the command fails if it does not give what was
counted. That is what the rows of large models are from, which nobody ran.
"""

import argparse
import ctypes
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

import fps_kernels as fps
from benchmarks.shared.measuring import save, table
from fps_kernels.memory.measuring import format_bytes

RUN = "vit_tiny_patch16_224"
LARGE: dict[str, Callable[[], nn.Module]] = {
    "ViT-H/14": lambda: timm.create_model("vit_huge_patch14_224"),
    "ViT-22B": lambda: timm.models.VisionTransformer(
        patch_size=14, embed_dim=6144, depth=48, num_heads=48, mlp_ratio=4, class_token=False, global_pool="avg"
    ),
}
LARGE_RANKS = (8, 64, 512)
WAYS = ("everything", "one entry a neuron")
STEPS, BATCH = 3, 2


# ------------------------------------------------------------------------------------------------ the formula


def _padded(shape: torch.Size, ranks: int) -> int:
    """Numbers that are gathered of a parameter: every process sends as many."""
    return math.ceil(shape[0] / ranks) * ranks * math.prod(shape[1:])


def _is_weight(name: str, p: nn.Parameter) -> bool:
    return p.dim() in (2, 4) and not name.startswith("head")


def _is_whole(name: str) -> bool:
    return name.startswith("head") or (name.endswith("bias") and "norm" not in name)


def formula(model: nn.Module, way: str, ranks: int) -> dict[str, float]:
    """Bytes of a step and between steps, for one process; of float32 weights whose rows are cut."""
    parameters = dict(model.named_parameters())
    share = (ranks - 1) / ranks
    gathered = sum((2 if name.startswith("blocks.") else 1) * _padded(p.shape, ranks) for name, p in parameters.items())
    pieces = sum(math.ceil(p.shape[0] / ranks) * math.prod(p.shape[1:]) for p in parameters.values())
    if way == "everything":
        reduced = sum(_padded(p.shape, ranks) for p in parameters.values())
        held = 4 * pieces * 4
    else:
        weights = [p for name, p in parameters.items() if _is_weight(name, p)]
        whole = [p for name, p in parameters.items() if _is_whole(name)]
        longest = [max(1, math.ceil(math.ceil(p.shape[0] / ranks) / 4)) * 4 for p in weights]
        reduced = ranks * sum(longest) + sum(_padded(p.shape, ranks) for p in whole)
        entries = sum(p.shape[0] for p in weights)
        own = sum(math.ceil(p.shape[0] / ranks) for p in weights)
        of_whole = sum(math.ceil(p.shape[0] / ranks) * math.prod(p.shape[1:]) for p in whole)
        # Values, what was agreed on, gradient, two moments; of what is trained whole gradient and moments. All columns
        # are known to all, and where their rows begin; of its own entries a process has both once more.
        held = 4 * pieces + 4 * (2 * sum(longest) + 3 * own) + 4 * 3 * of_whole
        held += 4 * (2 * entries + len(weights)) + 4 * (2 * own + len(weights))
    return {"gathered": 4 * share * gathered, "reduced": 4 * share * reduced, "held": held}


# ------------------------------------------------------------------------------------------------ really run


class Sent:
    """Counts what collectives are given, by replacing them."""

    def __init__(self) -> None:
        self.bytes = {"gathered": 0.0, "reduced": 0.0}
        self._depth = 0
        for name, kind, place in (
            ("all_gather_single", "gathered", 0),
            ("all_gather_into_tensor", "gathered", 0),
            ("reduce_scatter_single", "reduced", 1),
            ("reduce_scatter_tensor", "reduced", 1),
        ):
            if hasattr(dist, name):
                setattr(dist, name, self._counting(getattr(dist, name), kind, place))

    def _counting(self, function: Any, kind: str, place: int) -> Any:
        names = ("output_tensor", "input_tensor"), ("output", "input")

        def counted(*args: Any, **kwargs: Any) -> Any:
            given = args[place] if len(args) > place else next(kwargs[n[place]] for n in names if n[place] in kwargs)
            if not self._depth:
                ranks = dist.get_world_size()
                self.bytes[kind] += given.numel() * given.element_size() * (ranks - 1) / ranks
            self._depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1

        return counted


class _Mallinfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


def _in_use() -> int:
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = _Mallinfo
    found = libc.mallinfo2()
    return int(found.uordblks + found.hblkhd)


class Peak:
    """Most memory in use meanwhile."""

    def __init__(self) -> None:
        self.most = self.start = _in_use()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.001):
            self.most = max(self.most, _in_use())

    def end(self) -> int:
        self._over.set()
        self._thread.join()
        return self.most - self.start


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield getattr(value, "_local_tensor", value)


def _held(model: nn.Module, optimizer: torch.optim.Optimizer, tuner: fps.Tuner | None) -> int:
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    kept: list[Any] = []
    for p in model.parameters():
        kept += [p, p.grad]
    for state in optimizer.state.values():
        kept += [value for key, value in state.items() if key != "step"]
    for e in [] if tuner is None else tuner._entries.values():
        kept += [e.agreed, e.row_offsets, e.selection.columns, e.here.row_offsets, e.here.columns]
    found = {t.data_ptr(): t.numel() * t.element_size() for t in _tensors(kept) if t.numel()}
    return sum(found.values())


def process(way: str, folder: str) -> None:
    """One of several: train, count, and let the first write what it found."""
    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    peak = Peak()
    model = timm.create_model(RUN)
    sent = Sent()  # before fully_shard looks for what it calls
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    generator = torch.Generator().manual_seed(rank)
    x, y = torch.randn(BATCH, 3, 224, 224, generator=generator), torch.randint(1000, (BATCH,), generator=generator)
    tuner, optimizer = None, None
    if way == "everything":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    else:
        tuner = fps.attach(model, fps.select(model, [x], progress=False))
        optimizer = fps.MaskedAdamW(tuner, lr=1e-4)
    sent.bytes = dict.fromkeys(sent.bytes, 0.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    found = {name: count / STEPS for name, count in sent.bytes.items()}
    found |= {"held": _held(model, optimizer, tuner), "peak": peak.end()}
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of Gloo may outlive the interpreter


def run(way: str, ranks: int) -> dict[str, Any]:
    """So many processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.distributed", "--way", way, "--folder", folder]
        environment = {**os.environ, "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
        children = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(ranks)]
        if sum(child.wait() != 0 for child in children):
            raise RuntimeError("a process failed")
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
    return found


def main() -> None:
    """Run, compare with the formula, print, and write ``results/distributed.json``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4], help="numbers of processes that are really run")
    parser.add_argument("--way", choices=WAYS, help="be one of the processes")
    parser.add_argument("--folder", help="where they meet")
    options = parser.parse_args()
    if options.way:
        process(options.way, options.folder)
    rows: list[dict[str, Any]] = []
    with torch.device("meta"):
        model = timm.create_model(RUN)
    for ranks in options.ranks:
        for way in WAYS:
            found, expected = run(way, ranks), formula(model, way, ranks)
            for key, value in expected.items():
                if abs(found[key] - value) > 0.001 * value:
                    raise RuntimeError(f"{way}, {ranks} processes: {key} is {found[key]:.0f}, the formula says {value:.0f}")
            rows.append({"model": RUN, "ranks": ranks, "way": way, "run": True, **found})
    for name, build in LARGE.items():
        with torch.device("meta"):
            model = build()
        for ranks in LARGE_RANKS:
            rows += [{"model": name, "ranks": ranks, "way": way, "run": False, **formula(model, way, ranks)} for way in WAYS]
    body = [
        [row["model"], str(row["ranks"]), row["way"], *(format_bytes(row[key]) if key in row else "" for key in
         ("gathered", "reduced", "held", "peak"))]
        for row in rows
    ]  # fmt: skip
    print(table(["model", "processes", "tuned", "sent: gathered", "sent: reduced", "held", "peak"], body))
    save("distributed", "python -m benchmarks.distributed", rows)


if __name__ == "__main__":
    main()
