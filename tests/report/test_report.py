"""The HTML report: complete in itself, with the numbers of the files, and safe whatever the names."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import pytest
import torch

import fps_kernels as fps
from fps_kernels.report import Run, report
from fps_kernels.report.figures import BINS
from fps_kernels.report.layers import Layer
from tests.cli.running import cli, output
from tests.support.models import Classifier, images

HOSTILE = ["</script><script>document.title='x'</script>", "<img src=x onerror=alert(1)>", "a&b\"c'd", "[red]e", "<b>f</b>"]


class Page(HTMLParser):
    """The elements of a page, its text, and its scripts."""

    VOID = frozenset({"meta", "link", "img", "br", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.text += data + " "

    @property
    def charts(self) -> dict[str, dict]:
        drawings = re.fullmatch(r"const report = (.*);", self.scripts[1].strip(), re.DOTALL)
        return json.loads(drawings[1])["charts"]


@pytest.fixture
def selections() -> tuple[fps.Selection, fps.Selection]:
    model, batch = Classifier(), images()
    return tuple(fps.select(model, [batch], scorer=s, budget=fps.PerNeuron(2)) for s in (fps.FPS(), fps.Random(1)))


def test_has_the_numbers_and_loads_nothing(selections):
    first, second = selections
    page = Page(report({"file": "a.safetensors", "kind": "selection"}, first, against=("b.safetensors", second)))
    for number in (f"{first.nnz:,}", f"{first.density:.3%}", f"{first.overlap(second):.1%}", "overlap with b.safetensors"):
        assert number in page.text
    for row in first.summary():
        assert f"{row['name']} {'×'.join(map(str, row['shape']))} {row['chosen']:,} {row['density']:.3%}" in page.text
    loads = [(tag, a) for tag, a in page.elements if a.keys() & {"src", "href", "srcset", "data", "action", "poster"}]
    assert loads == []
    assert not {tag for tag, _ in page.elements} & {"link", "img", "iframe", "object", "embed", "base"}
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")  # the browser is told to load nothing, whatever the scripts ask for
    assert "http" not in policy
    assert {"map", "concentration", "distinct", "density", "overlap"} == page.charts.keys()
    assert {a["id"] for tag, a in page.elements if a.get("class") == "chart"} == page.charts.keys()
    assert any(a.get("name") == "viewport" for _, a in page.elements)


def test_charts_show_the_selection(selections):
    first, second = selections
    charts = Page(report({"file": "a"}, first, against=("b", second))).charts
    assert charts["map"]["layout"]["yaxis"]["ticktext"] == [name.removesuffix(".weight") for name in first]
    shown = {p["customdata"][0]: p["y"][0] for p in charts["overlap"]["data"]}
    for name, w in first.items():
        both = (w.mask() & second[name].mask()).sum() / w.nnz
        assert shown[name] == pytest.approx(float(both))
    shown = {p["customdata"][0]: p["y"][0] for p in charts["density"]["data"]}
    assert shown == {name: w.density for name, w in first.items()}


def test_what_is_said_of_a_weight():
    counts = torch.tensor([6, 0, 0, 2, 0, 0, 0, 0])
    layer = Layer("blocks.11.mlp.fc2.weight", "8×8", counts, 64, None)
    assert (layer.chosen, layer.columns, layer.density, layer.distinct) == (8, 8, 0.125, 2)
    assert (layer.kind, layer.short) == ("blocks.*.mlp.fc2", "11 · fc2")
    assert layer.binned(4) == [3.0, 1.0, 0.0, 0.0]  # entries of a column over their mean, which is 1
    assert layer.binned(16) == [6.0] * 2 + [0.0] * 4 + [2.0] * 2 + [0.0] * 8
    assert layer.lorenz(8).tolist() == [0, 0.75, 1, 1, 1, 1, 1, 1, 1]
    assert layer.lorenz(16)[1] == 0.375  # half a column
    assert layer.share_of_fullest(0.125) == 0.75
    assert Layer("0.weight", "1×1", torch.tensor([1]), 1, None).kind == "0"


@pytest.mark.parametrize("columns", [1, 7, BINS - 1, BINS, BINS + 1, 1000])
def test_the_mean_of_a_heat_map_row(columns):
    """Equal columns give 1 in every part, whatever their number; and nothing is lost."""
    even = Layer("a", "", torch.full((columns,), 3), 9 * columns, None)
    assert even.binned(BINS) == pytest.approx([1.0] * BINS)
    counts = torch.randint(0, 9, (columns,)) + (torch.arange(columns) == 0)
    some = Layer("a", "", counts, 10 * columns, None)
    if columns >= BINS:
        part = torch.bincount(torch.arange(columns) * BINS // columns)
        total = sum(v * int(n) for v, n in zip(some.binned(BINS), part, strict=True)) * some.chosen / columns
        assert total == pytest.approx(some.chosen)


def test_hostile_names(tmp_path):
    mask = torch.rand(4, 6) < 0.5
    mask[0, 0] = True
    selection = fps.Selection.from_masks(dict.fromkeys(HOSTILE, mask), dense=(HOSTILE[0],))
    records = [{"type": "eval", "epoch": 1, "step": 1, "loss": 1.0, "accuracy": 0.5, HOSTILE[0]: HOSTILE[1]}]
    run = Run(HOSTILE[0], {HOSTILE[0]: HOSTILE[1]}, records, {})
    about = {"file": f"x{HOSTILE[1]}", "kind": HOSTILE[0], "model": HOSTILE[1], HOSTILE[0]: HOSTILE[0]}
    page = Page(report(about, selection, against=(HOSTILE[0], selection), run=run))
    assert len(page.scripts) == 3
    assert not {tag for tag, _ in page.elements} & {"img", "b"}
    assert not [a for _, a in page.elements for name in a if name.startswith("on")]
    for name in HOSTILE:
        assert name in page.text  # shown as it is
    labels = page.charts["map"]["layout"]["yaxis"]["ticktext"]
    assert not [label for label in labels if re.search(r"[<>]", label)]  # plotly reads tags in its texts
    assert "&lt;b&gt;f&lt;/b&gt;" in labels


def test_many_weights_of_many_kinds():
    mask = torch.ones(2, 3, dtype=torch.bool)
    masks = {f"stages.{i}.kind{i % 11}.weight": mask for i in range(300)}
    charts = Page(report({"file": "a"}, fps.Selection.from_masks(masks))).charts
    names = [trace["name"] for trace in charts["density"]["data"]]
    assert len(names) == 8  # as many as there are colours
    assert names[-1] == "108 others"  # 11 kinds, three of 28 weights and eight of 27: all but the first seven
    assert charts["map"]["layout"]["height"] < 2500
    assert len(charts["map"]["layout"]["yaxis"]["ticktext"]) < 300  # no labels on top of each other


def test_from_the_command_line_with_a_run(selections, tmp_path):
    first, second = selections
    first.save(tmp_path / "a.safetensors")
    second.save(tmp_path / "b.safetensors")
    run = tmp_path / "a.run"
    (run / "state").mkdir(parents=True)
    (run / "settings.json").write_text(json.dumps({"model": "test_vit", "lr": 0.25}))
    (run / "choosing.json").write_text(json.dumps({"seconds": 1.5, "peak_memory": 3 * 2**20, "images": 7}))
    lines = [{"type": "start", "step": 0, "peak_memory": 5 * 2**20}]
    for step in (1, 2, 3, 4):
        train = {"type": "train", "step": step, "epoch": step / 2, "loss": 2.0 / step, "step_seconds": 0.125 * step}
        lines.append(train | {"peak_memory": (5 + step) * 2**20})
        if step % 2 == 0:
            lines.append({"type": "eval", "step": step, "epoch": step // 2, "loss": 1.0 / step, "accuracy": 0.125 * step})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"type": "tr')  # being written
    html = tmp_path / "report.html"
    told = output(
        "inspect", tmp_path / "a.safetensors", "--html", html, "--against", tmp_path / "b.safetensors", "--run", run
    )
    assert told.startswith(f"written: {html}")
    page = Page(html.read_text(encoding="utf-8"))
    for number in ("50.00%", "9.0 MiB", "0.312 s", "1.5 s · 3.0 MiB", "test_vit", "0.25"):
        assert number in page.text, number
    assert page.charts["accuracy"]["data"][0]["y"] == [0.25, 0.5]
    assert [trace["name"] for trace in page.charts["loss"]["data"]] == ["training", "test"]
    assert page.charts["loss"]["data"][0]["y"] == [2.0, 1.0, 2 / 3, 0.5]
    assert page.charts["time"]["data"][0]["y"] == [0.125, 0.25, 0.375, 0.5]
    assert page.charts["memory"]["data"][0]["y"] == [6, 7, 8, 9]
    (run / "metrics.jsonl").write_text("no json\n")
    done = cli("inspect", tmp_path / "a.safetensors", "--html", html, "--run", run)
    assert (done.code, "metrics.jsonl, line 1, is no JSON" in done.message) == (2, True)


def test_of_a_delta(selections, tmp_path):
    model = Classifier()
    with fps.attach(model, selections[0]) as tuner:
        fps.save_delta(tuner, tmp_path / "d.safetensors")
    json_ = output("inspect", tmp_path / "d.safetensors", "--html", tmp_path / "r.html", "--json")
    assert json.loads(json_)["kind"] == "delta"
    text = Page((tmp_path / "r.html").read_text(encoding="utf-8")).text
    size = (tmp_path / "d.safetensors").stat().st_size
    assert f"bytes an entry {size / fps.load_delta(tmp_path / 'd.safetensors').entries:.2f}" in text


def test_what_is_refused(selections, tmp_path):
    first, _ = selections
    other = fps.Selection.from_masks({"hidden.weight": torch.ones(3, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="of different models"):
        report({"file": "a"}, first, against=("b", other))
    with pytest.raises(ValueError, match="a has no chosen entries to draw"):
        report({"file": "a"}, fps.Selection({}))
    with pytest.raises(ValueError, match="is no folder of a run: it has no metrics.jsonl"):
        Run.read(tmp_path)


def test_without_plotly(selections, tmp_path):
    selections[0].save(tmp_path / "a.safetensors")
    with mock.patch.dict(sys.modules, {"plotly": None, "plotly.offline": None}):
        done = cli("inspect", tmp_path / "a.safetensors", "--html", tmp_path / "r.html")
    assert done.code == 2
    assert done.message.endswith("the report needs plotly: pip install plotly")
    assert not Path(tmp_path / "r.html").exists()


def test_weights_without_entries_are_shown_as_such():
    none = torch.zeros(4, 4, dtype=torch.bool)
    selection = fps.Selection.from_masks({"a": none, "b": ~none, "c": ~none})
    other = fps.Selection.from_masks({"a": ~none, "b": none, "c": ~none})
    page = Page(report({"file": "f"}, selection, against=("g", other)))
    assert page.charts["map"]["layout"]["yaxis"]["ticktext"] == ["a", "b", "c"]
    assert [trace["name"] for trace in page.charts["concentration"]["data"]] == ["b", "c", "even"]
    assert [trace["name"] for trace in page.charts["overlap"]["data"]] == ["c"]
    colours = [{t["name"]: t["meta"]["colour"] for t in c["data"] if "meta" in t} for c in page.charts.values()]
    assert {colour["c"] for colour in colours if colour} == {2}  # the same in every chart
    assert "a 4×4 0 0.000% 0 of 4 – –" in re.sub(r"\s+", " ", page.text)


def test_scales_that_one_weight_cannot_spoil():
    """A weight with a single entry, and one that is much denser than the others."""
    even, one = torch.rand(50, 200) < 0.05, torch.zeros(50, 200, dtype=torch.bool)
    one[3, 4] = True
    masks = {f"blocks.{i}.weight": even for i in range(30)} | {"single": one, "dense": torch.ones(4, 4, dtype=torch.bool)}
    charts = Page(report({"file": "a"}, fps.Selection.from_masks(masks))).charts
    axis = charts["map"]["layout"]["coloraxis"]
    assert axis["cmax"] ** 2 < 10
    assert axis["colorbar"]["ticktext"][-1].startswith("≥ ")
    assert charts["density"]["layout"]["yaxis"]["type"] == "log"
