"""The names of losses: written once, in the types of `jacmatch.losses`, and the keys of their dictionaries."""

from typing import get_args

import pytest

from jacmatch import losses
from jacmatch.objectives.robustness import FORMS, Form


@pytest.mark.parametrize(
    ("names", "functions"),
    [
        (losses.OutputLoss, losses.OUTPUT_LOSSES),
        (losses.JacobianLoss, losses.JACOBIAN_LOSSES),
        (Form, FORMS),
    ],
)
def test_a_type_has_the_names_of_its_dictionary(names, functions):
    assert get_args(names) == tuple(functions)
    assert set(functions) <= set(losses.PENALTIES) or names is not Form
