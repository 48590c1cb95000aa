"""What a function may be, the source of its derivatives, and what is refused about it."""

import numpy as np
import pytest
import torch
from torch import nn

from jacmatch.errors import InputError
from jacmatch.jobs.surrogate.functions import HIGH, LOW, check_function, flow, import_callable, open_function

X = torch.quasirandom.SobolEngine(3, scramble=True, seed=0).draw(8, dtype=torch.float64) + 0.1
UNITS = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


def tensors(x):
    return torch.stack([x.prod(1), x.sin().sum(1)], 1)


def arrays(x):
    return np.stack([np.prod(x, 1), np.sin(x).sum(1)], 1)


def own(factor=1.0):
    """A function that brings its Jacobian, with one entry times a factor."""

    def function(x):
        return np.sin(x)

    function.jacobian = lambda x: np.stack([np.diag(np.cos(row) * [1, 1, factor]) for row in x])
    return function


def look(call, **settings):
    function = open_function("f", call, X, UNITS, **settings)
    return function, check_function(function, X)


def exact(x):
    j = torch.stack([torch.stack([x[:, 1] * x[:, 2], x[:, 0] * x[:, 2], x[:, 0] * x[:, 1]], 1), x.cos()], 1)
    return j


@pytest.mark.parametrize(
    ("call", "way", "close"),
    [
        (tensors, "autograd", 1e-12),
        (arrays, "differences", 1e-7),
        (lambda x: arrays(x).astype("f4"), "differences", 1e-2),
    ],
)
def test_derivatives_come_from_autograd_or_differences(call, way, close):
    function, result = look(call)
    assert (function.way, result.outputs, result.non_smooth) == (way, 2, 0.0)
    assert torch.allclose(function.jacobian(X), exact(X), rtol=0, atol=close)


def test_the_way_can_be_chosen():
    function, _ = look(tensors, way="differences", step=1e-3)
    assert torch.allclose(function.jacobian(X), exact(X), rtol=0, atol=1e-5)
    assert not torch.allclose(function.jacobian(X), exact(X), rtol=0, atol=1e-9)  # truncation: the step was that one
    assert look(own())[0].way == "own"
    assert look(arrays, own=lambda x: exact(torch.from_numpy(x)).numpy())[0].way == "own"


def test_a_function_that_takes_both_is_called_with_arrays_where_its_jacobian_needs_them():
    def function(x):
        return x**2

    function.jacobian = lambda x: np.stack([np.diag(2 * row) for row in x.copy()])  # a tensor cannot be copied so
    assert look(function)[0].arrays == "numpy"
    function.jacobian = lambda x: torch.diag_embed(2 * x)
    assert look(function)[0].arrays == "torch"


def test_a_network_in_float32_is_called_in_float32():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    function, result = look(net)
    assert (function.dtype, function.way) == (torch.float32, "autograd")
    assert result.disagreement < 1e-3


def test_a_network_is_called_in_evaluation_mode():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    function, _ = look(net)
    assert torch.equal(function.values(X), net.eval()(X).detach())


def noisy(size, sign=1.0):
    """Values with noise of a solver, fixed by the point; an own Jacobian, right or of the wrong sign."""

    def call(x):
        return tensors(x) + size * torch.sin(1e7 * x.sum(1, keepdim=True))

    call.jacobian = lambda x: sign * exact(x)
    return call


def test_a_jacobian_of_noisy_values_is_compared_at_the_given_step():
    with pytest.raises(InputError, match="where the values are noisy, use a longer --step"):
        look(noisy(1e-7))
    assert look(noisy(1e-7), step=0.02)[1].disagreement < 1e-3
    for size in (1e-7, 1e-4):
        with pytest.raises(InputError, match="must agree with differences of its values"):
            look(noisy(size, sign=-1.0), step=0.02)


def test_a_jacobian_that_could_not_be_checked_is_not_reported_to_agree():
    _, result = look(noisy(1e-2))
    assert (result.disagreement, result.non_smooth) == (None, 1.0)


