"""The file ``results/accuracy.jsonl``: a line for every finished run, read and added to by processes that may be killed."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Line = dict[str, Any]
# The same in bfloat16, and the one that it is held against.
COARSER = {"FPS, bfloat16 weights": "FPS", "FPS, bfloat16 products": "FPS"}
# Methods that keep their activations in fewer bits, and the one that each is held against, whose learning rate it takes.
FEWER_BITS = {"FPS, 8 bits": "FPS", "LoRA r=8, 8 bits": "LoRA r=8", "FPS, GELU in 4 bits": "FPS"}


def read(path: Path) -> list[Line]:
    """The lines of a results file; a last line that was cut off is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def append(path: Path, line: Line) -> None:
    """Add one line, at once and for good, after repairing a last line that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def to_bits(right: Tensor) -> str:
    """Booleans as hexadecimal digits, four to a digit, the first in the highest bit, filled up with zeros."""
    digits = "".join("1" if r else "0" for r in right.tolist())
    digits += "0" * (-len(digits) % 4)
    return f"{int(digits, 2):0{len(digits) // 4}x}" if digits else ""


def from_bits(bits: str, count: int) -> Tensor:
    """The booleans ``[count]`` that :func:`to_bits` wrote."""
    digits = f"{int(bits, 16):0{4 * len(bits)}b}" if bits else ""
    return torch.tensor([d == "1" for d in digits[:count]], dtype=torch.bool)
