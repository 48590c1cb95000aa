"""`jacmatch cache`: the same student as from the live teacher, for this job and no other, however it was written."""

import pytest
import torch

from jacmatch.errors import InputError
from jacmatch.jobs.cache import cached_teachers, opened
from jacmatch.teachers import CachedTeacher

from .cache_jobs import built, data, job, network, source, trained

# The same student ------------------------------------------------------------------------------------------------


slow, ci = pytest.mark.slow, pytest.mark.ci


@pytest.mark.parametrize(
    ("settings", "methods"),
    [
        pytest.param({}, ("outputs", "jacobians"), id="vJ"),
        pytest.param({"probe": "random-inputs", "probes": 2, "engine": "reverse"}, ("jacobians",), id="Jv", marks=ci),
        pytest.param({"methods": ("outputs",)}, ("outputs",), id="outputs", marks=slow),
        pytest.param({"every": 2, "methods": ("jacobians",)}, ("jacobians",), id="every second step", marks=ci),
        pytest.param(
            {"probe": "fisher-rows", "readout": "log-probabilities", "augment": ("crop", "flip")},
            ("outputs", "jacobians"),
            id="augmented",
            marks=slow,
        ),
        pytest.param(
            {"point": "noise", "probe": "antithetic-noise", "accumulate": 2}, ("jacobians",), id="noise", marks=slow
        ),
    ],
)
@pytest.mark.ci
def test_the_student_is_that_of_the_live_teacher_bit_for_bit(settings, methods, tmp_path):
    cache_job = job(tmp_path, **settings)
    built(cache_job)
    for method in methods:
        live, cached = trained(cache_job, method, cached=False), trained(cache_job, method, cached=True)
        assert all(torch.equal(one, other) for one, other in zip(live, cached, strict=True)), method
        assert not torch.equal(live[0], network(5, 4)[0].weight), "or nothing was learnt"


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"views": 1}, id="one view", marks=ci),
        pytest.param({"point": "data", "probe": "every-row"}, id="nothing random", marks=slow),
        pytest.param({"fraction": 0.5}, id="a part of each batch", marks=slow),
    ],
)
def test_answers_of_other_batches_agree_to_rounding(settings, tmp_path):
    """Where a view comes again its batches are others; with `fraction` the live teacher sees two batches."""
    cache_job = job(tmp_path, **settings)
    built(cache_job)
    live, cached = trained(cache_job, "jacobians", cached=False), trained(cache_job, "jacobians", cached=True)
    for one, other in zip(live, cached, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("store", [pytest.param("float16", marks=slow), pytest.param("bfloat16", marks=ci)])
def test_shorter_numbers_change_the_student_little(store, tmp_path):
    cache_job = job(tmp_path, store=store)
    built(cache_job)
    live, cached = trained(cache_job, "jacobians", cached=False), trained(cache_job, "jacobians", cached=True)
    change = (live[0] - cached[0]).norm() / (live[0] - network(5, 4)[0].weight).norm()
    assert 0 < change < {"float16": 0.01, "bfloat16": 0.05}[store]


def test_one_view_is_enough_where_nothing_is_random(tmp_path):
    assert source(job(tmp_path, point="data", probe="every-row")).views == 1
    assert source(job(tmp_path, point="data", methods=("outputs",))).views == 1
    assert source(job(tmp_path, point="data", methods=("outputs",), augment=("flip",))).views == 2
    assert source(job(tmp_path)).views == 2  # 5 steps of 3 batches an epoch
    assert source(job(tmp_path, views=1)).views == 1
    assert source(job(tmp_path, views=9)).views == 2
    assert source(job(tmp_path, accumulate=2)).views == 4


# For this job and no other ----------------------------------------------------------------------------------------

OTHERS = {
    "seed": ({"seed": 1}, "seed"),
    "batch size": ({"batch_size": 7}, "batch size"),
    "samples": ({"per_class": 9}, "samples"),
    "validation": ({"validation": 3.0, "per_class": 0}, "data"),
    "augmentation": ({"augment": ("flip",)}, "augmentation"),
    "point": ({"point": "data"}, "point"),
    "noise": ({"point": "noise"}, "point"),
    "more noise": ({"point": "noise", "noise": 0.2}, "point"),
    "readout": ({"readout": "log-probabilities"}, "readout"),
    "temperature of the readout": ({"readout": "log-probabilities", "temperature": 2.0}, "readout"),
    "probe": ({"probe": "top-class"}, "probe"),
    "side": ({"probe": "random-inputs"}, "probe"),
    "law": ({"probe_law": "rademacher"}, "probe"),
    "count": ({"probes": 2}, "probe"),
    "step": ({"probe": "antithetic-noise"}, "probe"),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "answers"
    built(job(folder))
    return folder


@pytest.mark.parametrize("name", OTHERS)
def test_another_setting_is_refused_by_name(name, cache):
    changes, part = OTHERS[name]
    cache_job = job(cache, **changes)
    seed = changes.get("seed", 0)
    other = source(cache_job, seed=seed)
    with pytest.raises(InputError, match=rf"must belong to this job\. Got [^.]*\b{part} \(.* there, .* here\)"):
        CachedTeacher(cache / "seed0", expected=other.fingerprint, views=other.views)


@pytest.mark.parametrize(
    ("given", "teacher", "part"),
    [
        (data(pixel=1), None, "data"),
        (data(label=1), None, "data"),
        (data(), network(1), "teacher weights"),
        (data(), network().double(), "teacher type"),
    ],
    ids=["a pixel", "a label", "weights", "type"],
)
def test_other_data_and_another_teacher_are_refused_by_name(given, teacher, part, cache):
    with pytest.raises(InputError, match=rf"Got [^.]*\b{part} \("):
        opened(cache, source(job(cache), given, teacher))


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 0.1, "optimizer": "sgd", "weight_decay": 0.1, "ema": 0.9, "precision": "bf16"},
        {"labels_weight": 0.0, "outputs_weight": 3.0, "jacobian_share": 0.5, "output_loss": "squared"},
        {"jacobian_loss": "squared", "batch_norm": "batch", "every": 3, "fraction": 0.5, "student": "mlp:3"},
        {"temperature": 2.0, "steps": 3, "views": 2, "methods": ("outputs",)},
    ],
)
def test_settings_that_do_not_change_the_answers_may_differ(changes, cache):
    opened(cache, source(job(cache, **changes)))


def test_a_longer_training_is_refused(cache):
    with pytest.raises(InputError, match=r"must have 10 views\. Got 2 views\. Train with --views 2"):
        opened(cache, source(job(cache, steps=30)))
    opened(cache, source(job(cache, steps=30, views=2)))


def test_the_cache_of_another_seed_is_missing(cache):
    with pytest.raises(InputError, match="Got no folder of that name"):
        opened(cache, source(job(cache), seed=3))


def test_labels_alone_ask_no_teacher(cache):
    with pytest.raises(InputError, match=r"needs a method that queries the teacher\. Got --methods labels"):
        source(job(cache, methods=("labels",)))


def test_code_that_changed_without_a_trace_shows_when_the_cache_is_opened(cache):
    """Same classes, same settings, same weights, same forward functions, another forward pass."""
    cache_job, teacher = job(cache), network()
    cached_teachers(cache_job, cache, data(), network())
    teacher[2].register_forward_hook(lambda module, given, outputs: given[0].tanh())
    with pytest.raises(
        InputError, match=r"must equal the teacher's current answers\. Got \d+ of \d+ differ by more than rounding"
    ):
        cached_teachers(cache_job, cache, data(), teacher)
