"""A cache is the same however it was written, and `check` says whether it is true."""

import shutil

import pytest
import torch
from torch import nn

from jacmatch.errors import InputError
from jacmatch.jobs.cache import Comparison, check
from jacmatch.teachers import CachedTeacher
from jacmatch.teachers.cached.writer import Counts
from jacmatch.training.distributed import rank_and_size

from .cache_jobs import built, contents, job, network, source


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "answers"
    built(job(folder))
    return folder


def test_two_processes_share_the_work_and_write_the_same(cache, tmp_path):
    assert built(job(tmp_path), rank=1, size=2) == Counts(written=1)
    assert built(job(tmp_path), rank=0, size=2) == Counts(written=1)
    assert contents(tmp_path) == contents(cache)


def test_damage_is_mended_and_what_a_killed_process_left_is_removed(cache, tmp_path):
    folder = tmp_path / "answers"
    shutil.copytree(cache, folder)
    part = folder / "seed0/view-00001"
    (part / "shard-00000").rename(part / ".shard-00000.77.jacmatch-part")
    (part / "places.memmap").rename(part / ".places.memmap.77.jacmatch-part")
    (folder / "seed0/.cache.json.77.jacmatch-part").write_text("{")
    file = folder / "seed0/view-00000/shard-00000/products.memmap"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert built(job(folder)) == Counts(mended=1, written=1)
    assert contents(folder) == contents(cache)


def test_a_cache_grows_with_the_training(cache, tmp_path):
    folder = tmp_path / "answers"
    built(job(folder, steps=3))
    assert built(job(folder)) == Counts(found=1, written=1)
    assert contents(folder) == contents(cache)
    assert built(job(folder, steps=3)) == Counts(found=2), "a shorter one is there already"


def test_small_shards_hold_the_same_entries(cache, tmp_path):
    assert built(job(tmp_path, shard_megabytes=1e-6)) == Counts(written=8)
    ids = torch.arange(30)
    small, large = (CachedTeacher(folder / "seed0").shards.read(1, ids) for folder in (tmp_path, cache))
    assert all(torch.equal(small[name], large[name]) for name in large)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 1, "probes": 2}, r"must be new, or contain this cache\. Got one that differs in probe \("),
        ({"store": "float16"}, r"stored products \(float32 \[1, 1, 8, 8\] there, float16 \[1, 1, 8, 8\] here\)"),
        ({"shard_megabytes": 1e-6}, r"samples in a shard \(32 there, 8 here\)"),
    ],
)
def test_another_cache_is_not_overwritten(changes, message, cache):
    before = contents(cache)
    with pytest.raises(InputError, match=message):
        built(job(cache, **changes))
    assert contents(cache) == before


class Moody(nn.Module):
    """A teacher that changes with each query."""

    def __init__(self):
        super().__init__()
        self.inner, self.calls = network(), 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x) * (1 + 1e-6 * self.calls)


def test_a_teacher_that_does_not_say_the_same_twice_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"must give the same answer twice\. Got two different answers"):
        built(job(tmp_path), teacher=Moody())
    assert not contents(tmp_path)


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("one", "2"), ("-1", "2")])
def test_a_rank_that_is_none_is_refused(rank, world, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(InputError, match=r"RANK must be an integer below WORLD_SIZE\. Got"):
        rank_and_size()


# Whether it is true -----------------------------------------------------------------------------------------------


def test_check_finds_no_difference_beyond_rounding(cache):
    comparison = Comparison()
    check(source(job(cache)), cache, 40, comparison)
    assert comparison.entries == 40
    rounded = {"outputs_alone"}  # stored if outputs without products have other digits, which depends on the machine
    assert set(comparison.relative) - rounded == {"outputs", "products", "input_sums", "direction_sums"}
    assert max(comparison.relative.values()) < 1e-5
    comparison.refuse(cache)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda net: net[5].bias[0].add_(1e-3), "outputs"),
        (lambda net: net[0].weight.mul_(1.001), "outputs [^)]*, products"),
    ],
)
def test_check_names_the_entries_that_are_wrong(change, field, cache):
    teacher = network()
    with torch.no_grad():
        change(teacher)
    comparison = Comparison()
    check(source(job(cache), teacher=teacher), cache, 5, comparison)
    with pytest.raises(
        InputError, match=rf"Got \d+ of 5 differ by more than rounding: seed 0 view \d id \d+ \({field} \d"
    ):
        comparison.refuse(cache)


def test_check_reads_the_strong_sums(cache, tmp_path):
    folder = tmp_path / "answers"
    shutil.copytree(cache, folder)
    for file in folder.glob("seed0/*/shard-00000/products.memmap"):
        file.write_bytes(b"\x7f" + file.read_bytes()[1:])
    with pytest.raises(InputError, match="another sha256 of products"):
        check(source(job(cache)), folder, 5, Comparison())


def test_a_build_does_not_go_on_with_a_teacher_that_says_something_else(tmp_path):
    """A hook leaves no trace in weights, architecture or code."""
    own_job = job(tmp_path / "answers")
    built(own_job)
    before = contents(own_job.root)
    teacher = network()
    teacher[2].register_forward_hook(lambda module, given, outputs: given[0].tanh())
    with pytest.raises(InputError, match=r"this cache\. Got one that differs in teacher outputs \(off by \d+"):
        built(own_job, teacher)
    assert contents(own_job.root) == before
    built(own_job)
