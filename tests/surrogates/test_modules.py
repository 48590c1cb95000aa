"""Training on values and partials, and the weight between them."""

import pytest
import torch

from jacmatch.errors import InputError
from jacmatch.surrogates.modules import fit_surrogate, regression


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.ci
def test_partials_say_more_than_values():
    """The same points and steps: the error at other points is less than half."""
    x = torch.rand(8, 2, generator=torch.Generator().manual_seed(0)) * 3
    y, other = torch.sin(x).prod(1, keepdim=True), torch.rand(200, 2, generator=torch.Generator().manual_seed(1)) * 3
    j = torch.stack([x[:, 0].cos() * x[:, 1].sin(), x[:, 0].sin() * x[:, 1].cos()], 1)[:, None]
    rmse = {}
    for partials in ("none", "jacobian"):
        net = fit_surrogate(x, y, jacobian=j, partials=partials, hidden=(32, 32), activation="silu", steps=50, lr=0.03)
        rmse[partials] = float((net(other) - torch.sin(other).prod(1, keepdim=True)).detach().square().mean().sqrt())
    assert rmse["jacobian"] < 0.5 * rmse["none"]


def test_a_weight_by_scale_makes_both_terms_equal_for_the_mean():
    x = torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    y, j = 100 * x.prod(1, keepdim=True), 100 * x.flip(1)[:, None]

    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = torch.nn.Parameter(y.mean(0))

        def forward(self, x):
            return self.mean + 0 * x.sum(1, keepdim=True)

    terms = regression(Mean(), x, y, jacobian=j).eval()(x, y, ids=torch.arange(50))
    assert float(terms["jacobians"].detach()) == pytest.approx(float(terms["values"].detach()), rel=1e-4)
    assert float(terms["values"].detach()) == pytest.approx(1.0, rel=1e-4)
    with pytest.raises(InputError, match="`partials` of `fit_surrogate`"):
        regression(Mean(), x, y, jacobian=j, partials="all")
    with pytest.raises(InputError, match="`jacobian` or `teacher` of `fit_surrogate` must be given"):
        regression(Mean(), x, y)


@pytest.mark.usefixtures("as_users_run")
def test_the_former_name_of_partials():
    x = torch.rand(6, 1)
    with pytest.warns(DeprecationWarning, match="`slopes` of `fit_surrogate` is now `partials`"):
        net = fit_surrogate(x, x, slopes="none", hidden=(2,), steps=1)
    assert net(x).shape == (6, 1)
