"""What people pass by mistake: each message names the argument, the rule, what was got and what to do."""

import pytest
import torch
from torch import nn

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import LabelClass, LabelLogit, RandomInputs
from jacmatch.objectives import AtMixedPairs, Distillation, Robustness

X, Y = torch.rand(6, 4), torch.arange(6) % 3


class Flat(nn.Module):
    """Outputs (B,)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x):
        return self.layer(x).squeeze(1)


def made(**settings):
    torch.manual_seed(0)
    return Distillation(nn.Linear(4, 3), nn.Linear(4, 3), **{"jacobians": 1.0, **settings})


OUT_OF_RANGE = r"`y` of `Distillation` must be classes from 0 to K − 1, for K outputs\. Got labels out of this range\."
TYPES = (
    r"`x` of `Distillation` must have the type of the student's parameters\. Got torch\.float64 and torch\.float32\."
)
FLOATING = (
    r"`x` of `Distillation` must be of a floating-point .* Got torch\.uint8\. For images, pass x\.float\(\) / 255"
)

MISTAKES = {
    "a dictionary": (lambda: made()({"image": X, "label": Y}), r"Part 'label' .* floating-point.*Pass labels as `y`"),
    "a pair": (lambda: made()((X, Y)), r"`x` of `Distillation` must be a tensor\. Got tuple\. Unpack a batch"),
    "a list of labels": (lambda: made()(X, Y.tolist()), r"`y` of `Distillation` must be a tensor\. Got list"),
    "no samples": (lambda: made()(X[:0], Y[:0]), r"`x` .* must have at least one sample\. Got shape \(0, 4\)"),
    "labels above": (lambda: made()(X, Y + 1), OUT_OF_RANGE),
    "labels below": (lambda: made()(X, Y - 1), OUT_OF_RANGE),
    "labels above, values alone": (lambda: made(jacobians=0)(X, Y + 1), OUT_OF_RANGE),
    "labels above, rows of labels": (lambda: made(probe=LabelClass())(X, Y + 1), OUT_OF_RANGE),
    "labels above, logits of labels": (lambda: made(readout=LabelLogit())(X, Y + 1), OUT_OF_RANGE),
    "float64": (lambda: made()(X.double(), Y), TYPES),
    "float64, values alone": (lambda: made(jacobians=0)(X.double(), Y), TYPES),
    "float64, Jv": (lambda: made(probe=RandomInputs(1))(X.double(), Y), TYPES),
    "bytes": (lambda: made()(X.byte(), Y), FLOATING),
    "bytes, mixed": (lambda: made(jacobians=0, point=AtMixedPairs())(X.byte(), Y), FLOATING),
    "bytes, values alone": (
        lambda: made(jacobians=0)(X.byte(), Y),
        r"Got torch\.uint8 and torch\.float32\. Convert one of them: x\.to\(torch\.float32\) \(bytes",
    ),
    "robustness": (lambda: Robustness(nn.Linear(4, 3))(X, Y + 1), r"`y` of `Robustness` must be classes from 0 to K"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(as_users_run, name):
    call, match = MISTAKES[name]
    with pytest.raises(InputError, match=match) as caught:
        call()
    assert "0." not in str(caught.value).replace("0.5", ""), "values of tensors are not printed"


def test_tokens_are_inputs_where_nothing_is_differentiated(as_users_run):
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 3)) for _ in range(2)]
    assert made_from(nets)(torch.randint(9, (6, 2)), Y).loss.isfinite()


def made_from(nets):
    return Distillation(*nets, jacobians=0)


def test_other_errors_are_as_they_were():
    objective = made()
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        objective(torch.rand(6, 5), Y)


class Wrapped(nn.parallel.DistributedDataParallel):
    """The wrapper without a process group."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module

    def forward(self, x):
        return self.module(x)


def test_a_student_wrapped_by_itself_is_refused_where_derivatives_are_taken():
    student = Wrapped(nn.Linear(4, 3))
    with pytest.raises(UnsupportedError, match=r"must not be wrapped in DistributedDataParallel.* Wrap the objective"):
        Distillation(student, nn.Linear(4, 3), jacobians=1.0)(X, Y)
    assert Distillation(student, nn.Linear(4, 3), jacobians=0)(X, Y).loss.isfinite()
