"""`jvp`, `vjp` and `jacobian` equal the definition, for every architecture and engine that can."""

from functools import cache

import pytest
import torch
from torch import Tensor

from jacmatch.jacobian import jacobian, jvp, jvp_products, unverified, vjp, vjp_products

from . import reference
from .architectures import ARCHITECTURES, made, plain

each = pytest.mark.parametrize("name", ARCHITECTURES)
each_with_engine = pytest.mark.parametrize(
    ("name", "engine"), [(name, engine) for name, one in ARCHITECTURES.items() for engine in one.engines]
)
WITH_ROWS = [
    name for name, one in ARCHITECTURES.items() if name != "image-to-image" and one.batch_norm == "batch"
]  # outputs (B, K), and `jacobian` knows the policy "batch" only


@cache
def truth(name: str) -> tuple[Tensor, Tensor]:
    """Outputs and the batch's Jacobian of the plain module."""
    module, x = plain(name)
    return reference.values(module, x), reference.batch_jacobian(module, x)


def assert_equal(got: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert got.shape == expected.shape
    error = float((got.detach() - expected).norm() / expected.norm())
    assert error <= tolerance


@pytest.mark.ci
@each
def test_the_two_references_agree(name):
    _, full = truth(name)
    module, x = plain(name)
    v = torch.randn(2, *full.shape[: full.dim() - x.dim()], dtype=x.dtype)
    # the backward pass of PyTorch's hardsigmoid takes 1/6 in float32
    tolerance = 1e-7 if name.startswith("hardsigmoid") else 1e-9
    assert_equal(reference.rows_by_backward(module, x, v), reference.reverse_product(full, v), tolerance)


@each_with_engine
def test_jvp(name, engine):
    y, full = truth(name)
    module, x = made(name)
    v = torch.randn(2, *x.shape, dtype=x.dtype)
    expected = reference.forward_product(full, v)
    policy = ARCHITECTURES[name].batch_norm
    torch.manual_seed(0)
    outputs, several = jvp(module, x, v, engine=engine, batch_norm=policy)
    assert_equal(outputs, y, 1e-12)
    assert_equal(several, expected)
    module, x = made(name)
    torch.manual_seed(0)
    outputs, single = jvp(module, x, v[1], engine=engine, batch_norm=policy)
    assert_equal(outputs, y, 1e-12)
    assert_equal(single, expected[1])


@pytest.mark.ci
@each
def test_jvp_by_differences(name):
    y, full = truth(name)
    module, x = made(name)
    v = torch.randn(2, *x.shape, dtype=x.dtype)
    torch.manual_seed(0)
    outputs, products = jvp(module, x, v, engine="differences", batch_norm=ARCHITECTURES[name].batch_norm)
    assert_equal(outputs, y, 1e-12)
    assert_equal(products, reference.forward_product(full, v), 1e-8)  # ε^⅔ is 4·10⁻¹¹, times higher derivatives


@each
def test_jvp_of_the_automatic_engine(name):
    y, full = truth(name)
    module, x = made(name)
    v = torch.randn(2, *x.shape, dtype=x.dtype)
    torch.manual_seed(0)
    result = jvp_products(module, x, v, batch_norm=ARCHITECTURES[name].batch_norm)
    assert result.engine == ARCHITECTURES[name].engines[0]
    assert_equal(result.outputs, y, 1e-12)
    assert_equal(result.products, reference.forward_product(full, v))


@each
def test_vjp(name):
    y, full = truth(name)
    module, x = made(name)
    v = torch.randn(2, *y.shape, dtype=x.dtype)
    expected = reference.reverse_product(full, v)
    policy = ARCHITECTURES[name].batch_norm
    torch.manual_seed(0)
    outputs, several = vjp(module, x, v, batch_norm=policy)
    assert_equal(outputs, y, 1e-12)
    assert_equal(several, expected)
    module, x = made(name)
    torch.manual_seed(0)
    outputs, single = vjp(module, x, v[1], batch_norm=policy)
    assert_equal(outputs, y, 1e-12)
    assert_equal(single, expected[1])


@pytest.mark.parametrize("name", WITH_ROWS)
def test_jacobian(name):
    y, full = truth(name)
    module, x = made(name)
    torch.manual_seed(0)
    outputs, rows = jacobian(module, x)
    assert_equal(outputs, y, 1e-12)
    assert_equal(rows, reference.own_rows(full))


@pytest.mark.ci
@pytest.mark.parametrize("name", WITH_ROWS)
def test_chunks_never_change_the_jacobian(name):
    for chunk_size in (1, 2, 3, 4, 100):
        module, x = made(name)
        torch.manual_seed(0)
        outputs, rows = jacobian(module, x, chunk_size=chunk_size)
        y, full = truth(name)
        assert_equal(outputs, y, 1e-12)
        assert_equal(rows, reference.own_rows(full))


@pytest.mark.ci
@pytest.mark.parametrize(
    "name", [name for name, one in ARCHITECTURES.items() if not one.training and name != "batchnorm-untracked-eval"]
)
def test_samples_do_not_see_each_other_in_evaluation(name):
    module, x = made(name)
    order = torch.tensor([2, 0, 1])
    y = reference.values(module, x)
    cotangents, tangents = torch.randn_like(y)[None], torch.randn_like(x)[None]
    whole = vjp_products(module, x, cotangents).products, jvp_products(module, x, tangents).products
    for part in (order, order[1:2]):
        again = (
            vjp_products(module, x[part], cotangents[:, part]).products,
            jvp_products(module, x[part], tangents[:, part]).products,
        )
        for one, other in zip(whole, again, strict=True):
            assert_equal(other, one[:, part].detach(), 1e-12)


@pytest.mark.parametrize("engine", ["forward", "reverse"])
def test_the_lstm_in_float32(engine):
    """On the CPU float32 is where PyTorch would take oneDNN's kernel, which has no forward-mode derivative."""
    module, x = made("lstm", torch.float32)
    _, full = truth("lstm")
    v = torch.randn(2, *x.shape)
    assert_equal(jvp(module, x, v, engine=engine)[1].double(), reference.forward_product(full, v.double()), 1e-5)
    u = torch.randn(2, 3, 2)
    assert_equal(vjp(module, x, u)[1].double(), reference.reverse_product(full, u.double()), 1e-5)
    assert_equal(jacobian(module, x)[1].double(), reference.own_rows(full), 1e-5)


@pytest.mark.parametrize("engine", ["auto", "forward", "reverse", "differences"])
def test_any_function_of_a_tensor_will_do(engine):
    x, v = torch.randn(3, 2, 2, dtype=torch.float64), torch.randn(4, 3, 2, 2, dtype=torch.float64)

    def function(z: Tensor) -> Tensor:
        return z.flatten(1).sin() * z.flatten(1).sum(1, keepdim=True)

    full = reference.batch_jacobian(function, x)
    outputs, products = jvp(function, x, v, engine=engine)
    assert_equal(outputs, function(x))
    assert_equal(products, reference.forward_product(full, v), 1e-8 if engine == "differences" else 1e-9)
    assert_equal(jacobian(function, x)[1], reference.own_rows(full))
    assert_equal(vjp(function, x, v.flatten(2))[1], reference.reverse_product(full, v.flatten(2)))


def test_as_many_directions_as_samples():
    """Then (P, B, K) and (B, K) can be distinguished by their number of dimensions only."""
    module, x = made("mlp-tanh")
    _, full = truth("mlp-tanh")
    v, u = torch.randn(3, *x.shape, dtype=x.dtype), torch.randn(3, 3, 3, dtype=x.dtype)
    assert_equal(jvp(module, x, v)[1], reference.forward_product(full, v))
    assert_equal(vjp(module, x, u)[1], reference.reverse_product(full, u))


def test_cotangents_may_be_made_from_the_values():
    module, x = made("mlp-tanh")
    seen = []

    def squares(values: Tensor) -> Tensor:
        seen.append(values)
        return torch.stack([values, values**2])

    result = vjp_products(module, x, squares)
    assert not seen[0].requires_grad
    y, full = truth("mlp-tanh")
    assert_equal(result.products, reference.reverse_product(full, torch.stack([y, y**2])))


def test_directions_in_another_float_type_are_taken_over():
    module, x = made("mlp-tanh")
    v = torch.randn(2, *x.shape)
    for engine in ("forward", "reverse", "differences"):
        products = jvp(module, x, v, engine=engine)[1]
        assert products.dtype == torch.float64
        assert_equal(products, reference.forward_product(truth("mlp-tanh")[1], v.double()), 1e-7)


@pytest.mark.parametrize(("way", "passes"), [("vjp", 1), ("forward", 1), ("reverse", 1), ("auto", 1), ("jacobian", 1)])
@pytest.mark.parametrize("training", [False, True])
def test_the_network_runs_once(way, passes, training):
    """However many directions there are."""
    module, x = made("mlp-tanh")
    module.train(training)
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    with unverified():  # the check of an engine before its first use has passes of its own
        if way == "vjp":
            vjp_products(module, x, torch.ones(5, 3, 3, dtype=x.dtype))
        elif way == "jacobian":
            jacobian(module, x, chunk_size=1)
        else:
            jvp_products(module, x, torch.ones(5, *x.shape, dtype=x.dtype), engine=way)
    assert len(calls) == passes
