"""The CSR of a weight and the mapping of a model: validation, set algebra, files, printing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fps_kernels as fps
from fps_kernels.selection import Selection, WeightSelection
from fps_kernels.weights.matrix import MatrixLayout
from tests.support.models import Classifier, images

LAYOUT = MatrixLayout((3, 4))


def csr(offsets: list[int], columns: list[int], layout: MatrixLayout = LAYOUT) -> WeightSelection:
    return WeightSelection(layout, torch.tensor(offsets, dtype=torch.int32), torch.tensor(columns, dtype=torch.int32))


def masks_of(*shape: int):
    size = int(torch.tensor(shape).prod())
    return st.lists(st.booleans(), min_size=size, max_size=size).map(lambda bits: torch.tensor(bits).view(shape))


@given(masks_of(3, 4))
def test_masks_round_trip(mask):
    entries = WeightSelection.from_mask(mask)
    assert torch.equal(entries.mask(), mask)
    assert entries.nnz == int(mask.sum())
    assert torch.equal(entries.flat(), mask.flatten().nonzero().squeeze(1))


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 2, 2), (0, 3), (3, 0), ()])
def test_masks_of_any_shape(shape):
    mask = torch.rand(shape) > 0.5
    if not shape:
        with pytest.raises(ValueError, match="at least one dimension"):
            WeightSelection.from_mask(mask)
    else:
        assert torch.equal(WeightSelection.from_mask(mask).mask(), mask)


def test_transposed_masks():
    mask = torch.rand(4, 6) > 0.5
    entries = WeightSelection.from_mask(mask, (1,))
    assert entries.layout.shape == (6, 4)
    assert torch.equal(entries.mask(), mask)


@pytest.mark.parametrize(
    ("offsets", "columns", "match"),
    [
        ([0, 1, 1], [0], "row_offsets must have 4 items for 3 rows, got 3"),
        ([1, 1, 1, 1], [0], "rise from 0 to the 1 columns"),
        ([0, 1, 1, 2], [0], "rise from 0 to the 1 columns"),
        ([0, 2, 1, 2], [0, 1], "rise from 0 to the 2 columns"),
        ([0, 1, 1, 1], [4], r"columns must lie in \[0, 4\), found 4"),
        ([0, 1, 1, 1], [-1], r"columns must lie in \[0, 4\), found -1"),
        ([0, 2, 2, 2], [1, 1], "must ascend, without repetition"),
        ([0, 1, 3, 3], [3, 2, 0], "must ascend, without repetition"),
    ],
)
def test_invalid_csr_is_refused(offsets, columns, match):
    with pytest.raises(ValueError, match=match):
        csr(offsets, columns)


def test_valid_csr():
    entries = csr([0, 2, 2, 4], [1, 3, 0, 2])
    assert entries.rows().tolist() == [0, 0, 2, 2]
    assert entries.density == 4 / 12
    with pytest.raises(TypeError, match="row_offsets must be int32"):
        WeightSelection(LAYOUT, torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int32))
    with pytest.raises(ValueError, match="columns must be one-dimensional"):
        WeightSelection(LAYOUT, torch.zeros(4, dtype=torch.int32), torch.zeros(0, 1, dtype=torch.int32))


@settings(deadline=None)
@given(masks_of(3, 4), masks_of(3, 4), masks_of(2, 2))
def test_set_algebra(first, second, third):
    a = Selection.from_masks({"w": first, "only in a": third}, dense=("bias",))
    b = Selection.from_masks({"w": second})
    union, common = a | b, a & b
    assert torch.equal(union["w"].mask(), first | second)
    assert torch.equal(union["only in a"].mask(), third)
    assert torch.equal(common["w"].mask(), first & second)
    assert list(common) == ["w"]
    assert (union.dense, common.dense) == (("bias",), ())
    smaller = min(int(first.sum() + third.sum()), int(second.sum()))
    assert a.overlap(b) == pytest.approx(int((first & second).sum()) / smaller if smaller else 1.0)
    assert a.overlap(a) == 1.0


def test_set_algebra_with_weights_trained_whole():
    mask = torch.eye(3).bool()
    some, whole = Selection.from_masks({"w": mask}), Selection({}, dense=("w",))
    for union in (some | whole, whole | some):
        assert (dict(union), union.dense) == ({}, ("w",))
    for common in (some & whole, whole & some):
        assert torch.equal(common["w"].mask(), mask)
        assert common.dense == ()


def test_selections_of_different_models():
    a, b = (Selection.from_masks({"w": torch.ones(shape, dtype=torch.bool)}) for shape in ((3, 4), (4, 3)))
    for operation in (lambda: a | b, lambda: a & b, lambda: a.overlap(b)):
        with pytest.raises(ValueError, match=r"different models: w has shape \(3, 4\) in one and \(4, 3\)"):
            operation()


def test_it_is_a_mapping():
    selection = fps.select(Classifier(), [images()], budget=fps.PerNeuron(2))
    assert len(selection) == 3
    assert "hidden.weight" in selection
    assert list(selection) == ["embed.weight", "hidden.weight", "out.weight"]
    assert selection.nnz == 2 * (12 + 20 + 12)
    assert selection.density == pytest.approx(selection.nnz / (12 * 48 + 20 * 12 + 12 * 20))
    assert set(selection.masks()) == set(selection)
    text = str(selection)
    for part in (
        "embed.weight",
        "12×3×4×4",
        "4.167%",
        "16.667%",
        "10.000%",
        "PerNeuron(k=2)",
        "FPS()",
        "4 parameters trained whole",
    ):
        assert part in text
    assert [row["chosen"] for row in selection.summary()] == [24, 40, 24]
    with pytest.raises(KeyError):
        selection["nothing"]


def test_exclude():
    selection = fps.select(Classifier(), [images()])
    assert list(selection.exclude("hidden*", "out*")) == ["embed.weight"]
    with pytest.raises(ValueError, match="matches none of the selected weights"):
        selection.exclude("nothing*")


def test_save_and_load(tmp_path):
    selection = fps.select(Classifier(), [images()], budget=fps.Global(0.05))
    selection.save(tmp_path / "s.safetensors")
    loaded = Selection.load(tmp_path / "s.safetensors")
    assert list(loaded) == list(selection)
    for name in selection:
        assert loaded[name].layout == selection[name].layout
        assert torch.equal(loaded[name].columns, selection[name].columns)
        assert torch.equal(loaded[name].row_offsets, selection[name].row_offsets)
    for field in ("dense", "skipped", "tied", "description"):
        assert getattr(loaded, field) == getattr(selection, field)
    fps.calibrate(Classifier(), [images()]).save(tmp_path / "stats.safetensors")
    with pytest.raises(ValueError, match="holds no selection"):
        Selection.load(tmp_path / "stats.safetensors")


def test_names_and_choices_that_are_unusual(tmp_path):
    """One choice of two weights, and names with the separator of the file's keys."""
    entries = csr([0, 1, 1, 2], [0, 3])
    Selection({"a:columns": entries, "a": entries, 'é "\n*': entries}).save(tmp_path / "s.safetensors")
    loaded = Selection.load(tmp_path / "s.safetensors")
    assert list(loaded) == ["a:columns", "a", 'é "\n*']
    assert all(torch.equal(w.flat(), entries.flat()) for w in loaded.values())


