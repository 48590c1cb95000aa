"""Modules of torch.export, which have the mode that they were exported in (pytorch #151726)."""

import pytest
import torch
from torch import nn

from jacmatch import Distillation, InputError, ModuleTeacher, doctor
from jacmatch.datasets import Split
from jacmatch.teachers import Question
from jacmatch.training import evaluate

X, Y = torch.rand(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))


def exported(training=False):
    return torch.export.export(network().train(training), (X,)).module()


def within(module):
    return nn.Sequential(nn.Identity(), module)


@pytest.mark.parametrize("wrap", [lambda module: module, within])
def test_an_exported_teacher_answers_as_the_network_it_is_of(wrap):
    question = Question(cotangents=torch.ones(1, 6, 3))
    expected = ModuleTeacher(network()).answer(X, question)
    teacher = ModuleTeacher(wrap(exported()))
    for _ in range(2):
        answer = teacher.answer(X, question)
        torch.testing.assert_close(answer.outputs, expected.outputs)
        torch.testing.assert_close(answer.products, expected.products)


def test_a_teacher_that_was_exported_in_training_mode_is_refused():
    message = r"`module` of `ModuleTeacher` must be exported in evaluation mode.*Export it again"
    for wrap in (lambda module: module, within):
        with pytest.raises(InputError, match=message):
            ModuleTeacher(wrap(exported(training=True)))


def test_an_exported_student_is_trained_and_evaluated():
    student = exported()
    objective = Distillation(student, network(), samples_per_class=2)
    assert objective.train().training
    objective(X, Y)["loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters())
    result = evaluate(student, Split(X, Y), device="cpu")
    expected = evaluate(network(), Split(X, Y), device="cpu")
    assert result == expected
    assert not objective.eval().training


def test_other_students_are_trained_by_their_own_train():
    class Frozen(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    student = nn.Sequential(nn.Linear(4, 3), Frozen(3))
    assert Distillation(student, network(), samples_per_class=2).train().student[0].training
    assert not student[1].training


def test_the_doctor_takes_a_graph_of_one_batch_size():
    assert doctor(exported(), X).ok


SCRIPTED = {
    "script": torch.jit.script,
    "trace": lambda module: torch.jit.trace(module.eval(), X),
    "frozen": lambda module: torch.jit.freeze(torch.jit.script(module.eval())),
    "frozen-within": lambda module: within(torch.jit.freeze(torch.jit.script(module.eval()))),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", SCRIPTED)
def test_a_scripted_teacher_answers_as_the_network_it_is_of(name):
    """It does not support `requires_grad_`, and a frozen one has neither a mode nor parameters."""
    module = SCRIPTED[name](network())
    question = Question(cotangents=torch.ones(1, 6, 3))
    answer, expected = ModuleTeacher(module).answer(X, question), ModuleTeacher(network()).answer(X, question)
    torch.testing.assert_close(answer.outputs, expected.outputs)
    torch.testing.assert_close(answer.products, expected.products)
    Distillation(network(), module, labels=0, jacobians=1.0)(X)["loss"].backward()
