import pytest
import torch

from jacmatch.datasets import Split
from jacmatch.errors import InputError
from jacmatch.training import AUGMENTATIONS, Training, augment
from jacmatch.training.data import Batches, resident

from . import cases, reference

CHOICES = [("crop",), ("flip",), ("crop", "flip")]


def _images(count=6, height=16, width=10):
    return torch.rand(count, 2, height, width, generator=torch.Generator().manual_seed(1)) + 0.5


@pytest.mark.parametrize("which", CHOICES)
def test_a_sample_looks_the_same_in_every_batch(which):
    x, ids = _images(), torch.tensor([5, 0, 7, 3, 100, 2])
    whole = augment(x, ids, 4, 9, which)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.equal(augment(x[order], ids[order], 4, 9, which), whole[order])
    parts = [augment(x[i : i + 1], ids[i : i + 1], 4, 9, which) for i in range(6)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("which", CHOICES)
def test_sample_epoch_and_seed_each_matter(which):
    x, ids = _images(1).expand(64, -1, -1, -1), torch.arange(64)
    first = augment(x, ids, 0, 0, which)
    assert len({tuple(image.flatten().tolist()) for image in first}) > 1
    assert not torch.equal(first, augment(x, ids, 1, 0, which))
    assert not torch.equal(first, augment(x, ids, 0, 1, which))


def test_crop_makes_each_shift_and_no_other():
    """Sizes 16 and 10 may move by 2 and by 1: 5 · 3 images, found here by moving pixel by pixel."""
    image = _images(1)
    seen = augment(image.expand(600, -1, -1, -1), torch.arange(600), 0, 0, ("crop",))
    allowed = [reference.shifted(image[0], down, right) for down in range(-2, 3) for right in range(-1, 2)]
    counts = [sum(torch.equal(one, other) for one in seen) for other in allowed]
    assert sum(counts) == 600
    assert min(counts) > 20  # 40 expected; below 20 has probability 1e-4 per shift


@pytest.mark.parametrize(("size", "reach"), [(8, 1), (28, 4), (32, 4), (64, 8)])
def test_crop_reaches_an_eighth_of_the_size(size, reach):
    x = torch.ones(1, 1, size, size).expand(400, -1, -1, -1)
    cut = size - augment(x, torch.arange(400), 0, 0, ("crop",))[:, 0, :, size // 2].sum(1)
    assert cut.max() == reach


def test_flip_mirrors_half_of_the_images():
    x = _images(1).expand(1000, -1, -1, -1)
    seen = augment(x, torch.arange(1000), 0, 0, ("flip",))
    same = (seen == x).flatten(1).all(1)
    mirrored = (seen == x.flip(3)).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert 430 < int(mirrored.sum()) < 570  # 500 ± 4.4 standard deviations


def test_one_augmentation_does_not_disturb_another():
    x, ids = _images(), torch.arange(6)
    both = augment(x, ids, 0, 0, ("flip", "crop"))
    assert torch.equal(both, augment(augment(x, ids, 0, 0, ("crop",)), ids, 0, 0, ("flip",)))


def test_nothing_to_do_leaves_any_input_alone():
    x = torch.rand(3, 5)
    assert augment(x, torch.arange(3), 0, 0, ()) is x


def test_only_images_can_be_augmented():
    with pytest.raises(InputError, match=r"needs images .* Got inputs of shape \(5,\)\. Leave it out"):
        augment(torch.rand(3, 5), torch.arange(3), 0, 0, ("flip",))


def test_unknown_augmentations_are_refused():
    with pytest.raises(InputError, match=r"`which` of `augment` .* Nearest: crop"):
        augment(_images(), torch.arange(6), 0, 0, ("krop",))


def test_settings_know_the_same_names():
    assert Training(augment=tuple(AUGMENTATIONS)).augment == ("crop", "flip")


def test_an_epoch_goes_once_through_the_rows():
    batches = Batches(cases.images(40), 10, seed=5)
    ids = [torch.cat([batches(epoch * 4 + number).ids for number in range(4)]) for epoch in range(3)]
    assert all(torch.equal(one.sort().values, torch.arange(40)) for one in ids)
    assert not torch.equal(ids[0], ids[1])


def test_the_ragged_rest_of_an_epoch_is_left_out():
    batches = Batches(cases.images(41), 10, seed=5)
    assert [len(batches(number).ids) for number in range(8)] == [10] * 8
    assert len(set(torch.cat([batches(number).ids for number in range(4)]).tolist())) == 40


def test_a_small_split_is_one_batch():
    batches = Batches(cases.images(7), 128, seed=5)
    assert batches.size == 7
    assert all(torch.equal(batches(number).ids.sort().values, torch.arange(7)) for number in range(3))


def test_batches_can_be_drawn_in_any_order():
    first, second = (Batches(cases.images(40), 16, seed=5, augment=("crop",), partners=True) for _ in range(2))
    forward = [first(number) for number in range(6)]
    for number in (5, 0, 3, 3, 1):
        again = second(number)
        assert torch.equal(again.x, forward[number].x)
        assert torch.equal(again.partners, forward[number].partners)


def test_batches_hold_the_rows_they_name():
    split = cases.images(40)
    batch = Batches(split, 16, seed=5, partners=True)(1)
    assert torch.equal(batch.x, split.x[batch.ids].float() / 255)
    assert torch.equal(batch.y, split.y[batch.ids])
    for x, y, own in zip(batch.partners, batch.partner_labels, batch.ids, strict=True):
        rows = (split.x.float() / 255 == x).flatten(1).all(1).nonzero()[:, 0]
        assert len(rows) == 1
        assert rows[0] != own
        assert split.y[rows[0]] == y


def test_partners_are_drawn_anew_in_each_epoch():
    batches = Batches(cases.images(40), 40, seed=5, partners=True)
    partners = []
    for epoch in range(2):
        batch = batches(epoch)
        partners.append(batch.partners[batch.ids.argsort()])
    assert not torch.equal(*partners)


def test_views_return_while_the_order_goes_on():
    split = cases.images(12)
    batches = Batches(split, 12, seed=3, augment=("crop", "flip"), partners=True, views=2)
    drawn = [batches(epoch) for epoch in range(4)]
    assert [batch.view for batch in drawn] == [0, 1, 0, 1]
    by_id = [{name: getattr(b, name)[b.ids.argsort()] for name in ("x", "partners", "y")} for b in drawn]
    assert not torch.equal(drawn[0].ids, drawn[2].ids)
    for name in ("x", "partners", "y"):
        assert torch.equal(by_id[0][name], by_id[2][name])
    assert not torch.equal(by_id[0]["x"], by_id[1]["x"])
    assert not torch.equal(by_id[0]["partners"], by_id[1]["partners"])


def test_partners_are_augmented_as_in_their_own_row():
    split = cases.images(12)
    batch = Batches(split, 12, seed=5, augment=("crop", "flip"), partners=True)(2)
    in_place = {tuple(x.flatten().tolist()) for x in batch.x}
    assert all(tuple(x.flatten().tolist()) in in_place for x in batch.partners)


def test_batches_of_an_empty_split_are_refused():
    empty = Split(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(InputError, match=r"`train` of `fit` must have samples"):
        Batches(empty, 4, seed=0)


@pytest.mark.parametrize(("free", "moved"), [(40 * 64 * 4, True), (40 * 64 * 4 - 1, False)])
def test_a_split_that_would_fill_the_gpu_stays_where_it_is(monkeypatch, free, moved):
    split, calls = cases.images(40), []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
    monkeypatch.setattr(Split, "to", lambda self, device: calls.append(device) or self)
    resident(split, torch.device("cuda", 0))
    assert bool(calls) == moved
