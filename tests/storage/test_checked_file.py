"""Files that are there whole or not at all."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from fps_kernels.storage import checked_file


def test_a_killed_save_leaves_the_old_file_or_the_new(tmp_path):
    path = tmp_path / "task.safetensors"
    program = f"""
import torch
from fps_kernels.storage import checked_file
print("ready", flush=True)
i = 0
while True:
    checked_file.write({str(path)!r}, "test", {{"i": i}}, {{"x": torch.full((1_000_000,), float(i))}})
    i += 1
"""
    for wait in (0.0, 0.05, 0.12):
        running = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True
        )
        assert running.stdout.readline() == "ready\n"
        time.sleep(wait)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        if path.exists():
            content, tensors = checked_file.read(path, "test", "test")
            assert (tensors["x"] == content["i"]).all()