def test_calls_are_counted():
    function = open_function("f", arrays, X, UNITS)
    function.values(X)
    assert function.points == 8
    function.jacobian(X)
    assert function.points == 8 + 8 * (1 + 2 * 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x.prod(1), r"must return values \(8, K\).*Got shape \(8,\)"),
        (lambda x: x[:, :, None], r"must return values \(8, K\).*Got shape \(8, 3, 1\).*npz:FILE"),
        (lambda x: x.sum(), "must return one row for each of the 8 points"),
        (lambda x: x[:1] ** 2, "must return one row for each of the 8 points"),
        (lambda x: x > 0.5, "must return float32 or float64"),
        (lambda x: np.asarray(x).astype(int), "must return float32 or float64. Got int64"),
        (lambda x: np.asarray(x).astype("f2"), "must return float32 or float64. Got float16"),
        (lambda x: x.half(), "must return float32 or float64. Got torch.float16"),
        (lambda x: {}, "must return a tensor or an array"),
        (lambda x: [[1.0], [1.0, 2.0]] * 4, "must return an array.*inhomogeneous"),
        (lambda x: np.asarray(x)[:, :0], r"must return values \(8, K\).*Got shape \(8, 0\)"),
        (lambda x: x.to("meta") if isinstance(x, torch.Tensor) else 1 / 0, "must return a tensor on the cpu. Got meta"),
        (lambda x: x * np.where(np.asarray(x)[:, :1] > 1, np.nan, 1.0), "must be finite.*NaN or infinity at"),
        (lambda x: 1 / 0, r"must take a batch \(8, 3\) of tensors or arrays.*division by zero"),
        (lambda x: np.asarray(x) - np.asarray(x).mean(0), "for the point alone.*difference of"),
        (lambda x: np.sin(np.asarray(x)) + np.random.rand(len(x), 3), "the same values for the same points"),
        (own(1.01), r"must agree with differences.*∂y2/∂x2, x = \(.*by differences"),
    ],
)
def test_functions_that_cannot_be_learned_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        look(call)


def test_a_jacobian_of_a_wrong_shape_or_with_nan_is_refused():
    with pytest.raises(InputError, match=r"The Jacobian of f must have the shape \(8, K, 3\)"):
        look(np.sin, own=np.cos)
    with pytest.raises(InputError, match="The Jacobian of f must be finite"):
        look(np.sin, own=lambda x: np.full((len(x), 3, 3), np.nan))


def test_missing_derivatives_are_refused():
    with pytest.raises(InputError, match="must have a Jacobian of its own"):
        look(arrays, way="own")
    with pytest.raises(InputError, match=r"must be differentiable by autograd.*a NumPy function"):
        look(arrays, way="autograd")
    with pytest.raises(InputError, match="`--step` of `surrogate` must be positive"):
        look(arrays, step=0.0)
    with pytest.raises(InputError, match=r"must change each input of f in float64\. Got 1e-30"):
        look(arrays, step=1e-30)


def test_autograd_through_a_detached_part_disagrees():
    with pytest.raises(InputError, match=r"by autograd for `--jacobian autograd`.*is wrong"):
        look(lambda x: x**2 + x.detach().sin())


@pytest.mark.parametrize("call", [lambda x: np.abs(x - X[0].numpy()), lambda x: np.where(x > X[0].numpy(), 1.0, x)])
def test_a_kink_and_a_jump_at_the_step_are_reported(call):
    function, result = look(lambda x: call(np.asarray(x)))
    assert result.non_smooth == 1 / 8
    assert result.point.startswith(f"({float(X[0, 0]):.6g}")
    function.jacobian(X)
    assert (function.non_smooth, function.differenced) == (1, 8)


def test_names_that_lead_nowhere_are_refused():
    assert import_callable("numpy:sin") is np.sin
    for spec in ("numpy", "no-module:f", "nowhere.at.all:f", "torchvision:models", "digits:f"):
        with pytest.raises(InputError, match=r"must be PACKAGE.MODULE:CALLABLE, onnx:FILE, or a table"):
            import_callable(spec)
    with pytest.raises(InputError, match="the callable of module numpy"):
        import_callable("numpy:sinn")


def test_the_flow_in_the_middle_of_its_ranges():
    """T_u (H_u − H_l) and the resistance of Harper & Gupta's formula, in numbers."""
    depth = np.log(25_050 / 0.1)
    resistance = 1 + 2 * 1400 * 89_335 / (depth * 0.1**2 * 10_950) + 89_335 / 89.55
    middle = (torch.tensor(LOW, dtype=torch.float64) + torch.tensor(HIGH, dtype=torch.float64)) / 2
    assert float(flow(middle[None])) == pytest.approx(2 * np.pi * 89_335 * (1050 - 760) / (depth * resistance))
