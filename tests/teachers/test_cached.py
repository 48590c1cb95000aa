"""A teacher that answers from disk gives what was stored, and refuses every question that is another one."""

import hashlib
from dataclasses import replace

import pytest
import torch
from torch import nn

from jacmatch import CachedTeacher, InputError, LogProbabilities, PooledFeatures, Question, UnsupportedError
from jacmatch.models import FirstOutputs
from jacmatch.teachers import AnalyticTeacher, BlackBoxTeacher, EnsembleTeacher, MemoizedTeacher, ModuleTeacher
from jacmatch.teachers.cached.format import architecture_of, fields_of, of_teacher, rows_of, sums, unlike, words

from .cache_folders import OUTPUTS, SAMPLES, SHAPE, VIEWS, directions, inputs, make

SIDES = ["cotangents", "tangents", "outputs"]
IDS = torch.tensor([7, 0, 3, 9])


@pytest.fixture(scope="module", params=SIDES)
def made(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp("cache") / "seed0", request.param)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A cache of vᵀJ."""
    return make(tmp_path_factory.mktemp("cache") / "seed0")


def ask(made, view=1, samples=IDS, x=None, **changes):
    given = inputs(view)[samples] if x is None else x
    return CachedTeacher(made.folder).answer(given, replace(made.question(view, samples), **changes))


@pytest.mark.parametrize("view", range(VIEWS))
@pytest.mark.parametrize("ids", [IDS, torch.arange(SAMPLES), torch.tensor([4]), torch.tensor([2, 2])])
def test_answers_are_those_of_the_teacher(made, view, ids):
    answer, live = ask(made, view, ids), made.live(view, ids)
    for name in ("outputs", "values", "products"):
        stored, expected = getattr(answer, name), getattr(live, name)
        assert (stored is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(stored, expected, rtol=1e-6, atol=1e-7)  # queried in other batches
    assert made.side != "cotangents" or torch.equal(answer.cotangents, directions("cotangents", view)[:, ids])
    assert CachedTeacher(made.folder).answers_vjp == (made.side == "cotangents")


def test_in_the_order_of_then_the_bits_are_those_of_then(made):
    for start in range(0, 4, 2):
        ids = made.orders[0][start : start + 4]
        whole = made.live(0, made.orders[0][start : start + 4])
        torch.testing.assert_close(ask(made, 0, ids).outputs, whole.outputs, rtol=1e-6, atol=1e-7)


def test_a_question_without_products_has_the_outputs_alone(made):
    answer = CachedTeacher(made.folder).answer(inputs(0)[IDS], Question(ids=IDS, draw=0))
    assert answer.products is None
    torch.testing.assert_close(answer.outputs, made.live(0, IDS).outputs)


def test_outputs_alone_are_stored_where_their_digits_are_others():
    x, question = torch.ones(2, 3), Question(ids=torch.arange(2), cotangents=torch.ones(1, 2, 2))
    answer = ModuleTeacher(torch.nn.Linear(3, 2)).answer(x, question)
    alone = replace(answer, outputs=answer.outputs * (1 + 1e-7), products=None)
    assert "outputs_alone" not in {field.name for field in fields_of(answer, question, alone=answer)}
    fields = fields_of(answer, question, alone=alone)
    rows = rows_of(answer, x, question, fields, alone)
    assert torch.equal(rows["outputs_alone"], alone.outputs)
    assert torch.equal(rows["outputs"], answer.outputs)


def test_cotangents_are_made_of_the_stored_values(rows):
    seen = []

    def make_them(values):
        seen.append(values)
        return directions("cotangents", 1)[:, IDS]

    answer = ask(rows, cotangents=make_them)
    assert torch.equal(seen[0], answer.values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"readout": LogProbabilities()}, r"readout \(Logits.* there, LogProbabilities.* here\)"),
        ({"rule": "another"}, r"rule \(none there, 'another' here\)"),
        ({"step": 0.1}, r"step \(none there, 0\.1 here\)"),
        ({"cotangents": None, "tangents": directions("tangents", 1)[:, IDS]}, r"products \(vᵀJ there, Jv here\)"),
        ({"ids": None}, r"must have `ids` and `draw`.* Got ids missing"),
        ({"draw": None}, r"must have `ids` and `draw`.* Got ids given"),
        ({"draw": VIEWS}, r"`draw` of a query .* must be below 2, its number of views\. Got 2"),
        ({"ids": torch.tensor([0, 1, 2, 10])}, r"ids of samples must be 0 to 9.* Got 0 to 10"),
        ({"ids": torch.tensor([0, 1, -1, 2])}, r"Got -1 to 2"),
        ({"ids": IDS[:3]}, r"one input for each of the 3 ids\. Got 4"),
        ({"cotangents": directions("cotangents", 0)[:, IDS]}, r"The directions of a query .* others for 4 of 4"),
        ({"cotangents": directions("cotangents", 1)[:, IDS].flip(0)}, r"The directions .* others for 4 of 4"),
        ({"cotangents": directions("cotangents", 1)[:, IDS.flip(0)]}, r"The directions .* others for"),
        ({"draw": 0}, r"The inputs of a query .* others for 4 of 4 samples \(ids \[7, 0, 3\], view 0\)"),
        ({"ids": IDS.flip(0)}, r"The inputs of a query .* must be those that the cache was built for"),
    ],
)
def test_another_question_is_refused(rows, changes, message):
    with pytest.raises(InputError, match=message):
        ask(rows, **changes)


@pytest.mark.parametrize(
    "change", [lambda x: x * 1.001, lambda x: x + 1e-3, lambda x: x.flip(2), lambda x: x.roll(1, 0)]
)
def test_another_input_is_refused(rows, change):
    with pytest.raises(InputError, match="The inputs of a query"):
        ask(rows, x=change(inputs(1)[IDS]))


def test_rounding_of_the_input_is_no_difference(rows):
    x = inputs(1)[IDS]
    assert torch.equal(ask(rows, x=x * (1 + 1e-6)).outputs, ask(rows).outputs)


def test_features_are_refused(rows):
    for changes in ({"readout": PooledFeatures("1")}, {"layers": ("1",)}):
        with pytest.raises(UnsupportedError, match=r"CachedTeacher has outputs only\. Use a readout of the outputs"):
            ask(rows, **changes)


def test_the_answer_has_the_type_of_the_input(rows):
    question = rows.question(1, IDS)
    answer = CachedTeacher(rows.folder).answer(inputs(1)[IDS].double(), question)
    assert answer.products.dtype == answer.outputs.dtype == torch.float64


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"seed": "1"}, r"must belong to this job\. Got seed \(0 there, 1 here\)\. Build one for this job"),
        ({"teacher weights": "0" * 64}, r"Got teacher weights \([0-9a-f]{12} there, 000000000000 here\)"),
        ({"point": "AtData()"}, r"point \(nothing there, AtData\(\) here\)"),
        ({"seed": "1", "probe": "none"}, r"Got seed \(0 there, 1 here\)\. Build"),
    ],
)
def test_a_cache_of_another_job_is_refused(rows, expected, message):
    with pytest.raises(InputError, match=message):
        CachedTeacher(rows.folder, expected={**CachedTeacher(rows.folder).head.fingerprint, **expected})


def test_outputs_alone_are_the_same_whatever_the_probe(rows):
    fingerprint = CachedTeacher(rows.folder).head.fingerprint
    CachedTeacher(rows.folder, expected={**fingerprint, "probe": "none"})
    with pytest.raises(InputError, match=r"probe \(two there, three here\)"):
        CachedTeacher(rows.folder, expected={**fingerprint, "probe": "three"})


def test_too_few_views_are_refused(rows):
    with pytest.raises(InputError, match=r"must have 3 views\. Got 2 views\. Train with --views 2, or build a longer"):
        CachedTeacher(rows.folder, views=3)


def test_one_view_stands_for_all_where_nothing_is_random(tmp_path):
    made = make(tmp_path / "seed0", constant=True)
    teacher = CachedTeacher(made.folder, views=100)
    question = replace(made.question(0, IDS), draw=77)
    assert torch.equal(teacher.answer(inputs(0)[IDS], question).products, ask(made, 0).products)


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
@pytest.mark.parametrize("side", SIDES)
def test_shorter_numbers_are_rounded_but_for_what_directions_are_made_of(tmp_path, side, storage):
    made = make(tmp_path / "seed0", side, storage)
    answer, live = ask(made), made.live(1, IDS)
    precision = {"float16": 2**-11, "bfloat16": 2**-8}[storage]
    for name in ("outputs", "products"):
        stored, expected = getattr(answer, name), getattr(live, name)
        if expected is not None:
            torch.testing.assert_close(stored, expected, rtol=1.01 * precision, atol=1e-6)
            assert torch.equal(stored, stored.to(getattr(torch, storage)).float()) == (
                name == "products" or side != "cotangents"
            )


def test_numbers_beyond_float16_are_refused():
    x, question = torch.ones(2, 3), Question(ids=torch.arange(2))
    answer = ModuleTeacher(torch.nn.Linear(3, 2)).answer(x, question)
    answer = replace(answer, outputs=answer.outputs + 1e6, values=answer.values + 1e6)
    with pytest.raises(InputError, match=r"`outputs` of an answer must be finite as float16\. Use --store bfloat16"):
        rows_of(answer, x, question, fields_of(answer, question, "float16"))
    assert rows_of(answer, x, question, fields_of(answer, question, "bfloat16"))["outputs"].isfinite().all()


def test_what_cannot_be_stored_is_refused(as_users_run):
    x, net = torch.ones(2, 3), torch.nn.Sequential(torch.nn.Linear(3, 2))
    question = Question(layers=("0",), ids=torch.arange(2))
    with pytest.raises(UnsupportedError, match="stores outputs and products, no features"):
        fields_of(ModuleTeacher(net).answer(x, question), question)
    with pytest.raises(InputError, match=r"`storage` of a cache \(`--store`\) must be a known name\. Got 'int8'"):
        fields_of(ModuleTeacher(net).answer(x, Question()), Question(), "int8")


def test_the_sums_tell_inputs_apart():
    """Two fixed numbers for each sample: a pixel, the order and the sign count."""
    x = torch.rand(500, 3, 8, 8)
    shifted = x.roll(1, 3)
    one_pixel = x.clone()
    one_pixel[:, 0, 0, 0] += 0.05
    for other in (shifted, one_pixel, -x, x.flip(3)):
        assert unlike(other, sums(x)).float().mean() > 0.99
    assert not unlike(x.to(torch.float64), sums(x)).any()


# Whose answers they are -------------------------------------------------------------------------------------------


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU(), torch.nn.Linear(4, 2))


def changed(change):
    net = network()
    with torch.no_grad():
        change(net)
    return ModuleTeacher(net)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda net: net[3].bias[0].add_(1e-7), "teacher weights"),
        (lambda net: net[1].running_mean.add_(1), "teacher weights"),
        (lambda net: net.double(), "teacher type"),
        (lambda net: net.__setitem__(2, torch.nn.GELU()), "teacher architecture"),
        (lambda net: setattr(net[1], "eps", 1e-3), "teacher architecture"),
        (lambda net: net.register_buffer("mean", torch.ones(1, 3)), "teacher preprocessing"),
    ],
)
def test_each_part_of_a_teacher_shows(change, part):
    before, after = of_teacher(ModuleTeacher(network())), of_teacher(changed(change))
    assert before[part] != after[part]
    assert of_teacher(ModuleTeacher(network())) == before


def test_teachers_of_teachers_show_their_members():
    one, other = ModuleTeacher(network()), ModuleTeacher(network(1))
    assert of_teacher(MemoizedTeacher(one)) == of_teacher(one)
    parts = of_teacher(EnsembleTeacher([one, other]))
    assert parts["member 0 teacher weights"] == of_teacher(one)["teacher weights"]
    assert parts != of_teacher(EnsembleTeacher([other, one]))


def test_functions_have_no_fingerprint():
    for teacher in (BlackBoxTeacher(lambda x: x), AnalyticTeacher(lambda x: x, lambda x: x)):
        with pytest.raises(UnsupportedError, match=r"by the weights, and a \w+ has none\. Use a network"):
            of_teacher(teacher)


def test_a_setting_must_say_what_it_is():
    with pytest.raises(InputError, match=r"`probe` of a cache must have a `repr` with all its settings\. Got <object"):
        words(object(), "probe")


def test_shapes_are_those_of_the_cache(rows):
    answer = ask(rows)
    assert answer.products.shape == (2, len(IDS), *SHAPE)
    assert answer.outputs.shape == (len(IDS), OUTPUTS)


def test_a_class_that_moved_within_the_package_keeps_its_fingerprint():
    """Caches and checkpoints of the same version stay valid."""
    inner = nn.Linear(3, 4)
    lines = [
        ": jacmatch.models.resized.FirstOutputs()",
        "network: torch.nn.modules.linear.Linear(in_features=3, out_features=4, bias=True)",
    ]
    expected = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert architecture_of(FirstOutputs(inner, 2)) == expected
