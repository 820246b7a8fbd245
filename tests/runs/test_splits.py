"""Which images are for what: folders, lists of paths and labels, Hugging Face's metadata, and shares that are held out."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from fps_kernels.runs import splits as splits_module
from fps_kernels.runs.images import ImageSet
from fps_kernels.runs.lists import Columns, metadata_of, read_list
from fps_kernels.runs.splits import Source, held_out, open_split, splits_of, training_images
from tests.runs.test_folders import picture


def names(images: ImageSet) -> list[tuple[str, str]]:
    return [
        (path.name, images.classes[label]) for path, label in zip(images.dataset.files, images.dataset.labels, strict=True)
    ]


def test_a_list_with_splits(tmp_path):
    for name in "abcdef":
        picture(tmp_path / "images" / f"{name}.png")
    (tmp_path / "all.csv").write_text(
        "id,image,class,split\n1,images/a.png,cat,train\n2,images/b.png,dog,train\n3,images/c.png,dog,val\n"
        '4,"images/d.png",cat,test\n5,images/e.png,dog,test\n'
    )
    splits = splits_of(Source(str(tmp_path / "all.csv")), None, 0)
    assert names(splits.train) == [("a.png", "cat"), ("b.png", "dog")]
    assert splits.validation is not None
    assert splits.test is not None
    assert names(splits.validation) == [("c.png", "dog")]
    assert names(splits.test) == [("d.png", "cat"), ("e.png", "dog")]
    assert splits.watched is splits.validation
    assert len(training_images(Source(str(tmp_path / "all.csv")))) == 2
    assert splits.train.read(0)[1] == 0


def test_lists_without_splits(tmp_path):
    for name in "abcd":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "in.tsv").write_text("path\tlabel\na.png\t10\nb.png\t9\nc.png\t10\nd.png\t9\n")
    splits = splits_of(Source(str(tmp_path / "in.tsv")), 0.5, 0)
    assert splits.train.classes == ("9", "10")  # numbers as numbers
    assert (len(splits.train), splits.test) == (2, None)
    with pytest.raises(ValueError, match=r"must hold the folders train and test .* --val-share 0\.2 holds out a share"):
        splits_of(Source(str(tmp_path / "in.tsv")), None, 0)
    folder = tmp_path / "lists"
    folder.mkdir()
    for split, rows in (("train", "ab"), ("test", "cd")):
        lines = [json.dumps({"file_name": f"../{name}.png", "label": name in "ac"}) for name in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n\n")
    splits = splits_of(Source(str(folder)), None, 0)
    assert splits.train.classes == ("False", "True")
    assert splits.test is not None
    assert names(splits.test) == [("c.png", "True"), ("d.png", "False")]


def test_a_list_is_read_once(tmp_path, monkeypatch):
    for name in "abcd":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "all.csv").write_text("path,label,split\na.png,x,train\nb.png,y,train\nc.png,x,val\nd.png,y,test\n")
    read = []
    monkeypatch.setattr(splits_module, "read_list", lambda *args: read.append(args) or read_list(*args))
    splits_of(Source(str(tmp_path / "all.csv")), None, 0)
    assert len(read) == 1


def test_paths_with_separators_of_lines(tmp_path):
    """JSON strings may hold a line separator as it is; lines end at line feeds."""
    picture(tmp_path / "a\u2028b.png")
    line = json.dumps({"file_name": "a\u2028b.png", "label": "x"}, ensure_ascii=False)
    (tmp_path / "all.jsonl").write_text(f"{line}\r\n\r\n", encoding="utf-8")
    assert names(open_split(Source(str(tmp_path / "all.jsonl")), "")) == [("a\u2028b.png", "x")]
    (tmp_path / "all.jsonl").write_text(f"{line}\n\n[1]\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"all\.jsonl, line 3, is no JSON object"):
        read_list(tmp_path / "all.jsonl")


def test_columns_and_roots_that_are_named(tmp_path):
    picture(tmp_path / "images" / "a.png")
    listed = tmp_path / "list.csv"
    listed.write_text("label,where,kind\nwrong,a.png,cat\n")
    source = Source(str(listed), tmp_path / "images", columns=Columns("where", "kind"))
    assert names(open_split(source, "")) == [("a.png", "cat")]
    with pytest.raises(ValueError, match=r"list\.csv has no column of paths: it has label, where, kind; name it"):
        read_list(listed)
    with pytest.raises(ValueError, match=r"has no column 'what' \(--label-column\): it has label, where, kind"):
        read_list(listed, None, Columns("where", "what"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.png,cat\nb.png,dog\n", r"line 3: there is no file .*/b\.png"),
        ("path,label\na.png,cat\na.png,\n", r"line 3: a\.png has no label"),
        ("path,label\na.png,cat\n,dog\n", "line 3, has no path"),
        ("path,label\na.png,cat,dog\n", "line 2, has more fields than the first line names"),
        ("path\na.png\n", "has no column of labels: name it label in the first line"),
        ("path,label\n", "lists no image"),
        ('path,label\n"a.png,cat\n', "cannot be read: unexpected end of data"),
    ],
)
def test_lists_that_are_refused(tmp_path, text, message):
    picture(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_split(Source(str(tmp_path / "list.csv")), "")


def test_json_that_is_none(tmp_path):
    (tmp_path / "list.jsonl").write_text('{"path": "a.png"}\n[1]\n')
    with pytest.raises(ValueError, match=r"line 2, is no JSON object"):
        read_list(tmp_path / "list.jsonl")
    (tmp_path / "list.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match=r"line 1, is no JSON: "):
        read_list(tmp_path / "list.jsonl")


def test_a_choice_needs_no_labels(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text("path\na.png\n")
    assert len(training_images(Source(str(tmp_path / "list.csv")))) == 1


def test_metadata_beside_the_images(tmp_path, capsys):
    """As Hugging Face's imagefolder has it."""
    for name in ("train/a.png", "train/b.png", "test/c.png"):
        picture(tmp_path / name)
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\na.png,cat\nb.png,dog\n")
    (tmp_path / "test" / "metadata.jsonl").write_text('{"file_name": "c.png", "label": "dog"}\n')
    splits = splits_of(Source(str(tmp_path)), None, 0)
    assert names(splits.train) == [("a.png", "cat"), ("b.png", "dog")]
    assert splits.test is not None
    assert splits.test.read(0)[1] == 1
    captions = tmp_path / "captions"
    picture(captions / "cat" / "a.png")
    (captions / "metadata.csv").write_text("file_name,text\ncat/a.png,a cat\n")
    assert open_split(Source(str(captions)), "").classes == ("cat",)
    assert "has no column of labels: classes are the folders in" in capsys.readouterr().err
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"metadata\.parquet is not read: write it as metadata\.csv"):
        metadata_of(tmp_path)


