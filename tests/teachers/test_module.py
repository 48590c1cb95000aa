"""A network as teacher, besides the contract."""

import copy

import pytest
import torch
from torch import nn

from jacmatch.errors import InputError
from jacmatch.jacobian import Arguments, AttentionPixel, PooledFeatures, unverified
from jacmatch.objectives import Distillation
from jacmatch.teachers import (
    ModuleTeacher,
    Question,
)

from .cases import BATCH, OUTPUTS


def convolutional():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 3, 3, stride=2),
        nn.Flatten(),
        nn.Linear(12, OUTPUTS),
    ).double()


def images(count=3):
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def test_it_is_frozen_and_stays_in_evaluation_mode():
    net, x = convolutional(), images()
    before = copy.deepcopy(net.state_dict())
    teacher = ModuleTeacher(net)
    truth = teacher.answer(x).outputs
    net.train()  # as somebody may do who holds it too
    assert torch.equal(teacher.answer(x).outputs, truth)
    assert not net.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} was changed"
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_an_objective_does_not_own_it():
    net, student = convolutional(), convolutional()
    objective = Distillation(student, net, jacobians=1.0)
    objective.train()
    assert not net.training
    assert objective.teacher.module is net
    theirs = {id(parameter) for parameter in net.parameters()}
    assert not theirs & {id(parameter) for parameter in objective.parameters()}
    assert not theirs & {id(buffer) for buffer in objective.buffers()}
    assert all(name.startswith(("student.", "_extra_state")) for name in objective.state_dict())
    assert not any(part is net for part in objective.modules())
    objective.float()
    assert next(net.parameters()).dtype == torch.float64


def test_not_even_one_that_is_a_network_itself():
    class Both(nn.Module):
        answers_vjp = True

        def __init__(self):
            super().__init__()
            self.inner = convolutional()

        def answer(self, x, question):
            return ModuleTeacher(self.inner).answer(x, question)

    teacher = Both()
    objective = Distillation(convolutional(), teacher, jacobians=1.0)
    assert objective.teacher is teacher
    assert all(name.startswith(("student.", "_extra_state")) for name in objective.state_dict())
    assert len(list(objective.parameters())) == len(list(convolutional().parameters()))
    assert copy.deepcopy(objective).teacher is not teacher


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (None, 1e-6), (torch.bfloat16, 0.1)])
def test_it_computes_in_its_own_type_and_answers_in_the_inputs(dtype, tolerance):
    seen = []
    net = convolutional() if dtype is None else convolutional().float()
    teacher = ModuleTeacher(net, dtype)
    net.register_forward_pre_hook(lambda layer, given: seen.append(given[0].dtype))
    x, v = images().float(), torch.ones(1, BATCH, OUTPUTS)
    with unverified():  # the check of an engine before its first use has passes of its own
        answer = teacher.answer(x, Question(cotangents=lambda values: v.to(values), layers=("2",)))
    assert seen == [dtype or torch.float64]
    given = (answer.outputs, answer.values, answer.products, answer.features["2"])
    assert {tensor.dtype for tensor in given} == {torch.float32}
    exact = ModuleTeacher(convolutional()).answer(images(), Question(cotangents=v.double(), layers=("2",)))
    for one, other in zip(given, (exact.outputs, exact.values, exact.products, exact.features["2"]), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def test_features_and_pixels():
    net, x = convolutional(), images()
    readout = AttentionPixel("3")
    answer = ModuleTeacher(net).answer(x, Question(readout, cotangents=torch.ones(1, 3, 1).double(), layers=("0",)))
    with torch.no_grad():
        first, later = net[0](x), net[:4](x)
    assert set(answer.features) == {"0", "3"}
    torch.testing.assert_close(answer.features["0"], first)
    torch.testing.assert_close(answer.features["3"], later)
    for n in range(len(x)):
        attention = sum(channel**2 for channel in later[n])
        assert int(readout.largest(answer.features)[n]) == int(attention.argmax())
        torch.testing.assert_close(answer.values[n, 0], attention.max())
        z = x[n].clone().requires_grad_()
        pixel = int(attention.argmax())
        row = torch.autograd.grad((net[:4](z[None])[0] ** 2).sum(0).flatten()[pixel], z)[0]
        torch.testing.assert_close(answer.products[0, n], row)


@pytest.mark.parametrize("question", [Question(PooledFeatures("3")), Question(AttentionPixel("3", size=1))])
def test_readouts_of_features_without_products(question):
    answer = ModuleTeacher(convolutional()).answer(images(), question)
    assert set(answer.features) == {"3"}
    assert answer.products is None
    assert answer.values.shape == (3, 3 if isinstance(question.readout, PooledFeatures) else 1)


def test_a_network_without_parameters():
    answer = ModuleTeacher(nn.Softmax(1)).answer(torch.zeros(2, 4), Question(tangents=torch.ones(1, 2, 4)))
    assert torch.equal(answer.outputs, torch.full((2, 4), 0.25))
    assert torch.equal(answer.products, torch.zeros(1, 2, 4))


def test_what_it_refuses(as_users_run):
    with pytest.raises(InputError, match=r"`module` of `ModuleTeacher` must be an nn\.Module\. Got function\. For"):
        ModuleTeacher(lambda x: x)
    with pytest.raises(InputError, match=r"`dtype` of `ModuleTeacher` must be a floating-point type\. Got torch\.int8"):
        ModuleTeacher(nn.Linear(2, 2), torch.int8)


def test_outputs_are_the_same_with_and_without_products():
    """The fused path of PyTorch's encoder, for values alone, would set padded positions to 0."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 1)
    padding = torch.tensor([[False, False, True], [False, True, True]])
    arguments = Arguments({"src_key_padding_mask": padding})
    teacher, x = ModuleTeacher(encoder), torch.randn(2, 3, 4)
    alone = teacher.answer(x, Question(arguments=arguments)).outputs
    with_products = teacher.answer(x, Question(tangents=torch.ones(1, 2, 3, 4), arguments=arguments)).outputs
    torch.testing.assert_close(alone, with_products)
