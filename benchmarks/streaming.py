"""Choosing from and tuning a model that stays in its files: ``python -m benchmarks.streaming [--blocks N] [--folder DIR]``.

A model of about 2 GB is written to safetensors files block by block; then one process chooses from it there by sixteen
batches, another one also takes two steps (blocks checkpointed, entries added beside the layers), and others do so with the
model in memory. Peaks are of the process's memory as Linux counts it, above what it had when everything was imported:
*anonymous* is what the process itself holds, *resident* also has what the system keeps of files that were mapped, and can
drop. Times are of all that, loading included.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.shared.measuring import save, table

WIDTH, HIDDEN = 2048, 8192
WAYS = ("streamed", "in memory")
TASKS = ("choose", "choose and tune")
STEPS = 2
BATCHES = 16


class Block(nn.Module):
    """An MLP with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def build(blocks: int) -> nn.Sequential:
    """So many blocks."""
    return nn.Sequential(*(Block() for _ in range(blocks)))


def write(folder: Path, blocks: int) -> int:
    """Files of a model with random weights, one for each block, and their index; returns bytes of weights."""
    from safetensors.torch import save_file

    from fps_kernels.weights.streaming import INDEX

    torch.manual_seed(0)
    places, count = {}, 0
    for i in range(blocks):
        state = {f"{i}.{name}": t for name, t in Block().state_dict().items()}
        save_file(state, folder / f"block{i}.safetensors")
        places |= dict.fromkeys(state, f"block{i}.safetensors")
        count += sum(t.nbytes for t in state.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return count


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


class Watch:
    """Peaks of this process's memory, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.start = {key: _status(key) for key in ("RssAnon", "VmRSS")}
        self.peak = dict(self.start)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._over.wait(0.005):
            for key in self.peak:
                self.peak[key] = max(self.peak[key], _status(key))

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def above(self, key: str) -> int:
        """Bytes above the start."""
        return self.peak[key] - self.start[key]


def tune(model: nn.Sequential, x: torch.Tensor, tuner: Any) -> float:
    """Steps towards numbers at random, blocks checkpointed; returns the last loss."""
    import fps_kernels as fps

    optimizer = fps.MaskedAdamW(tuner, lr=1e-3)
    goal = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    for _ in range(STEPS):
        y = x
        for block in model:
            y = checkpoint(block, y, use_reentrant=False)
        loss = (y - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def measure(way: str, task: str, folder: Path, blocks: int) -> dict[str, Any]:
    """One way, in this process."""
    from accelerate import init_empty_weights
    from safetensors.torch import load_file

    import fps_kernels as fps

    torch.set_num_threads(1)
    x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1))
    data = list(torch.randn(BATCHES, 16, WIDTH, generator=torch.Generator().manual_seed(3)))
    warm = nn.Linear(8, 8)
    fps.select(warm, [torch.randn(2, 8)], progress=False)  # what is imported and made once
    loss = 0.0
    with Watch() as watch:
        begin = time.perf_counter()
        if way == "streamed":
            with init_empty_weights():
                model = build(blocks)
            selection = fps.select(model, data, dense=[], checkpoint=folder, progress=False)
            if task == TASKS[1]:
                with fps.streamed(model, folder):
                    loss = tune(model, x, fps.attach(model, selection, beside=True))
        else:
            with torch.device("meta"):
                model = build(blocks)
            state = {}
            for i in range(blocks):
                state |= load_file(folder / f"block{i}.safetensors")
            model.load_state_dict(state, assign=True)
            selection = fps.select(model, data, dense=[], progress=False)
            if task == TASKS[1]:
                loss = tune(model, x, fps.attach(model, selection, beside=True))
        seconds = time.perf_counter() - begin
    return {
        "way": way,
        "task": task,
        "anonymous": watch.above("RssAnon"),
        "resident": watch.above("VmRSS"),
        "seconds": seconds,
        "chosen": selection.nnz,
        "loss": loss,
        "checksum": sum(int(w.flat().sum()) for w in selection.values()),
    }


def main() -> None:
    """Measure each way in a process of its own, print, and write ``results/streaming.json``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=14, help="of 134 MB each")
    parser.add_argument("--folder", type=Path, help="for the files; a temporary one without it")
    parser.add_argument("--way", choices=WAYS, help="measure this one here, from files that are there, and print JSON")
    parser.add_argument("--task", choices=TASKS, default=TASKS[0], help="with --way")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.task, options.folder, options.blocks)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        weights = write(Path(name), options.blocks)
        rows = []
        for task, way in itertools.product(TASKS, WAYS):
            command = [sys.executable, "-m", "benchmarks.streaming", "--way", way, "--task", task, "--folder", name]
            command += ["--blocks", str(options.blocks)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    if len({row["checksum"] for row in rows}) > 1:
        raise RuntimeError("the two ways chose different entries")
    if len({row["loss"] for row in rows}) > len(TASKS):
        raise RuntimeError("the two ways came to different losses")
    body = [
        [
            row["task"],
            row["way"],
            f"{row['anonymous'] / 1e6:.0f} MB",
            f"{row['resident'] / 1e6:.0f} MB",
            f"{row['seconds']:.1f}",
        ]
        for row in rows
    ]
    print(f"{weights / 1e9:.2f} GB of weights in {options.blocks} files")
    print(table(["", "", "anonymous", "resident", "s"], body))
    save("streaming", "python -m benchmarks.streaming", rows, weights=weights)


if __name__ == "__main__":
    main()