def test_a_training_folder_alone(tmp_path):
    for label, count in (("a", 10), ("b", 3), ("c", 2)):
        for i in range(count):
            picture(tmp_path / "images" / label / f"{i}.png")
    for source in (Source(str(tmp_path / "images")), Source(str(tmp_path), train="images")):
        splits = splits_of(source, 0.2, 0)
        assert splits.test is None
        assert splits.validation is not None
        assert [list(splits.validation.dataset.labels).count(i) for i in range(3)] == [2, 1, 1]
        assert [list(splits.train.dataset.labels).count(i) for i in range(3)] == [8, 2, 1]
        assert not set(splits.train.dataset.files) & set(splits.validation.dataset.files)
        again, other = (splits_of(source, 0.2, seed).validation for seed in (0, 1))
        assert again is not None
        assert other is not None
        assert splits.validation.digest() == again.digest() != other.digest()


def test_folders_for_three_purposes(tmp_path):
    for split in ("train", "validation", "test"):
        for label in "ab":
            picture(tmp_path / split / label / f"{split}.png")
    splits = splits_of(Source(str(tmp_path)), None, 0)
    assert splits.validation is not None
    assert names(splits.validation) == [("validation.png", "a"), ("validation.png", "b")]
    with pytest.raises(ValueError, match=r"--val-share holds out training images, and .*/validation is there already"):
        splits_of(Source(str(tmp_path)), 0.5, 0)
    (tmp_path / "train").rename(tmp_path / "other")
    with pytest.raises(ValueError, match="there is no train"):
        splits_of(Source(str(tmp_path)), None, 0)
    splits = splits_of(Source(str(tmp_path), train="other"), None, 0)
    assert len(splits.train) == 2
    with pytest.raises(ValueError, match="has no folder nowhere"):
        splits_of(Source(str(tmp_path), train="other", validation="nowhere"), None, 0)


def test_images_that_are_tuned_and_measured_on_are_told(tmp_path, capsys):
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "all.csv").write_text(
        "path,label,split\na.png,x,train\nb.png,y,train\nb.png,y,test\nc.png,x,test\n", encoding="utf-8-sig"
    )
    splits_of(Source(str(tmp_path / "all.csv")), None, 0)
    assert f"warning: 1 of the images of {tmp_path / 'all.csv'}, test are also tuned on" in capsys.readouterr().err


def test_shares_of_other_data_sets():
    class Targets(TensorDataset):
        targets = (0, 1) * 6

    for dataset, balanced in ((Targets(torch.arange(12)), True), (TensorDataset(torch.arange(12)), False)):
        train, held = held_out(ImageSet("numbers", dataset, ("a", "b")), 0.5, 0)
        assert (len(train), len(held)) == (6, 6)
        assert train.digest() != held.digest()
        assert (held.labels() is not None) == balanced
        if balanced:
            assert sorted(held.labels() or []) == [0] * 3 + [1] * 3
    with pytest.raises(ValueError, match=r"--val-share must lie between 0 and 1, got 1\.5"):
        held_out(ImageSet("numbers", Targets(torch.arange(12)), ("a", "b")), 1.5, 0)


def test_one_image_of_a_class_cannot_be_shared(tmp_path):
    for name in ("a/x.png", "a/y.png", "b/x.png"):
        picture(tmp_path / name)
    with pytest.raises(ValueError, match="the class b has one image: --val-share needs two of each class"):
        splits_of(Source(str(tmp_path)), 0.5, 0)


def test_a_name_that_is_nothing(tmp_path):
    with pytest.raises(ValueError, match="there is no folder cifar10; data sets of timm are named torch/cifar10"):
        splits_of(Source("cifar10"), None, 0)
    with pytest.raises(OSError, match=r"nowhere\.csv"):
        training_images(Source(str(Path(tmp_path, "nowhere.csv"))))
