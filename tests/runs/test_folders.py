"""Folders of images as people have them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from fps_kernels.runs.folders import ImageFiles, UnreadableImageError, read_image
from fps_kernels.runs.splits import Source, splits_of, training_images


def picture(path: Path, size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 100, 50)).save(path)
    return path


def test_classes_are_the_direct_children_whatever_lies_deeper(tmp_path, capsys):
    for name in ("cat/2020/a.png", "cat/2021/b.JPG", "cat/c.webp", "dog/2020/may/d.bmp", "dog/e.tif", "dog/f.jpeg"):
        picture(tmp_path / name)
    found = ImageFiles.of(tmp_path)
    assert found.classes == ("cat", "dog")
    names = [str(path.relative_to(tmp_path)) for path in found.files]
    assert names == ["cat/c.webp", "cat/2020/a.png", "cat/2021/b.JPG", "dog/e.tif", "dog/f.jpeg", "dog/2020/may/d.bmp"]
    assert found.labels == (0, 0, 0, 1, 1, 1)
    assert all(found.read(i, "RGB").size == (6, 4) for i in range(len(found)))
    assert capsys.readouterr().err == ""


def test_what_is_left_out_is_counted_in_one_line(tmp_path, capsys):
    picture(tmp_path / "cat" / "a.png")
    for name in (".ipynb_checkpoints/a.png", "cat/.ipynb_checkpoints/a.png", "cat/._a.png", "stray.png", ".hidden/b.png"):
        picture(tmp_path / name)
    for name in ("cat/Thumbs.db", "cat/notes.txt", ".DS_Store", "labels.csv"):
        (tmp_path / name).write_text("x")
    found = ImageFiles.of(tmp_path)
    assert (found.classes, [path.name for path in found.files]) == (("cat",), ["a.png"])
    said = capsys.readouterr().err
    assert said == f"{tmp_path}: left out 9 of what is there: 6 hidden, 2 beside the classes, 1 no image\n"


def test_a_link_to_a_folder_above_is_not_followed_for_ever(tmp_path):
    picture(tmp_path / "cat" / "a.png")
    picture(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "cat" / "again").symlink_to(tmp_path / "cat")
    (tmp_path / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    found = ImageFiles.unlabelled(tmp_path / "cat")
    assert [str(path.relative_to(tmp_path)) for path in found.files] == ["cat/a.png", "cat/more/b.png"]


def test_folders_that_are_refused(tmp_path):
    picture(tmp_path / "train" / "cat" / "a.png")
    (tmp_path / "train" / "dog" / "2020").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"the class dog has no image: .*/train/dog holds no file that ends with"):
        ImageFiles.of(tmp_path / "train")
    with pytest.raises(ValueError, match=r"/train/cat has no class: each class needs a folder of its own there"):
        ImageFiles.of(tmp_path / "train" / "cat")
    with pytest.raises(ValueError, match=r"there is no image in .*/dog$"):
        training_images(Source(str(tmp_path / "train" / "dog")))


def test_a_choice_needs_no_classes(tmp_path):
    for name in ("a.png", "2020/b.png", ".c.png"):
        picture(tmp_path / name)
    found = training_images(Source(str(tmp_path)))
    assert (len(found), found.classes) == (2, (tmp_path.name,))
    assert found.read(1)[1] == 0


def test_test_images_of_some_of_the_classes_have_their_labels(tmp_path):
    for name in ("train/a", "train/b", "train/c", "test/c", "test/a"):
        picture(tmp_path / name / "x.png")
    splits = splits_of(Source(str(tmp_path)), None, 0)
    train, test = splits.train, splits.test
    assert (train.classes, test.classes) == (("a", "b", "c"), ("a", "b", "c"))
    assert [test.read(i)[1] for i in range(2)] == [0, 2]
    assert train.digest() != test.digest()


def test_sixteen_bits_of_grey_are_scaled(tmp_path):
    numbers = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(numbers).save(tmp_path / name)
        for mode in ("RGB", "L"):
            read = np.asarray(read_image(tmp_path / name, mode)).reshape(16, 16, -1)[..., 0]
            assert read.tolist() == np.arange(256).reshape(16, 16).tolist()
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(UnreadableImageError, match=r"f\.tif cannot be read: its numbers are floating-point"):
        read_image(tmp_path / "f.tif", "RGB")
    Image.fromarray(np.full((4, 4), 100_000, np.int32)).save(tmp_path / "i.tif")
    with pytest.raises(UnreadableImageError, match=r"i\.tif cannot be read: its numbers reach from 100000 to 100000"):
        read_image(tmp_path / "i.tif", "RGB")


def test_images_are_turned_as_the_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image = Image.new("RGB", (8, 2))
    image.putpixel((0, 0), (255, 255, 255))
    image.save(tmp_path / "a.png", exif=exif)
    read = read_image(tmp_path / "a.png", "RGB")
    assert read.size == (2, 8)
    assert read.getpixel((1, 0)) == (255, 255, 255)


def test_whatever_cannot_be_read_is_named(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "long.png", pnginfo=text)
    picture(tmp_path / "whole.jpg", (64, 64))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-200])
    (tmp_path / "text.png").write_text("no image")
    for name in ("long.png", "cut.jpg", "text.png", "missing.png"):
        with pytest.raises(UnreadableImageError, match=f"{name} cannot be read: "):
            read_image(tmp_path / name, "RGB")


def test_a_folder_lies_where_it_lies(tmp_path):
    picture(tmp_path / "train" / "a" / "x.png")
    for what in (None, "train"):
        with pytest.raises(
            ValueError, match=r"--data-root labels\.csv says where a named data set lies, and .* is a folder"
        ):
            training_images(Source(str(tmp_path), Path("labels.csv"), train=what))
