"""Losses, probes and derivative products, whatever the shape, type and layout: a sample is by itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import jacmatch
from jacmatch.errors import InputError
from jacmatch.jacobian import probes
from jacmatch.losses import JACOBIAN_LOSSES, OUTPUT_LOSSES
from jacmatch.objectives.weights import GradientShare, LossWeights

from .tensors import laid_out, layouts, numbers, seeds, shapes, sizes

pytestmark = pytest.mark.usefixtures("all_as_users_run")


def network(shape, outputs, seed):
    torch.manual_seed(seed)
    size = int(torch.tensor(shape).prod())
    hidden = nn.Sequential(nn.Linear(size, 5), nn.Tanh(), nn.Linear(5, outputs))
    return nn.Sequential(nn.Flatten(), *hidden).double()


@given(st.sampled_from(sorted(JACOBIAN_LOSSES)), sizes, sizes, shapes, seeds, layouts, st.data())
def test_a_jacobian_loss_of_a_sample_is_its_own(name, batch, rows, shape, seed, layout, data):
    student, teacher = (numbers(seed + k, batch, rows, *shape) for k in (0, 1))
    loss = JACOBIAN_LOSSES[name]
    whole = loss(student, teacher)
    order = torch.tensor(data.draw(st.permutations(range(batch))))
    assert whole.shape == (batch,)
    assert (whole >= 0).all()
    torch.testing.assert_close(loss(laid_out(student, layout), laid_out(teacher, layout)), whole)
    torch.testing.assert_close(loss(student[order], teacher[order]), whole[order])
    torch.testing.assert_close(torch.cat([loss(student[n : n + 1], teacher[n : n + 1]) for n in range(batch)]), whole)
    torch.testing.assert_close(loss(teacher, teacher), torch.zeros_like(whole), atol=1e-12, rtol=0)
    torch.testing.assert_close(loss(student.float(), teacher.float()).double(), whole, atol=1e-4, rtol=1e-4)


@given(st.sampled_from(sorted(OUTPUT_LOSSES)), sizes, st.integers(2, 6), seeds, layouts, st.data())
def test_an_output_loss_of_a_sample_is_its_own(name, batch, outputs, seed, layout, data):
    student, teacher = (numbers(seed + k, batch, outputs) for k in (0, 1))
    loss = OUTPUT_LOSSES[name]
    whole = loss(student, teacher)
    order = torch.tensor(data.draw(st.permutations(range(batch))))
    torch.testing.assert_close(loss(laid_out(student, layout), laid_out(teacher, layout)), whole)
    torch.testing.assert_close(loss(student[order], teacher[order]), whole[order])
    torch.testing.assert_close(torch.cat([loss(student[n : n + 1], teacher[n : n + 1]) for n in range(batch)]), whole)
    torch.testing.assert_close(loss(teacher, teacher), torch.zeros_like(whole), atol=1e-12, rtol=0)
    assert (whole >= -1e-12).all()


@given(sizes, sizes, shapes, sizes, seeds, layouts, st.sampled_from(("forward", "reverse")))
def test_products_are_those_of_the_jacobian(batch, outputs, shape, count, seed, layout, engine):
    module, x = network(shape, outputs, seed % 1000), numbers(seed, batch, *shape)
    v, u = numbers(seed + 1, count, batch, *shape), numbers(seed + 2, count, batch, outputs)
    y, whole = jacmatch.jacobian(module, laid_out(x, layout))
    torch.testing.assert_close(y, module(x))
    flat = whole.flatten(2)
    expected = torch.einsum("bki,pbi->pbk", flat, v.flatten(2))
    torch.testing.assert_close(
        jacmatch.jvp(module, laid_out(x, layout), laid_out(v, layout), engine=engine)[1], expected
    )
    expected = torch.einsum("pbk,bki->pbi", u, flat).reshape(v.shape)
    torch.testing.assert_close(jacmatch.vjp(module, laid_out(x, layout), laid_out(u, layout))[1], expected)
    torch.testing.assert_close(jacmatch.vjp(module, x, u[0])[1], expected[0])


@given(sizes, st.integers(2, 4), shapes, seeds, st.data())
def test_a_jacobian_of_a_sample_is_its_own(batch, outputs, shape, seed, data):
    module, x = network(shape, outputs, seed % 1000).eval(), numbers(seed, batch, *shape)
    order = torch.tensor(data.draw(st.permutations(range(batch))))
    chunk = data.draw(st.integers(1, outputs))
    whole = jacmatch.jacobian(module, x)[1]
    torch.testing.assert_close(jacmatch.jacobian(module, x[order], chunk_size=chunk)[1], whole[order])
    cut = data.draw(st.integers(1, batch))
    parts = [jacmatch.jacobian(module, part)[1] for part in torch.split(x, cut)]
    torch.testing.assert_close(torch.cat(parts), whole)


@given(shapes, st.sampled_from([torch.int64, torch.bool, torch.complex64, torch.uint8]))
def test_inputs_without_a_derivative_are_refused(shape, dtype):
    x = torch.zeros(2, *shape, dtype=dtype)
    for call in (lambda: jacmatch.jacobian(nn.Flatten(), x), lambda: jacmatch.jvp(nn.Flatten(), x, x)):
        with pytest.raises(InputError, match=r"floating"):
            call()


@given(st.sampled_from(sorted(probes.LAWS)), st.lists(st.integers(0, 10**9), min_size=1, max_size=6), seeds, st.data())
def test_a_direction_is_a_function_of_seed_id_and_draw(law, ids, seed, data):
    shape, count, draw = data.draw(shapes), data.draw(sizes), data.draw(st.integers(0, 10**6))
    settings = {"seed": seed, "draw": draw, "shape": shape}
    whole = probes.directions(law, ids=torch.tensor(ids), count=count, **settings)
    assert whole.shape == (count, len(ids), *shape)
    assert whole.isfinite().all()
    for position, number in enumerate(ids):
        alone = probes.directions(law, ids=torch.tensor([number]), count=count, **settings)
        torch.testing.assert_close(alone[:, 0], whole[:, position])
    more = probes.directions(law, ids=torch.tensor(ids), count=count + 1, **settings)
    torch.testing.assert_close(more[:count], whole, atol=1e-5, rtol=1e-5)
    if law in ("rademacher", "sphere", "basis", "orthogonal"):
        square = whole.double().flatten(2).square().sum(2)
        torch.testing.assert_close(
            square, torch.full_like(square, float(torch.tensor(shape).prod())), rtol=1e-5, atol=0
        )


@given(
    st.dictionaries(st.sampled_from("abc"), st.floats(0.01, 100), min_size=1),
    st.lists(st.floats(0.05, 0.4), min_size=1, max_size=2),
    st.floats(1e-3, 1e3),
    seeds,
)
def test_shares_of_the_gradient_are_those_that_were_requested(weights, shares, scale, seed):
    shares_by_name = {f"share{number}": GradientShare(value) for number, value in enumerate(shares)}
    theta = nn.Parameter(numbers(seed, 4))
    names = [*weights, *shares_by_name]
    sizes_of = numbers(seed + 1, len(names)).abs() + 0.1
    balance = LossWeights({**weights, **shares_by_name})
    terms = {name: size * scale * theta.square().sum() for name, size in zip(names, sizes_of, strict=True)}
    balance.measure(terms, [theta])
    assert sum(balance.shares.values()) == pytest.approx(1)
    for name, share in shares_by_name.items():
        assert balance.shares[name] == pytest.approx(float(share), rel=1e-4)
    ratios = {name: balance.shares[name] / (weight * float(terms[name].detach())) for name, weight in weights.items()}
    assert max(ratios.values()) == pytest.approx(min(ratios.values()), rel=1e-4)
