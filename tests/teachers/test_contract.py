"""What every teacher must keep, on every row of `cases.py`."""

import contextlib

import pytest
import torch

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import AttentionPixel, LogProbabilities
from jacmatch.teachers import (
    TEACHERS,
    AnalyticTeacher,
    BlackBoxTeacher,
    CachedTeacher,
    EnsembleTeacher,
    ModuleTeacher,
    Question,
    Teacher,
)

from . import reference
from .cases import BATCH, CASES, OUTPUTS, READINGS, SHAPE, classes, directions, inputs, jacobian_of_batch, network

each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_reading = pytest.mark.parametrize("reading", READINGS, ids=lambda reading: reading.name)
each_with_vjp = pytest.mark.parametrize("case", [case for case in CASES if case.vjp], ids=lambda case: case.name)


def close(answer, truth, tolerance=1e-9):
    torch.testing.assert_close(answer, truth, rtol=tolerance, atol=tolerance * float(truth.abs().max()))


def tensors(answer):
    given = (answer.outputs, answer.values, answer.products, answer.cotangents, *answer.features.values())
    return [tensor for tensor in given if tensor is not None]


def test_every_teacher_has_a_row():
    built = {type(case.build()) for case in CASES}
    assert built == set(TEACHERS.values()) - {CachedTeacher}, "a cache answers only what was stored: test_cached.py"


@each
def test_it_is_a_teacher(case):
    teacher = case.build()
    assert isinstance(teacher, Teacher)
    assert teacher.answers_vjp == case.vjp


@each
@each_reading
def test_outputs_and_values_equal_the_definition(case, reading):
    x, labels = inputs(), reading.labels()
    answer = case.build().answer(x, Question(readout=reading.readout, labels=labels))
    close(answer.outputs, reference.values(case.function, reference.logits, x, labels))
    close(answer.values, reference.values(case.function, reading.definition, x, labels))
    assert answer.products is None
    assert answer.cotangents is None
    assert answer.features == {}


@each
@each_reading
def test_jv_equals_the_definition(case, reading):
    x, labels, v = inputs(), reading.labels(), directions(3, BATCH, *SHAPE)
    answer = case.build().answer(x, Question(readout=reading.readout, labels=labels, tangents=v))
    jacobian = reference.jacobians(case.function, reading.definition, x, labels)
    close(answer.products, reference.jvp(jacobian, v), case.tolerance)
    close(answer.values, reference.values(case.function, reading.definition, x, labels))
    close(answer.outputs, reference.values(case.function, reference.logits, x, labels))


@each_with_vjp
@each_reading
@pytest.mark.parametrize("made", [False, True], ids=["given", "made from the values"])
def test_vj_equals_the_definition(case, reading, made):
    x, labels = inputs(), reading.labels()
    values = reference.values(case.function, reading.definition, x, labels)
    v = directions(3, *values.shape)
    if made:
        v = v * values.abs().sqrt()
        question = Question(reading.readout, lambda y: directions(3, *y.shape) * y.abs().sqrt(), labels=labels)
    else:
        question = Question(reading.readout, v, labels=labels)
    answer = case.build().answer(x, question)
    jacobian = reference.jacobians(case.function, reading.definition, x, labels)
    close(answer.products, reference.vjp(jacobian, v, SHAPE), case.tolerance)
    close(answer.cotangents, v)
    close(answer.values, values)
    close(answer.outputs, reference.values(case.function, reference.logits, x, labels))


@each
@each_reading
def test_a_given_step_means_the_antithetic_difference_of_the_values(case, reading):
    x, labels, v, h = inputs(), reading.labels(), directions(2, BATCH, *SHAPE), 0.3
    answer = case.build().answer(x, Question(readout=reading.readout, labels=labels, tangents=v, step=h))
    for product, one in zip(answer.products, v, strict=True):
        plus, minus = (reference.values(case.function, reading.definition, x + s * h * one, labels) for s in (1, -1))
        close(product, (plus - minus) / (2 * h))
    close(answer.values, reference.values(case.function, reading.definition, x, labels))


@pytest.mark.parametrize("case", [case for case in CASES if not case.vjp], ids=lambda case: case.name)
def test_a_teacher_of_values_refuses_vj_and_names_the_remedy(case):
    question = Question(cotangents=directions(1, BATCH, OUTPUTS))
    with pytest.raises(UnsupportedError, match=r"BlackBoxTeacher has values only\. Use probe=RandomInputs\(k\)"):
        case.build().answer(inputs(), question)


