"""A teacher that remembers asks once, and never gives an answer to another question."""

from dataclasses import dataclass, replace

import pytest
import torch

from jacmatch.errors import InputError
from jacmatch.jacobian import LabelClass, RandomOutputs, TopClass, TopLogit
from jacmatch.objectives import AtMixedPairs, Distillation
from jacmatch.teachers import EnsembleTeacher, MemoizedTeacher, ModuleTeacher, Question

from .cases import directions, inputs, network

IDS = torch.tensor([7, 3, 11])
RULES = {"top": (lambda values: TopClass().directions(outputs=values), "top class")}


class Counting:
    """A teacher that counts the samples of its queries."""

    answers_vjp = True

    def __init__(self):
        self.inner, self.samples = ModuleTeacher(network(1)), 0

    def answer(self, x, question=None):
        self.samples += len(x)
        return self.inner.answer(x, question)


def unchecked(teacher, **limits):
    """Without the queries that check stored answers."""
    memoized = MemoizedTeacher(teacher, **limits)
    memoized._next_check = 0
    return memoized


@pytest.fixture
def counting():
    return Counting()


def question(**changes):
    cotangents, rule = RULES["top"]
    return Question(**{"cotangents": cotangents, "rule": rule, "ids": IDS, **changes})


def same(one, other, rows=slice(None)):
    for name in ("outputs", "values"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name)[rows])
    for name in ("products", "cotangents"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name)[:, rows])


