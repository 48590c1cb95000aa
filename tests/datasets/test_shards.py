"""Tar shards as WebDataset writes them, read in any order; and every way in which they can be wrong."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from jacmatch import datasets
from jacmatch.datasets import shards
from jacmatch.errors import InputError


def encoded(seed, size=(6, 5), kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (*size[::-1], 3)).astype(np.uint8)).save(file, kind)
    return file.getvalue()


def members(count=4, first=0):
    """Names and bytes of `count` samples in two classes."""
    pairs = []
    for number in range(first, first + count):
        pairs += [(f"{number:04}.png", encoded(number)), (f"{number:04}.cls", str(number % 2).encode())]
    return pairs


def write(path, pairs, mode="w", **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **settings) as tar:
        for name, content in pairs:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two training shards of four samples and a test shard of two."""
    monkeypatch.setenv("JACMATCH_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "data" / "train-0.tar", members(4))
    write(tmp_path / "data" / "train-1.tar", members(4, 4))
    write(tmp_path / "data" / "test-0.tar", members(2, 90))
    return tmp_path / "data"


def test_samples_are_read_in_the_order_of_shards_and_members(folder):
    data = datasets.load(f"wds:{folder}")
    assert (data.classes, data.shape, len(data.train), len(data.test)) == (2, (3, 5, 6), 8, 2)
    assert data.train.y.tolist() == [0, 1] * 4
    for row in (6, 1, 7):
        expected = np.array(Image.open(io.BytesIO(encoded(row)))).transpose(2, 0, 1)
        np.testing.assert_array_equal(data.train.stored(torch.tensor([row]))[0].numpy(), expected)
    assert data.train.x.source.name(6) == "train-1.tar: 0006"


def test_shards_may_lie_in_folders_and_a_fifth_is_held_out_without_test_shards(folder):
    expected = datasets.load(f"wds:{folder}").train.stored()
    for part in ("train", "test"):
        for path in folder.glob(f"{part}-*.tar"):
            (folder / part).mkdir(exist_ok=True)
            path.rename(folder / part / path.name)
    assert torch.equal(datasets.load(f"wds:{folder}").train.stored(), expected)
    (folder / "test" / "test-0.tar").unlink()
    data = datasets.load(f"wds:{folder}", seed=1)
    assert (len(data.train), len(data.test)) == (6, 2)


@pytest.mark.filterwarnings(
    "ignore:.*FileIO:pytest.PytestUnraisableExceptionWarning"
)  # webdataset leaves the file open
def test_the_package_webdataset_writes_and_reads_the_same(tmp_path, monkeypatch):
    webdataset = pytest.importorskip("webdataset")
    monkeypatch.setenv("JACMATCH_CACHE", str(tmp_path / "cache"))
    for part, count in (("train", 6), ("test", 2)):
        with webdataset.TarWriter(str(tmp_path / f"{part}.tar")) as writer:
            for number in range(count):
                sample = {"__key__": f"a/s{number}", "jpg": encoded(number, kind="JPEG"), "cls": number % 2}
                writer.write(sample | {"json": {"note": number}})
    data = datasets.load(f"wds:{tmp_path}")
    theirs = (
        webdataset.WebDataset(str(tmp_path / "train.tar"), shardshuffle=False).decode("rgb8").to_tuple("jpg", "cls")
    )
    for row, (image, label) in enumerate(theirs):
        assert int(data.train.y[row]) == label
        np.testing.assert_array_equal(data.train.stored(torch.tensor([row]))[0].numpy().transpose(1, 2, 0), image)
    assert row == 5


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_other_members_are_no_hindrance(folder, style):
    long = "d/" * 30 + "n" * (20 if style == tarfile.USTAR_FORMAT else 200)
    directory = tarfile.TarInfo("some")
    directory.type = tarfile.DIRTYPE
    pairs = [
        ("some", directory),
        ("._0000.png", b"resource fork"),
        (f"{long}.seg.png", b"another kind of file"),
        (f"{long}.PNG", encoded(0)),
        (f"{long}.json", b"{}"),
        (f"{long}.cls", b"1\n"),
        *members(1, 2),
    ]
    write(folder / "train-0.tar", pairs, format=style)
    data = datasets.load(f"wds:{folder}")
    assert data.train.y.tolist()[:2] == [1, 0]
    assert data.train.x.source.name(0) == f"train-0.tar: {long}"


def test_an_index_is_made_once_and_again_when_the_shard_has_changed(folder, monkeypatch):
    first = datasets.load(f"wds:{folder}")
    made = []
    monkeypatch.setattr(shards, "make_index", lambda path, plain=shards.make_index: made.append(path) or plain(path))
    again = datasets.load(f"wds:{folder}")
    assert not made
    assert again.fingerprint == first.fingerprint
    write(folder / "train-1.tar", members(6, 4))
    assert len(datasets.load(f"wds:{folder}").train) == 10
    assert [path.name for path in made] == ["train-1.tar"]


@pytest.mark.parametrize("damage", [b"", b"no zip", None])
def test_a_cached_index_that_is_damaged_or_does_not_fit_is_made_again(folder, damage):
    expected = datasets.load(f"wds:{folder}").train.stored()
    for path in (folder.parent / "cache" / "indices").iterdir():
        if damage is None:
            with np.load(path) as arrays:
                changed = dict(arrays) | {"offsets": arrays["offsets"] + 10**9}
            np.savez(path, **changed)
        else:
            path.write_bytes(damage)
    assert torch.equal(datasets.load(f"wds:{folder}").train.stored(), expected)


def test_a_cache_that_cannot_be_written_is_no_hindrance(folder, monkeypatch):
    (folder.parent / "file").touch()
    monkeypatch.setenv("JACMATCH_CACHE", str(folder.parent / "file"))
    assert len(datasets.load(f"wds:{folder}").train) == 8


def test_nothing_is_unpacked_or_unpickled(folder):
    before = sorted(folder.parent.rglob("*"))
    pairs = [*members(4), ("0003.pyd", b"cos\nsystem\n(S'exit 1'\ntR."), ("0003.pth", b"\x80\x04.")]
    write(folder / "train-0.tar", pairs)
    datasets.load(f"wds:{folder}").train.stored()
    assert [path for path in sorted(folder.parent.rglob("*")) if path.suffix not in (".npz", "")] == [
        path for path in before if path.suffix not in (".npz", "")
    ]


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


WRONG_MEMBERS = {
    "no image": ([("a.cls", b"0")], r"must have an image \(jpg, jpeg, png, webp\) in each sample\. Got none, at 'a'"),
    "no label": ([("a.png", encoded(0))], r"must have a class in each sample, as a file KEY\.cls\. Got none, at 'a'"),
    "two images": (
        [("a.png", encoded(0)), ("a.jpg", b"x")],
        r"must have one image in each sample\. Got a second one \(png and jpg\), at 'a\.jpg'",
    ),
    "two classes": (
        [("a.cls", b"0"), ("a.cls", b"1")],
        r"one class in each sample\. Got a second one \(cls and cls\), at 'a\.cls'",
    ),
    "a key again": (
        [*members(2), ("0000.png", b"x")],
        r"distinct names\. Got a name that occurred before, at '0000\.png'",
    ),
    "a word for class": ([("a.png", b"x"), ("a.cls", b"cat")], r"'a\.cls' must be a class index.*Got 'cat'\. Number"),
    "a negative class": ([("a.png", b"x"), ("a.cls", b"-1")], r"'a\.cls' must be a class index.*Got '-1'"),
    "a long class": ([("a.png", b"x"), ("a.cls", b"1" * 33)], r"'a\.cls' must be a class index.*Got ''"),
    "an empty image": ([("a.png", b""), ("a.cls", b"1")], r"'a\.png' must have at least 1 byte"),
    "a path that leads out": (
        [("../a.png", b"x")],
        r"names inside the archive only\. Got a path that leads out .*, at '\.\./a\.png'",
    ),
    "a root": ([("/a.png", b"x")], r"names inside the archive only"),
    "a symbolic link": (
        [link("a.png", "/etc/passwd", tarfile.SYMTYPE)],
        r"ordinary files only\. Got a link, a device or a sparse file, at 'a\.png'",
    ),
    "a hard link": ([link("a.png", "b.png", tarfile.LNKTYPE)], r"ordinary files only"),
    "a device": ([link("a.png", "", tarfile.CHRTYPE)], r"ordinary files only"),
    "nothing": ([], r"train-0\.tar must have samples\. Got none"),
}


@pytest.mark.parametrize("case", WRONG_MEMBERS)
def test_bad_members_are_named(folder, case):
    pairs, message = WRONG_MEMBERS[case]
    write(folder / "train-0.tar", pairs)
    with pytest.raises(InputError, match=message):
        datasets.load(f"wds:{folder}")


def test_a_member_that_is_too_large_is_refused_before_it_is_read(folder):
    info = tarfile.TarInfo("a.png")
    info.size = 2**26 + 1
    with (folder / "train-0.tar").open("wb") as file:
        file.write(info.tobuf())
        file.truncate(512 + 2**26 + 512 + 1024)
    with pytest.raises(InputError, match=r"'a\.png' must have at least 1 byte and at most 67,108,864\. Got 67,108,865"):
        datasets.load(f"wds:{folder}")


def test_files_that_are_no_whole_tar_files_are_refused(folder):
    path = folder / "train-0.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[3].offset
    cases = {
        whole[: offset + 100]: rf"must be a complete tar file\. Got a damaged header at byte {offset:,}",
        whole[:offset]
        + b"x"
        + whole[offset + 1 :]: rf"must be a complete tar file\. Got a damaged header at byte {offset:,}",
        whole[: offset - 1100]: r"must be an uncompressed tar file\. Got ReadError: unexpected end of data",
        b"no tar" * 1000: r"train-0\.tar must be an uncompressed tar file\. Got ReadError",
        b"": r"train-0\.tar must be an uncompressed tar file\. Got ReadError: empty file",
    }
    for content, message in cases.items():
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            datasets.load(f"wds:{folder}")
    write(path, members(4), mode="w:gz")
    with pytest.raises(InputError, match=r"must be an uncompressed tar file\. .*Write it again, uncompressed"):
        datasets.load(f"wds:{folder}")


def test_other_layouts_are_refused(folder):
    (folder / "test-0.tar").rename(folder / "val-0.tar")
    with pytest.raises(InputError, match=r"held-out shards of .* must be called `test`\. Got val-0\.tar"):
        datasets.load(f"wds:{folder}")
    for path in folder.glob("train*"):
        path.unlink()
    with pytest.raises(
        InputError, match=r"must have training shards\. Got val-0\.tar\. Lay it out as DIR/train/\*\.tar"
    ):
        datasets.load(f"wds:{folder}")
    with pytest.raises(InputError, match=r"`--data wds:DIR` must name an existing folder"):
        datasets.load("wds:")


def test_shards_that_shrink_while_a_job_runs_are_named(folder):
    data = datasets.load(f"wds:{folder}")
    (folder / "train-1.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"train-1\.tar must not change after .* Got a shorter file"):
        data.train.inputs(torch.tensor([7]))
    assert data.train.inputs(torch.tensor([0])).shape == (1, 3, 5, 6)


def test_any_number_of_shards_is_searched(folder):
    data = datasets.load(f"wds:{folder}")
    source = data.train.x.source
    assert isinstance(source, shards.Shards)
    assert [source.name(number).split(": ")[1] for number in range(10)] == [
        *(f"{number:04}" for number in range(8)),
        "0090",
        "0091",
    ]


# webdataset/webdataset #237 and #288, huggingface/datasets #7150: dots in the names of folders and files.
@pytest.mark.parametrize("key", ["train.v1/22.0/{:03}", "s{:03}.5", "./{:03}", "Track {:03}.0", "a/b.c/{:03}.left"])
def test_dots_in_names(tmp_path, monkeypatch, key):
    monkeypatch.setenv("JACMATCH_CACHE", str(tmp_path / "cache"))
    pairs = [(key.format(int(name[:4])) + name[4:], content) for name, content in members(10)]
    write(tmp_path / "data" / "train.tar", pairs)
    data = datasets.load(f"wds:{tmp_path / 'data'}")
    assert (len(data.train) + len(data.test), data.classes) == (10, 2)


DOTTED = {
    "two of one key": [("a.1.png", 0), ("a.1.cls", b"0"), ("a.2.png", 1), ("a.2.cls", b"1")],
    "one within another": [("a.png", 0), ("a.cls", b"0"), ("a.2.png", 1), ("a.2.cls", b"1")],
    "classes alone": [("a.png", 0), ("a.1.cls", b"0"), ("a.2.cls", b"1")],
}


@pytest.mark.parametrize("name", DOTTED)
def test_samples_that_a_dot_makes_one_are_refused(tmp_path, name):
    write(tmp_path / "a.tar", [(file, encoded(x) if isinstance(x, int) else x) for file, x in DOTTED[name]])
    with pytest.raises(InputError, match=r"The extension begins at the first dot"):
        shards.make_index(tmp_path / "a.tar")


def test_a_plain_extension_goes_before_one_with_dots(tmp_path):
    image, mask = encoded(0), encoded(1)
    for pairs in ([("a.mask.png", mask), ("a.png", image)], [("a.png", image), ("a.mask.png", mask)]):
        write(tmp_path / "a.tar", [*pairs, ("a.old.cls", b"7"), ("a.cls", b"1")])
        index = shards.make_index(tmp_path / "a.tar")
        content = (tmp_path / "a.tar").read_bytes()[index.offsets[0] :][: index.sizes[0]]
        assert (content, index.labels.tolist()) == (image, [1])


# libarchive/libarchive #3334 (AppleDouble); folders of notebooks, Synology and macOS; metadata of webdataset
@pytest.mark.parametrize(
    "hidden", ["._0000.png", "__MACOSX/._0000.png", "__MACOSX/0000.png", ".ipynb_checkpoints/0.png", "__info__/0.json"]
)
def test_hidden_members_are_passed_over(tmp_path, hidden):
    write(tmp_path / "a.tar", [(hidden, b"x"), *members(2)])
    assert len(shards.make_index(tmp_path / "a.tar").labels) == 2
