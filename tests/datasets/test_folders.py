"""Folders of pictures, and the decoding of single files."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from jacmatch import datasets
from jacmatch.datasets import files
from jacmatch.datasets.streamed import decode
from jacmatch.errors import InputError, UnsupportedError


def picture(path, value=0, size=(6, 5), mode="RGB", **settings):
    """A picture of one colour; `size` is width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = len(Image.new(mode, (1, 1)).getbands())
    Image.new(mode, size, value if channels == 1 else (value,) * channels).save(path, **settings)


@pytest.fixture
def folder(tmp_path):
    """Two classes, four training pictures and two test pictures each; the colour says which."""
    for part, count in (("train", 4), ("test", 2)):
        for number, label in enumerate(("cat", "dog")):
            for picture_number in range(count):
                value = 100 * number + 10 * picture_number + (5 if part == "test" else 0)
                picture(tmp_path / part / label / f"{picture_number}.png", value)
    return tmp_path


def test_pictures_are_read_in_the_order_of_their_names(folder):
    (folder / "train" / ".hidden").touch()
    (folder / "train" / "cat" / "Thumbs.db").touch()
    data = datasets.load(f"folder:{folder}")
    assert (data.name, data.classes, data.shape) == (f"folder:{folder}", 2, (3, 5, 6))
    assert data.train.x[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 100, 110, 120, 130]
    assert data.train.y.tolist() == [0] * 4 + [1] * 4
    assert data.test.x[:, 2, 4, 5].tolist() == [5, 15, 105, 115]
    assert data.test.y.tolist() == [0, 0, 1, 1]


