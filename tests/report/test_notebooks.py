"""What notebooks show: tables of selections, deltas, plans and tuners, and single charts."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import fps_kernels as fps
from fps_kernels.report import Run, figure
from fps_kernels.runs.evaluation import Evaluation
from tests.support.models import Classifier, images


class Table(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.cells: list[str] = []
        self.scripts = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.scripts += tag in ("script", "img", "b")

    def handle_data(self, data):
        if data.strip():
            self.cells.append(data.strip())


@pytest.fixture
def selection():
    torch.manual_seed(0)
    return fps.select(Classifier(), [images(8)], budget=fps.PerNeuron(3), progress=False)


def test_tables(selection):
    model = Classifier()
    found = Table(selection._repr_html_())
    assert f"Selection: {selection.nnz:,} entries, {selection.density:.3%}" in found.cells
    for name in selection:
        assert name.removesuffix(".weight") in found.cells
    with fps.attach(model, selection) as tuner:
        assert repr(tuner) in Table(tuner._repr_html_()).cells
        delta = fps.diff(Classifier(), Classifier())
    assert Table(delta._repr_html_()).cells
    plan = fps.memory.plan(Classifier, 2, input_size=(3, 8, 8), methods=["forward", "attach"], memory=10**9)
    cells = Table(plan._repr_html_()).cells
    assert {"forward", "attach", "peak", "largest batch in 953.7 MiB"} <= set(cells)
    assert plan._ipython_key_completions_() == ["forward", "attach"]
    assert selection._ipython_key_completions_() == list(selection)


def test_names_are_no_markup():
    hostile = "<script>alert(1)</script><img src=x><b>"
    masks = {hostile: torch.ones(2, 2, dtype=torch.bool)}
    found = Table(fps.Selection.from_masks(masks)._repr_html_())
    assert found.scripts == 0
    assert hostile in found.cells


def test_deep_models_are_told_by_kind():
    masks = {f"blocks.{i}.fc.weight": torch.ones(2, 3, dtype=torch.bool) for i in range(30)}
    cells = Table(fps.Selection.from_masks(masks)._repr_html_()).cells
    assert "blocks.*.fc" in cells
    assert "30" in cells


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_charts_of_a_selection(selection, theme):
    for chart in ("map", "concentration", "distinct", "density"):
        made = figure(selection, chart, theme=theme)
        assert made.data
        assert made.layout.paper_bgcolor == ("#ffffff" if theme == "light" else "#1b1f26")
    assert selection.plot("overlap", against=selection).data[0].y[0] == 1.0
    with pytest.raises(ValueError, match=r"chart must be one of map, .*, got 'overlap' \(overlap needs against=\)"):
        selection.plot("overlap")
    with pytest.raises(ValueError, match="theme must be one of light, dark, got 'blue'"):
        figure(selection, theme="blue")
    with pytest.raises(ValueError, match="has no chosen entries to draw"):
        fps.Selection({}).plot()


def test_charts_of_runs_and_evaluations():
    records = [
        {"type": "eval", "epoch": e, "step": e, "loss": 1 / e, "accuracy": e / 4, "split": "validation"} for e in (1, 2, 3)
    ]
    run = Run("task.run", {}, records, {})
    made = figure(run, "accuracy")
    assert list(made.data[0].y) == [0.25, 0.5, 0.75]
    assert made.data[0].name == "validation"
    found = Evaluation("images", 5, 0.5, 0.6, None, ("a", "b"), ((0, 0, 2), (0, 1, 1), (1, 0, 1), (1, 1, 1)), ())
    assert [list(row) for row in figure(found, "confusion").data[0].z] == [[2 / 3, 1 / 3], [0.5, 0.5]]
    assert sorted(figure(found, "classes").data[0].x) == [0.5, 2 / 3]


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/data/of/someone/pictures/test/dog/0007.png", "…/pictures/test/dog/0007.png"),
        ("/a/b.png", "/a/b.png"),
        (f"test/{'x' * 40}.png", f"…/{'x' * 40}.png"),
        ("image 12", "image 12"),
    ],
)
def test_paths_of_images_are_cut_between_folders(path, shown):
    from fps_kernels.report.outcomes import worst_images
    from fps_kernels.runs.evaluation import Mistake

    found = Evaluation("images", 1, 3.0, 0.0, None, ("a", "b"), ((0, 1, 1),), (Mistake(path, "a", "b", 0.9, 3.0),))
    assert f'<span title="{path}">{shown}</span>' in worst_images(found)


def test_a_page_of_an_evaluation_whose_images_are_gone(selection, tmp_path: Path):
    from fps_kernels.report import report
    from fps_kernels.runs.evaluation import Mistake

    worst = (Mistake(str(tmp_path / "gone.png"), "<b>", "b", 0.9, 3.0),)
    found = Evaluation("images", 1, 3.0, 0.0, None, ("<b>", "b"), ((0, 1, 1),), worst)
    page = report({"file": "x", "kind": "delta"}, selection, evaluation=found)
    assert "&lt;b&gt;</b> taken for <b>b</b> (90%)" in page
    assert "gone.png" in page
    assert "data:image/jpeg" not in page
