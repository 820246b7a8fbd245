"""Every way of choosing stays within the budget."""

from pathlib import Path

from benchmarks.accuracy import ideas, methods, runs


def test_every_idea_keeps_the_budget(folders: Path):
    settings = runs.Settings("test_vit", None, 32, 1, anchor=folders / "two")
    occasion = runs.Workshop(settings).occasion(folders / "one", k=2, seed=1)
    random = methods.CHOICES["random"](occasion)
    for name, idea in ideas.IDEAS.items():
        selection = idea(occasion)
        assert abs(selection.nnz / random.nnz - 1) < 0.15, name  # whole entries per row of fewer rows
        assert selection.dense == random.dense, name
        for w in selection.values():
            assert w.flat().unique().numel() == w.nnz, name
    for name, w in ideas.IDEAS["FPS capped"](occasion).items():
        even = w.nnz / w.layout.shape[1]
        assert int(w.columns.long().bincount().max()) <= 1.25 * max(1, 2 * even), name
