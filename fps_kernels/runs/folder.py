"""The folder of a run: its settings, its metrics, and the state from which it goes on. Nothing in it is pickled."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from fps_kernels.runs.json_lines import objects
from fps_kernels.storage.atomic import replaced_at_once
from fps_kernels.storage.checked_file import read, write

FORMAT = "fps_kernels.run.3"
BEST_FORMAT = "fps_kernels.best.1"


class RunFolder:
    """A folder with these files.

    ``settings.json``: what the run depends on; ``config.yaml``: the options of the command, for ``--config``;
    ``selection.safetensors``: what is tuned; ``choosing.json``: what that choice cost; ``metrics.jsonl``: one JSON object a
    line, in the order of the steps; ``state/state.safetensors``: where the run is, replaced at once whenever it is saved;
    ``best/best.safetensors``: what was best, if that is to be kept; ``evaluation.json``: what the tuned model did on the
    images it was measured on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.selection = path / "selection.safetensors"
        self.metrics = path / "metrics.jsonl"
        self._settings = path / "settings.json"
        self._choosing = path / "choosing.json"
        self._best = path / "best" / "best.safetensors"
        self.evaluation = path / "evaluation.json"
        self.config = path / "config.yaml"
        self._state = path / "state" / "state.safetensors"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, and keep it for this process alone; the operating system lets go of it if the process dies.

        Raises:
            ValueError: another process has it, or what is there is no folder of a run.
        """
        if self.path.exists() and (not self.path.is_dir() or (any(self.path.iterdir()) and not self._known())):
            raise ValueError(f"{self.path} is there already and is no run folder: give another --run")
        for file in (self._state, self._best):
            file.parent.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as lock:
            try:
                # Not flock: processes that read images would inherit it, and outlive a killed one for a while.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(f"another process is tuning in {self.path}") from error
            for file in (self._state, self._best):
                for stray in file.parent.glob(".*"):  # of a process that was killed while it saved
                    stray.unlink()
            yield

    def _known(self) -> bool:
        return (self.path / "state").is_dir() or self._settings.is_file()

    def check_settings(self, settings: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """Keep the settings of a new run; compare them with those of one that is there.

        Args:
            settings: what JSON can hold, by the names of the options.
            options: of the command, kept for ``--config``.

        Raises:
            ValueError: the run has others; the message names the first that differs.
        """
        now = json.loads(json.dumps(settings))
        if not self._settings.is_file():
            with replaced_at_once(self._settings) as temporary:
                temporary.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            with replaced_at_once(self.config) as temporary:
                temporary.write_text(yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True), encoding="utf-8")
            return
        try:
            before = json.loads(self._settings.read_text(encoding="utf-8"))
            different = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{self._settings} is damaged: {error}") from error
        if different:
            key = different[0]
            more = f" (and {', '.join(different[1:])})" if len(different) > 1 else ""
            raise ValueError(
                f"{self.path} holds a run of other settings: {key} is {_shown(before.get(key))} there and "
                f"{_shown(now.get(key))} here{more}; give another --run, or remove the folder"
            )

    @property
    def choosing(self) -> dict[str, float]:
        """What the choice of the run cost; empty where it was made before."""
        found = json.loads(self._choosing.read_text(encoding="utf-8")) if self._choosing.is_file() else {}
        return found if isinstance(found, dict) else {}

    def note_choosing(self, cost: Mapping[str, float]) -> None:
        """Keep what the choice of the run cost."""
        with replaced_at_once(self._choosing) as temporary:
            temporary.write_text(json.dumps(cost) + "\n", encoding="utf-8")

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the run; empty where there is none."""
        if not self._settings.is_file():
            return {}
        found = json.loads(self._settings.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}

    def save(self, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Replace the state at once: whoever is killed meanwhile leaves the one before."""
        size = 0
        if self.metrics.is_file():
            with self.metrics.open("rb") as file:  # what the state counts on must not be lost by a power failure
                os.fsync(file.fileno())
                size = os.fstat(file.fileno()).st_size
        write(self._state, FORMAT, {**content, "metrics_bytes": size}, tensors)

    def load(self, cut: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The saved state, and the metrics cut back to it; ``None`` if nothing was saved.

        Args:
            cut: of several processes one cuts the metrics.

        Raises:
            ValueError: it is damaged, or the metrics were changed.
        """
        if not self._state.is_file():
            if cut:
                self.metrics.unlink(missing_ok=True)
            return None
        content, tensors = read(self._state, FORMAT, "state of a run")
        if not cut:
            return content, tensors
        size = self.metrics.stat().st_size if self.metrics.is_file() else 0
        if size < content["metrics_bytes"]:
            raise ValueError(f"{self.metrics} is shorter than it was when the run was saved: it was changed")
        if size > content["metrics_bytes"]:  # of steps that are done again
            os.truncate(self.metrics, content["metrics_bytes"])
        return content, tensors

    def save_best(self, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Replace the best values so far."""
        write(self._best, BEST_FORMAT, content, tensors)

    def load_best(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What :meth:`save_best` was given last.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        if not self._best.is_file():
            raise ValueError(f"{self.path} holds no best values")
        return read(self._best, BEST_FORMAT, "best values of a run")

    def record(self, record: Mapping[str, Any]) -> None:
        """Add a line to the metrics."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run's ``metrics.jsonl``. A last line that is not complete yet is left out.

    Raises:
        ValueError: a line that is no JSON object.
        OSError: it cannot be read.
    """
    return [record for _, record in objects(path, path.read_text(encoding="utf-8").split("\n")[:-1])]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}…"
