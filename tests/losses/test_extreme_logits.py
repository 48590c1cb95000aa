"""Losses on logits of excluded classes (−∞) and on 16-bit tensors, against PyTorch in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from jacmatch import losses

S, T = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 3, 4])
EXCLUDED = torch.tensor([False, False, True, False, False])


def gradient(loss, logits: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(logits).sum(), logits)[0]


@pytest.mark.parametrize("student", [S, S.masked_fill(EXCLUDED, -torch.inf)], ids=["finite", "excluded"])
def test_kl_with_a_class_that_the_teacher_excludes(student):
    teacher = T.masked_fill(EXCLUDED, -torch.inf)
    p, q = teacher.softmax(1)[:, ~EXCLUDED], student.log_softmax(1)[:, ~EXCLUDED]
    torch.testing.assert_close(losses.hinton_kl(student, teacher), (p * (p.log() - q)).sum(1))
    own = gradient(lambda s: losses.hinton_kl(s, teacher), student)
    torch.testing.assert_close(own, student.softmax(1) - teacher.softmax(1))


def test_cross_entropy_with_probabilities_of_which_an_excluded_class_has_none():
    logits, p = S.masked_fill(EXCLUDED, -torch.inf), functional.one_hot(Y, 5).double()
    expected = functional.cross_entropy(logits, Y, reduction="none")
    torch.testing.assert_close(losses.cross_entropy(logits, p), expected)
    torch.testing.assert_close(gradient(lambda z: losses.cross_entropy(z, p), logits), logits.softmax(1) - p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_no_reason_to_be_inexact(dtype):
    close, student = (S + 0.05 * T).to(dtype), S.to(dtype)
    exact = functional.kl_div(student.double().log_softmax(1), close.double().softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(losses.hinton_kl(student, close).double(), exact, rtol=1e-3, atol=1e-7)
    a, b = torch.randn(2, 2, 3, 90_000, generator=torch.Generator().manual_seed(1)).to(dtype)
    for loss in (losses.squared_error, losses.relative_error, losses.bounded_error, losses.normalized_error):
        torch.testing.assert_close(loss(a, b).double(), loss(a.double(), b.double()), rtol=1e-2, atol=0)