def test_tampered_files_are_refused(tmp_path):
    from safetensors.torch import load, save_file

    from fps_kernels.storage import checked_file

    path = tmp_path / "s.safetensors"
    fps.select(Classifier(), [images()]).save(path)
    content, tensors = checked_file.read(path, "fps_kernels.selection.1", "selection")
    before = tensors["out.weight:columns"][3].clone()
    tensors["out.weight:columns"][3] = 20
    checked_file.write(path, "fps_kernels.selection.1", content, tensors)  # with a checksum that is right
    with pytest.raises(ValueError, match=r"out.weight: columns must lie in \[0, 20\), found 20"):
        Selection.load(path)
    tensors["out.weight:columns"][3] = before
    checked_file.write(path, "fps_kernels.selection.1", {**content, "weights": {"missing": [[2, 2], [0], 1]}}, tensors)
    with pytest.raises(ValueError, match="damaged: it lacks 'missing:row_offsets'"):
        Selection.load(path)
    for lie in (
        {"dense": [1]},
        {"dense": "head.weight"},
        {"skipped": {"a": 1}},
        {"tied": []},
        {"weights": {"out.weight": [[12, 20, 1.0], [0], 1]}},
        {"weights": {"out.weight": [[12, 20], 0]}},
        {"weights": {"out.weight": [[], False]}},
        {"weights": {"out.weight": 3}},
        {"weights": []},
    ):
        checked_file.write(path, "fps_kernels.selection.1", {**content, **lie}, tensors)
        with pytest.raises(ValueError, match="damaged"):
            Selection.load(path)
    for missing in content:
        rest = {key: value for key, value in content.items() if key != missing}
        checked_file.write(path, "fps_kernels.selection.1", rest, tensors)
        with pytest.raises(ValueError, match=f"damaged: it lacks '{missing}'"):
            Selection.load(path)
    save_file(load(path.read_bytes()), path, {"format": "fps_kernels.selection.1", "content": "{}", "sha256": "0"})
    with pytest.raises(ValueError, match="checksum is wrong"):
        Selection.load(path)


def test_check_names_what_differs():
    selection = fps.select(Classifier(), [images()])
    assert set(selection.check(Classifier())) == {*selection, *selection.dense}
    with pytest.raises(ValueError, match="another model: this one has no parameter 'embed.weight'"):
        selection.check(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"embed.weight has shape \[12, 3, 8, 8\] here, \[12, 3, 4, 4\] in the selection"):
        other = Classifier()
        other.embed = torch.nn.Conv2d(3, 12, 8, 8)
        selection.check(other)


def test_bad_masks():
    with pytest.raises(TypeError, match="w: a mask must be boolean, got torch.float32"):
        Selection.from_masks({"w": torch.ones(2, 2)})
    with pytest.raises(TypeError, match="the mask of w must be a boolean tensor, got list"):
        Selection.from_masks({"w": [[True]]})
    with pytest.raises(TypeError, match="masks must be a mapping of names to boolean tensors, got list"):
        Selection.from_masks([torch.ones(2, 2, dtype=torch.bool)])