def test_the_second_answer_is_the_first(counting):
    memoized, x = unchecked(counting), inputs()
    first = memoized.answer(x, question())
    second = memoized.answer(x, question())
    assert counting.samples == 3
    assert (memoized.queried, memoized.memoized) == (3, 3)
    for name in ("outputs", "values", "products", "cotangents"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_other_batches_of_the_same_samples(counting):
    memoized, x = unchecked(counting), inputs()
    whole = counting.inner.answer(x, question())
    memoized.answer(x[:2], question(ids=IDS[:2]))
    order = torch.tensor([2, 0, 1])
    same(memoized.answer(x[order], question(ids=IDS[order])), whole, order)
    assert counting.samples == 5, "one of them was new, so all were queried"
    same(memoized.answer(x[order[:2]], question(ids=IDS[order[:2]])), whole, order[:2])
    assert counting.samples == 5


@pytest.mark.parametrize("sample", range(3))
def test_a_sample_that_differs_in_one_bit_is_queried_again(counting, sample):
    memoized, x = unchecked(counting), inputs()
    memoized.answer(x, question())
    other = x.clone()
    other[sample, 0, 0] = torch.nextafter(other[sample, 0, 0], torch.tensor(9.0, dtype=torch.float64))
    answer = memoized.answer(other, question())
    assert counting.samples == 6
    same(answer, counting.inner.answer(other, question()))
    same(memoized.answer(x, question()), counting.inner.answer(x, question()))
    assert counting.samples == 6, "what was known of the sample has not been replaced"


@pytest.mark.parametrize(
    "changes",
    [
        {"cotangents": None, "rule": None},
        {"rule": "another rule"},
        {"readout": TopLogit(), "cotangents": torch.ones(1, 3, 1, dtype=torch.float64)},
        {"layers": ("1",)},
        {"labels": torch.tensor([0, 1, 2])},
    ],
    ids=["no derivatives", "rule", "readout", "layers", "labels"],
)
def test_another_query_is_not_answered_from_memory(counting, changes):
    memoized, x = unchecked(counting), inputs()
    memoized.answer(x, question())
    answer = memoized.answer(x, question(**changes))
    assert counting.samples == 6
    expected = counting.inner.answer(x, question(**changes))
    torch.testing.assert_close(answer.values, expected.values)
    assert (answer.products is None) == (expected.products is None)
    assert answer.features.keys() == expected.features.keys()
    again = memoized.answer(x, question(**changes))
    torch.testing.assert_close(again.values, expected.values)
    for name, feature in expected.features.items():
        torch.testing.assert_close(again.features[name], feature)


def test_other_labels_are_queried_again(counting):
    memoized, x = unchecked(counting), inputs()
    for labels, samples in (([0, 1, 2], 3), ([0, 1, 2], 3), ([0, 1, 3], 6)):
        labels = torch.tensor(labels)
        rows = lambda values, labels=labels: LabelClass().directions(outputs=values, labels=labels)  # noqa: E731
        answer = memoized.answer(x, Question(cotangents=rows, rule="label", ids=IDS, labels=labels))
        assert counting.samples == samples
        torch.testing.assert_close(answer.cotangents[0].argmax(1), labels)


@pytest.mark.parametrize(
    "changes",
    [{"ids": None}, {"rule": None}, {"cotangents": None, "tangents": directions(2, 3, 2, 3)}],
    ids=["no ids", "no rule", "input directions"],
)
def test_what_may_be_random_is_never_memoized(counting, changes):
    memoized, x = unchecked(counting), inputs()
    for samples in (3, 6):
        memoized.answer(x, question(**changes))
        assert counting.samples == samples


def test_random_queries_are_stored_by_their_draw(counting):
    memoized, x = unchecked(counting, draws=True), inputs()
    v = directions(2, 3, 2, 3)
    for changes in ({}, {"cotangents": None, "tangents": v, "rule": "inputs"}):
        before = counting.samples
        for draw, queried in ((0, 3), (1, 6), (0, 6), (1, 6)):
            moved, query = x + draw, question(random=True, draw=draw, **changes)
            pair = memoized.answer(moved, query), counting.inner.answer(moved, query)
            torch.testing.assert_close(*((each.outputs, each.values, each.products) for each in pair))
            assert counting.samples == before + queried
    other = question(random=True, draw=0)
    same(memoized.answer(x + 2, other), counting.inner.answer(x + 2, other))  # another x under a known draw
    without_rule = question(random=True, draw=0, cotangents=None, tangents=v, rule=None)
    before = counting.samples
    for times in (1, 2):
        memoized.answer(x, without_rule)
        assert counting.samples == before + 3 * times


@dataclass
class Changeable:
    """A readout that can change, and so has no hash."""

    layers: tuple[str, ...] = ()

    def __call__(self, outputs, features, context):
        return TopLogit()(outputs, features, context)


def test_a_readout_that_can_change_is_never_memoized(counting):
    memoized, x = unchecked(counting), inputs()
    ones = torch.ones(1, 3, 1, dtype=torch.float64)
    for samples in (3, 6):
        answer = memoized.answer(x, question(readout=Changeable(), cotangents=ones))
        same(answer, counting.inner.answer(x, question(readout=TopLogit(), cotangents=ones)))
        assert counting.samples == samples
    assert (memoized.queried, memoized.memoized) == (6, 0)


def test_memory_has_an_end(counting):
    memoized, x = unchecked(counting, limit=0), inputs()
    for samples in (3, 6):
        same(memoized.answer(x, question()), counting.inner.answer(x, question()))
        assert counting.samples == samples
    assert memoized.bytes == 0


@pytest.mark.parametrize(
    ("probe", "samples"), [(TopClass(), 3), (LabelClass(), 3), (RandomOutputs(1), 9)], ids=["top", "label", "random"]
)
def test_distillation_queries_once_where_nothing_is_random(counting, probe, samples):
    torch.manual_seed(0)
    student = network(2).float()
    x, y = inputs().float(), torch.tensor([0, 1, 2])
    plain, memoized = (
        Distillation(student, teacher, probe=probe, jacobians=1.0)
        for teacher in (ModuleTeacher(network(1)), unchecked(counting))
    )
    for step in range(3):
        losses = []
        for objective in (plain, memoized):
            torch.manual_seed(step)  # dropout
            losses.append(objective(x, y, ids=IDS)["loss"])
        torch.testing.assert_close(*losses)
    assert counting.samples == samples


def test_distillation_at_mixed_pairs_is_never_memoized(counting):
    objective = Distillation(network(2).float(), unchecked(counting), jacobians=0.0, point=AtMixedPairs())
    for _ in range(2):
        objective(inputs().float(), torch.tensor([0, 1, 2]), ids=IDS)
    assert counting.samples == 6


@pytest.mark.usefixtures("as_users_run")
def test_refusals(counting):
    with pytest.raises(InputError, match=r"`teacher` of `MemoizedTeacher` must be a teacher\. Got Dropout"):
        MemoizedTeacher(torch.nn.Dropout())
    with pytest.raises(InputError, match=r"`limit` of `MemoizedTeacher` must be at least 0\. Got -1"):
        unchecked(counting, limit=-1)


def test_shared_parameters_are_detected_through_the_memory():
    shared = network(1)
    with pytest.raises(InputError, match=r"must not share parameters"):
        Distillation(shared, MemoizedTeacher(ModuleTeacher(shared)))


class Changing:
    """A teacher that adds something to its outputs in later calls."""

    answers_vjp = True

    def __init__(self, *added):
        self.inner, self.added = ModuleTeacher(network(1)), list(added)

    def answer(self, x, question=None):
        answer = self.inner.answer(x, question)
        more = self.added.pop(0) if self.added else 0.0
        return replace(answer, outputs=answer.outputs + more)


def test_a_teacher_that_changes_is_noticed_at_the_first_repetition():
    x = inputs()
    memoized = MemoizedTeacher(Changing(0.0, 5.0))
    memoized.answer(x, question())
    with pytest.raises(InputError, match=r"same answer to the same query each .* Got another answer for 3 of 3 samp"):
        memoized.answer(x, question())


def test_a_teacher_that_changes_later_is_noticed_later():
    x = inputs()
    memoized = MemoizedTeacher(Changing(0.0, 1e-9, 5.0))
    for _ in range(16):
        memoized.answer(x, question())
    assert (memoized.queried, memoized.memoized) == (3, 15 * 3)
    with pytest.raises(InputError, match=r"Freeze it .evaluation mode, fixed weights, no noise"):
        memoized.answer(x, question())


def test_a_jump_at_one_of_many_samples_is_rounding():
    x = inputs()
    memoized = MemoizedTeacher(Changing(0.0, torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)))
    for _ in range(2):
        memoized.answer(x, question())


@pytest.mark.parametrize("wrap", [lambda teacher: teacher, lambda teacher: EnsembleTeacher([teacher])])
def test_answers_of_former_weights_are_dropped(wrap):
    module, x = network(1), inputs()
    memoized = MemoizedTeacher(wrap(ModuleTeacher(module)))
    for _ in range(4):
        memoized.answer(x, question())
    module.load_state_dict(network(2).state_dict())
    assert torch.equal(memoized.answer(x, question()).outputs, ModuleTeacher(network(2)).answer(x).outputs)
    assert memoized.queried == 6
