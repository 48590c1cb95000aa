"""Several teachers as one, besides the contract; and what may be given as a teacher."""

import pytest
import torch
from torch import nn

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import Logits
from jacmatch.teachers import (
    BlackBoxTeacher,
    EnsembleTeacher,
    Question,
    as_teacher,
)

from .cases import BATCH, SHAPE, black_box, directions, inputs, module


def test_members_must_agree_on_the_outputs():
    teacher = EnsembleTeacher([module(1), BlackBoxTeacher(lambda x: x.flatten(1))])
    with pytest.raises(InputError, match=r"All members of `EnsembleTeacher` must have the same outputs\. Got \[4, 6\]"):
        teacher.answer(inputs())


def test_what_it_refuses(as_users_run):
    with pytest.raises(InputError, match=r"`teachers` of `EnsembleTeacher` must not be empty"):
        EnsembleTeacher([])
    match = (
        r"Each of `teachers` of `EnsembleTeacher` must be a teacher\. Got Linear\. Wrap a network into ModuleTeacher"
    )
    with pytest.raises(InputError, match=match):
        EnsembleTeacher([module(1), nn.Linear(2, 3)])
    with pytest.raises(UnsupportedError, match=r"Features are those of one network"):
        EnsembleTeacher([module(1)]).answer(inputs(), Question(layers=("1",)))


def test_the_mean_comes_before_the_readout():
    """log softmax of the mean of logits is not the mean of the log softmaxes."""
    x, v = inputs(), directions(1, BATCH, *SHAPE)
    both = EnsembleTeacher([module(1), module(2)]).answer(x, Question(Logits(), tangents=v))
    parts = [module(seed).answer(x, Question(Logits(), tangents=v)) for seed in (1, 2)]
    torch.testing.assert_close(both.outputs, (parts[0].outputs + parts[1].outputs) / 2)
    torch.testing.assert_close(both.products, (parts[0].products + parts[1].products) / 2)


def test_as_teacher(as_users_run):
    net, teacher = nn.Linear(2, 3), black_box(1)
    assert as_teacher(net).module is net
    assert as_teacher(teacher) is teacher
    match = (
        r"`teacher` must be a Teacher or an nn\.Module\. Got builtin_function_or_method\. Wrap a function into BlackBox"
    )
    with pytest.raises(InputError, match=match):
        as_teacher(torch.sin)
