"""safetensors files with a description and a checksum, which are distrusted when they are read."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fps_kernels.storage.atomic import replaced_at_once

Path_ = str | PathLike[str]


def write(path: Path_, file_format: str, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with a JSON description and a checksum, in place of what was there, at once.

    Args:
        path: where.
        file_format: name and version of the format.
        content: what JSON can hold.
        tensors: CPU tensors by name.
    """
    described = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    metadata = {"format": file_format, "content": described, "sha256": _checksum(file_format, described, tensors)}
    data = save({name: t.contiguous() for name, t in tensors.items()}, metadata)
    with replaced_at_once(path) as temporary:
        temporary.write_bytes(data)


def read(path: Path_, file_format: str, what: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a file written by :func:`write`.

    Raises:
        ValueError: the file is no such file, is cut off, or was changed; the message names it and says why.
        OSError: it cannot be read.
    """
    data = Path(path).read_bytes()
    metadata = _metadata(data, path)
    if metadata.get("format") != file_format:
        raise ValueError(f"{path} holds no {what}: its format is {metadata.get('format')!r}, not {file_format!r}")
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    described = metadata.get("content")
    if not isinstance(described, str) or metadata.get("sha256") != _checksum(file_format, described, tensors):
        raise ValueError(f"{path} is damaged or was changed: its checksum is wrong")
    try:
        content = json.loads(described)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: its description is no JSON object")
    return content, tensors


def format_of(path: Path_) -> str | None:
    """The format that a file says it has.

    Raises:
        ValueError: it is no safetensors file.
        OSError: it cannot be read.
    """
    found = _metadata(Path(path).read_bytes(), path).get("format")
    return found if isinstance(found, str) else None


@contextmanager
def distrusted(path: Path_) -> Iterator[None]:
    """Where the content of a file is taken apart: whatever does not fit together is a ``ValueError`` that names the file."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path} is damaged: it lacks {error}") from error
    except (TypeError, AttributeError, OverflowError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def whole_number(value: Any, least: int = 0) -> int:
    """What a description says is a whole number.

    Raises:
        ValueError: it is none, or below ``least``.
    """
    if type(value) is not int or value < least:
        raise ValueError(f"{value!r} is no whole number of at least {least}")
    return value


def whole_numbers(value: Any) -> tuple[int, ...]:
    """What a description says is a list of whole numbers, such as a shape.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is no list of whole numbers")
    return tuple(whole_number(item) for item in value)


def texts(value: Any) -> list[str]:
    """What a description says is a list of texts.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{value!r} is no list of texts")
    return value


def texts_by_name(value: Any) -> dict[str, str]:
    """What a description says is a text for each of some names.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ValueError(f"{value!r} is no text for each of some names")
    return value


def _metadata(data: bytes, path: Path_) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError(f"{path} is no safetensors file, or is cut off: it has {len(data)} bytes")
    try:
        header = json.loads(data[8 : 8 + size])
        metadata = header.get("__metadata__", {})
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    return metadata if isinstance(metadata, dict) else {}


def _checksum(file_format: str, described: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{file_format}\n{described}\n".encode())
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {t.dtype} {list(t.shape)}\n".encode())
        digest.update(t.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