def test_channels_rows_and_columns_stay_in_place(tmp_path):
    pixels = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    for part in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / part / label / "0.webp", lossless=True)
    np.testing.assert_array_equal(datasets.load(f"folder:{tmp_path}").train.x[1].numpy(), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize(("suffix", "settings"), [("png", {}), ("jpg", {}), ("JPEG", {}), ("webp", {"lossless": True})])
def test_every_suffix_is_read(folder, suffix, settings):
    picture(folder / "train" / "cat" / f"9.{suffix}", 77, **settings)
    assert abs(int(datasets.load(f"folder:{folder}").train.x[4, 0, 0, 0]) - 77) <= 1


def test_without_a_test_folder_a_fifth_of_each_class_is_held_out(tmp_path):
    for number, label in enumerate(("a", "b")):
        for count in range(10):
            picture(tmp_path / "train" / label / f"{count}.png", 100 * number + count)
    data, again, other = (datasets.load(f"folder:{tmp_path}", seed=seed) for seed in (1, 1, 2))
    assert data.train.y.tolist() == [0] * 8 + [1] * 8
    assert data.test.y.tolist() == [0] * 2 + [1] * 2
    colours = data.train.x[:, 0, 0, 0].tolist() + data.test.x[:, 0, 0, 0].tolist()
    assert sorted(colours) == [*range(10), *range(100, 110)]
    assert data.fingerprint == again.fingerprint != other.fingerprint


def test_grey_pictures_have_one_channel_and_fill_three_among_coloured_ones(folder):
    for part in ("train", "test"):
        for path in (folder / part).rglob("*.png"):
            Image.open(path).convert("L").save(path)
    assert datasets.load(f"folder:{folder}").shape == (1, 5, 6)
    picture(folder / "train" / "dog" / "0.png", 200)
    mixed = datasets.load(f"folder:{folder}").train.x
    assert mixed.shape[1:] == (3, 5, 6)
    assert mixed[1, :, 0, 0].tolist() == [10, 10, 10]


def test_resizing_averages(tmp_path):
    stripes = np.zeros((8, 8), np.uint8)
    stripes[:, ::2] = 200
    for part in ("train", "test"):
        for label, size in (("a", (8, 8)), ("b", (16, 4))):
            (tmp_path / part / label).mkdir(parents=True)
            Image.fromarray(stripes).resize(size, Image.Resampling.NEAREST).save(tmp_path / part / label / "0.png")
    data = datasets.load(f"folder:{tmp_path}@2")
    assert data.shape == (1, 2, 2)
    # Antialiasing takes the mean of the stripes under the filter; without it some pixel would be 0 or 200.
    assert (data.train.x.float() - 100).abs().max() < 30


def test_an_at_sign_may_belong_to_the_name_of_the_folder(tmp_path, folder):
    named = tmp_path / "set@2"
    for part in ("train", "test"):
        for label in ("a", "b"):
            picture(named / part / label / "0.png")
    assert datasets.load(f"folder:{named}").shape == (3, 5, 6)
    assert datasets.load(f"folder:{named}@3").shape == (3, 3, 3)


def test_orientation_palette_and_transparency(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture(tmp_path / "turned.jpg", 50, size=(6, 4), exif=exif)
    assert decode(tmp_path / "turned.jpg", caller="t", max_pixels=24).shape == (6, 4, 3)
    Image.new("RGB", (3, 2), (10, 20, 30)).quantize(4).save(tmp_path / "palette.png")
    assert decode(tmp_path / "palette.png", caller="t", max_pixels=6)[0, 0].tolist() == [10, 20, 30]
    Image.new("RGBA", (3, 2), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert decode(tmp_path / "clear.png", caller="t", max_pixels=6)[1, 2].tolist() == [10, 20, 30]
    Image.new("1", (3, 2), 1).save(tmp_path / "bits.png")
    assert decode(tmp_path / "bits.png", caller="t", max_pixels=6)[..., 0].tolist() == [[255] * 3] * 2


def remove(path):
    for entry in sorted(path.rglob("*"), reverse=True):
        entry.rmdir() if entry.is_dir() else entry.unlink()
    path.rmdir()


def no_train(folder):
    remove(folder / "train")


def no_train_but_others(folder):
    for part in ("train", "test"):
        remove(folder / part)
    for name in "abcdefg":
        (folder / name).mkdir()


def no_classes(folder):
    for label in ("cat", "dog"):
        remove(folder / "train" / label)


def empty_class(folder):
    (folder / "train" / "bird").mkdir()


def file_beside_classes(folder):
    picture(folder / "train" / "0.png")


def other_file(folder):
    (folder / "test" / "cat" / "notes.txt").write_text("note")


def folder_in_class(folder):
    (folder / "train" / "cat" / "more.png").mkdir()


def unknown_test_class(folder):
    picture(folder / "test" / "dgo" / "0.png")


def validation_folder(folder):
    (folder / "test").rename(folder / "val")


def other_size(folder):
    picture(folder / "train" / "dog" / "3.png", size=(6, 7))


def one_class(folder):
    for part in ("train", "test"):
        remove(folder / part / "dog")


def broken_picture(folder):
    (folder / "train" / "cat" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")


def text_as_picture(folder):
    (folder / "train" / "cat" / "0.png").write_text("no picture")


def cut_picture(folder):
    path = folder / "train" / "cat" / "0.jpg"
    picture(path, size=(60, 50))
    path.write_bytes(path.read_bytes()[:-40])
    (folder / "train" / "cat" / "0.png").unlink()


def sixteen_bits(folder):
    Image.fromarray(np.full((5, 6), 40000, np.uint16)).save(folder / "train" / "cat" / "0.png")


def two_frames(folder):
    frames = [Image.new("RGB", (6, 5), (value, 0, 0)) for value in (0, 250)]
    frames[0].save(folder / "train" / "cat" / "0.webp", save_all=True, append_images=frames[1:])


def huge_picture(folder):
    picture(folder / "train" / "cat" / "0.png", size=(20000, 5000), mode="1")


CASES = {
    no_train: r"must have a folder `train`\. Got test\. Lay it out as DIR/train/CLASS/\*\.png and DIR/test/CLASS",
    no_train_but_others: r"must have a folder `train`\. Got a, b, c, d, e and \d more",
    no_classes: r"train must have one folder for each class\. Got an empty folder",
    empty_class: r"bird must have images\. Got an empty folder",
    file_beside_classes: r"train must have one folder for each class\. Got the file 0\.png",
    other_file: r"cat must have only \.png, \.jpg, \.jpeg, \.webp files\. Got notes\.txt\. Convert or remove it",
    folder_in_class: r"cat must have only .*Got more\.png",
    unknown_test_class: r"Each folder in .*test must be a known name\. Got 'dgo'\. Nearest: dog",
    validation_folder: r"The held-out part of .* must be called `test`\. Got val\. Rename it",
    other_size: r"must have the same size\. Got 5 × 6 in .*0\.png and 7 × 6 in .*3\.png\. Resize them.*folder:.*@64",
    one_class: r"must have at least two classes\. Got 1",
    broken_picture: r"0\.png must be an image\. Got",
    text_as_picture: r"0\.png must be an image\. Got UnidentifiedImageError",
    cut_picture: r"0\.jpg must be an image\. Got OSError",
    sixteen_bits: r"0\.png must have 8 bits a channel\. Got mode I;16",
    two_frames: r"0\.webp must have one frame\. Got 2",
    huge_picture: r"0\.png must have at most 67,108,864 pixels\. Got 100,000,000\. Scale it down",
}


@pytest.mark.parametrize("spoil", CASES)
def test_bad_folders_are_refused(folder, spoil):
    spoil(folder)
    with pytest.raises(InputError, match=CASES[spoil]):
        datasets.load(f"folder:{folder}")


@pytest.mark.parametrize("size", ["0", "-3", "2.5", "x", "", "5000", "9" * 5000, "²"])
def test_bad_sizes_are_refused(folder, size):
    with pytest.raises(InputError, match=r"SIZE of `--data folder:DIR@SIZE` must be an integer from 1 to 4096"):
        datasets.load(f"folder:{folder}@{size}")


@pytest.mark.parametrize("spec", ["folder", "folder:", "folder:/nowhere", "folder:/nowhere@32"])
def test_no_folder_is_refused(spec):
    with pytest.raises(InputError, match="`--data folder:DIR` must name an existing folder"):
        datasets.load(spec)


def test_a_folder_that_cannot_be_listed_is_refused(folder, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(folder), "iterdir", denied)
    with pytest.raises(
        InputError, match=r"train must be a readable folder\. Got PermissionError: .*Check its permissions"
    ):
        datasets.load(f"folder:{folder}")


def test_more_pictures_than_memory_are_refused(folder, monkeypatch):
    monkeypatch.setattr(files, "_physical_memory", lambda: 1000)
    with pytest.raises(
        InputError, match=r"The images of folder:.* must fit into memory.*Scale them down: folder:DIR@SIZE"
    ):
        datasets.load(f"folder:{folder}")


def test_missing_pillow_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UnsupportedError, match=r"`--data folder:.*` reads images with Pillow.*pip install pillow"):
        datasets.load(f"folder:{folder}")


# pytorch/vision #2831, open-mmlab/mmpretrain #507
@pytest.mark.parametrize(
    "name",
    [
        "train/.ipynb_checkpoints/0-checkpoint.png",
        "train/cat/.ipynb_checkpoints/0.png",
        "train/cat/._0.png",
        "train/cat/thumbs.db",
        "train/cat/Desktop.ini",
        "train/cat/Icon\r",
        "train/cat/@eaDir/x.png",
        "train/__MACOSX/._cat",
        "test/$RECYCLE.BIN/0.png",
    ],
)
@pytest.mark.parametrize("source", ["folder", "stream"])
def test_what_systems_leave_is_no_class_and_no_image(folder, name, source):
    before = datasets.load(f"{source}:{folder}")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
    after = datasets.load(f"{source}:{folder}")
    assert (after.classes, after.fingerprint) == (before.classes, before.fingerprint)


# python-pillow/Pillow #1138 and #4603: a JPEG of a telephone that holds a second picture
def test_the_first_picture_of_a_jpeg_with_several_is_taken(folder):
    first, second = (Image.fromarray(np.full((5, 6, 3), value, np.uint8)) for value in (40, 200))
    file = io.BytesIO()
    first.save(file, "MPO", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(file.getvalue())).n_frames == 2
    pixels = decode(file.getvalue(), "a.jpg", caller="the test", max_pixels=100)
    assert abs(pixels.astype(int) - 40).max() <= 2


def test_sixteen_bits_are_refused_with_a_conversion_that_works(folder):
    file = io.BytesIO()
    image = Image.fromarray((np.arange(30).reshape(5, 6) * 2000).astype(np.uint16))
    image.save(file, "PNG")
    with pytest.raises(InputError, match=r"must have 8 bits a channel\. Got mode I;16\. Convert it") as caught:
        decode(file.getvalue(), "a.png", caller="the test", max_pixels=100)
    code = str(caught.value).partition("16 bits: ")[2].removesuffix(".")
    converted = eval(code, {"Image": Image, "np": np, "image": image})
    assert (np.asarray(converted) == np.arange(30).reshape(5, 6) * 2000 // 257).all()