@each
@pytest.mark.parametrize("kind", ["outputs", "tangents", "cotangents"])
def test_nothing_has_a_gradient_and_the_input_stays(case, kind):
    x = inputs().requires_grad_()
    copy = x.detach().clone()
    v = directions(1, BATCH, *(OUTPUTS,) if kind == "cotangents" else SHAPE).requires_grad_()
    if kind == "cotangents" and not case.vjp:
        kind = "outputs"
    question = Question(LogProbabilities()) if kind == "outputs" else Question(LogProbabilities(), **{kind: v})
    for context in (contextlib.nullcontext(), torch.no_grad()):
        with context:
            answer = case.build().answer(x, question)
        assert not any(tensor.requires_grad for tensor in tensors(answer))
    assert x.grad is None
    assert torch.equal(x, copy)


@each
def test_samples_do_not_see_each_other(case):
    x, v, teacher = inputs(), directions(2, BATCH, *SHAPE), case.build()
    labels, readout = READINGS[1].labels(), READINGS[1].readout

    def ask(rows):
        return teacher.answer(x[rows], Question(readout, tangents=v[:, rows], labels=labels[rows]))

    whole, order = ask(torch.arange(BATCH)), torch.tensor([2, 0, 1])
    close(ask(order).products, whole.products[:, order], case.tolerance)
    parts = [ask(torch.tensor([0])), ask(torch.tensor([1, 2]))]
    close(torch.cat([part.products for part in parts], dim=1), whole.products, case.tolerance)
    close(torch.cat([part.values for part in parts]), whole.values)


def in_float32():
    """Teachers of float32, which autocast would touch; it leaves float64 alone."""
    net = network(1).float().eval()
    matrix = AnalyticTeacher(net, lambda x: jacobian_of_batch(1)(x).float())
    return {
        "module": ModuleTeacher(net),
        "analytic": matrix,
        "black-box": BlackBoxTeacher(net),
        "ensemble": EnsembleTeacher([ModuleTeacher(net), matrix]),
    }


@pytest.mark.parametrize("name", ["module", "analytic", "black-box", "ensemble"])
@pytest.mark.parametrize("side", ["tangents", "cotangents"])
def test_autocast_does_not_reach_the_teacher(name, side):
    teacher, x = in_float32()[name], inputs().float()
    if side == "cotangents" and not teacher.answers_vjp:
        side = "tangents"
    v = directions(2, BATCH, *SHAPE) if side == "tangents" else directions(2, BATCH, OUTPUTS)
    question = Question(LogProbabilities(), **{side: v.float()})
    outside = teacher.answer(x, question)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(1).float()(x).dtype == torch.bfloat16, "or this shows nothing"
        inside = teacher.answer(x, question)
    for one, other in zip(tensors(outside), tensors(inside), strict=True):
        assert torch.equal(one, other)


@each
def test_the_answer_has_the_type_of_the_input(case):
    x, v = inputs(), directions(2, BATCH, *SHAPE)
    exact = case.build().answer(x, Question(tangents=v))
    answer = case.build().answer(x.float(), Question(tangents=v.float()))
    for one, other in zip(tensors(answer), tensors(exact), strict=True):
        assert one.dtype == torch.float32
        close(one.double(), other, 1e-2 if "black" in case.name else 1e-5)


@each
@pytest.mark.parametrize("shape", [(2, 1, *SHAPE), (2, BATCH, 3, 2), (2, BATCH, 6), (BATCH, *SHAPE)])
def test_directions_of_another_shape_are_refused(case, shape):
    with pytest.raises(
        InputError, match=r"`tangents` of `Question` must have the shape \(probes, \*\(3, 2, 3\)\)\. Got"
    ):
        case.build().answer(inputs(), Question(tangents=directions(*shape)))


@each_with_vjp
@pytest.mark.parametrize("shape", [(2, 1, OUTPUTS), (2, BATCH, OUTPUTS + 1), (BATCH, OUTPUTS)])
def test_cotangents_of_another_shape_are_refused(case, shape):
    with pytest.raises(
        InputError,
        match=r"`cotangents` must have the shape \(probes, \*\(3, 4\)\), with at least one probe\. Got shape",
    ):
        case.build().answer(inputs(), Question(cotangents=directions(*shape)))


def test_a_query_has_one_side():
    with pytest.raises(
        InputError, match=r"`Question` must have `cotangents` .* or `tangents` .*, not both\. Make two queries"
    ):
        Question(cotangents=torch.ones(1, 3, 4), tangents=torch.ones(1, 3, 2, 3))


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name not in ("module", "memoized")], ids=lambda case: case.name
)
@pytest.mark.parametrize(
    "question", [Question(layers=("1",)), Question(AttentionPixel("1"))], ids=["layers", "readout"]
)
def test_features_are_refused_by_teachers_without(case, question):
    with pytest.raises(UnsupportedError, match=r"Teacher (has|returns) outputs only\. Use a readout of the outputs"):
        case.build().answer(inputs(), question)


@each
def test_missing_labels_are_refused(case):
    with pytest.raises(InputError, match=r"`LabelLogit` needs `labels` in its context\. Got None"):
        case.build().answer(inputs(), Question(READINGS[2].readout))
    case.build().answer(inputs(), Question(READINGS[2].readout, labels=classes()))
