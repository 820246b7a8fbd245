"""Lists of images: CSV, TSV or JSON-lines files of paths and labels, and Hugging Face's ``metadata`` beside images."""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fps_kernels.runs.folders import ImageFiles
from fps_kernels.runs.json_lines import objects

_JSON = (".jsonl", ".ndjson")
ENDINGS = (".csv", ".tsv", *_JSON)
PATHS = ("file_name", "filename", "file", "path", "filepath", "image", "image_path", "image_id")
"""What the column of paths may be called, unless one is named."""
LABELS = ("label", "labels", "class", "class_name", "category", "target", "y")
"""What the column of labels may be called, unless one is named."""
SPLITS = ("split", "subset", "fold")


@dataclass(frozen=True)
class Columns:
    """Which columns of a list to read; ``None``: the first of the usual names that is there.

    Attributes:
        path: of the paths.
        label: of the labels.
    """

    path: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Listed:
    """What a list holds.

    Attributes:
        file: the list.
        root: what its paths are relative to.
        rows: line number, path, label (empty without a column of labels) and split (empty without one).
        has_labels: whether there is a column of labels.
        splits: names in the column of splits, in the order in which they come.
    """

    file: Path
    root: Path
    rows: tuple[tuple[int, str, str, str], ...]
    has_labels: bool
    splits: tuple[str, ...] = field(default=())

    def images(self, split: str | None = None) -> ImageFiles:
        """Its images, or those of one split. Without labels all are of one class.

        Raises:
            ValueError: there are none, one has no label, or a file is not there; the message names the line.
        """
        rows = [row for row in self.rows if split is None or row[3] == split]
        if not rows:
            raise ValueError(f"{self.file} lists no image" + ("" if split is None else f" of the split {split}"))
        files = []
        for line, path, label, _ in rows:
            if self.has_labels and not label:
                raise ValueError(f"{self.file}, line {line}: {path} has no label")
            files.append(self.root / path)
            if not files[-1].is_file():
                raise ValueError(f"{self.file}, line {line}: there is no file {files[-1]}")
        names = {row[2] for row in rows} if self.has_labels else {self.file.stem}
        classes = tuple(sorted(names, key=_in_order(names)))
        numbers = {name: i for i, name in enumerate(classes)}
        labels = tuple(numbers[row[2]] if self.has_labels else 0 for row in rows)
        return ImageFiles(self.root, tuple(files), labels, classes)


def read_list(file: Path, root: Path | None = None, columns: Columns | None = None) -> Listed:
    """Read a list; its first line, or the keys of its objects, name the columns.

    Args:
        file: ends with one of :data:`ENDINGS`.
        root: what paths are relative to; the list's folder if not given.
        columns: which to read.

    Raises:
        ValueError: no such column, a line that cannot be read or has no path.
        OSError: there is no such file.
    """
    columns = columns or Columns()
    named: list[tuple[int, Mapping[str, Any]]] = list(
        objects(file, file.read_text(encoding="utf-8-sig").split("\n")) if file.suffix.lower() in _JSON else _rows(file)
    )
    if not named:
        raise ValueError(f"{file} lists no image")
    known = list(dict.fromkeys(key for _, row in named for key in row))
    path = _column(file, known, columns.path, PATHS, "--path-column")
    if path is None:
        raise ValueError(
            f"{file} has no column of paths: it has {', '.join(known) or 'nothing'}; name it in the first line "
            f"{PATHS[0]}, or say which with --path-column"
        )
    label = _column(file, known, columns.label, LABELS, "--label-column")
    split = next((name for name in known if name.lower() in SPLITS), None)
    rows = []
    for line, row in named:
        where = _text(row.get(path))
        if not where:
            raise ValueError(f"{file}, line {line}, has no path")
        rows.append((line, where, _text(row.get(label)) if label else "", _text(row.get(split)) if split else ""))
    splits = tuple(dict.fromkeys(row[3] for row in rows)) if split else ()
    return Listed(file, file.parent if root is None else root, tuple(rows), label is not None, splits)


def metadata_of(folder: Path) -> Path | None:
    """Hugging Face's list beside the images of a folder, where there is one.

    Raises:
        ValueError: it is a Parquet file, which is not read.
    """
    found = next((folder / f"metadata{ending}" for ending in ENDINGS if (folder / f"metadata{ending}").is_file()), None)
    if found is None and (folder / "metadata.parquet").is_file():
        raise ValueError(f"{folder / 'metadata.parquet'} is not read: write it as metadata.csv or metadata.jsonl")
    return found


def _column(file: Path, known: list[str], wanted: str | None, usual: tuple[str, ...], option: str) -> str | None:
    if wanted is not None:
        if wanted not in known:
            raise ValueError(f"{file} has no column {wanted!r} ({option}): it has {', '.join(known) or 'nothing'}")
        return wanted
    return next((name for one in usual for name in known if name.lower() == one), None)


def _rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as opened:
        reader = csv.DictReader(opened, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                if None in row:
                    raise ValueError(f"{file}, line {reader.line_num}, has more fields than the first line names")
                yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{file}, line {reader.line_num + 1}, cannot be read: {error}") from error


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _in_order(names: set[str]) -> Any:
    """By number where all are numbers, so that class 10 comes after class 9."""
    return int if all(name.isascii() and name.isdigit() for name in names) else str
