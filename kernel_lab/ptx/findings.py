"""What is wrong with a kernel, once for each place."""

from collections import Counter
from dataclasses import dataclass, field

NOTE = "note: "  # begins a kind that may be harmless


@dataclass
class Findings:
    """Kinds of faults by where they are, how often they happened, and an example of each.

    A kind that begins with ``"note: "`` is told and is no problem: a value that all threads load is changed by one of them,
    say, or several warps store the same.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, kind: str, where: str, count: int = 1, example: str = "") -> None:
        self.counts[kind, where] += int(count)
        self.examples.setdefault((kind, where), example)

    def problems(self) -> list[str]:
        """A line for each that matters."""
        return self._lines(notes=False)

    def notes(self) -> list[str]:
        return self._lines(notes=True)

    def kinds(self) -> list[str]:
        """The kinds that matter, each once."""
        return sorted({kind for kind, _ in self.counts if not kind.startswith(NOTE)})

    def _lines(self, notes: bool) -> list[str]:
        return [
            f"{kind} at {where} ({count}x) {self.examples[kind, where]}".rstrip()
            for (kind, where), count in self.counts.items()
            if kind.startswith(NOTE) == notes
        ]
