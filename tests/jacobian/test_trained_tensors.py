"""Whether a result has a gradient is read from the graph: tensors that are trained need not be registered."""

import pytest
import torch
from torch import nn

from jacmatch import jacobian, jvp, vjp

D = torch.float64
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=D)
U, V = X[:, :3].flip(0), X.flip(1)


class Unregistered(nn.Module):
    """Its tensors live in a dictionary."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.tensors = {"weight": torch.randn(3, 4, dtype=D).requires_grad_()}

    def forward(self, x):
        return (x @ self.tensors["weight"].T).tanh()


PRODUCTS = {
    "vjp": lambda f: vjp(f, X, U),
    "jacobian": lambda f: jacobian(f, X),
    **{
        engine: lambda f, engine=engine: jvp(f, X, V, engine=engine) for engine in ("forward", "reverse", "differences")
    },
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_tensor_that_is_not_registered_gets_its_gradient(name):
    net = Unregistered()
    weight = net.tensors["weight"]
    y, product = PRODUCTS[name](net)
    (gradient,) = torch.autograd.grad(product.square().sum(), weight)
    assert y.requires_grad

    def penalty(w):
        return PRODUCTS[name](lambda x: (x @ w.T).tanh())[1].square().sum()

    move = torch.randn_like(weight)
    with torch.no_grad():
        expected = (penalty(weight + 1e-5 * move) - penalty(weight - 1e-5 * move)) / 2e-5
    torch.testing.assert_close((gradient * move).sum(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", PRODUCTS)
def test_what_nothing_is_trained_in_has_no_graph(name):
    net = Unregistered()
    net.tensors["weight"].requires_grad_(False)
    assert not any(each.requires_grad for each in PRODUCTS[name](net))


class Looked(nn.Module):
    """Its table of embeddings has a sparse gradient."""

    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(1)
        self.table, self.layer = nn.Embedding(5, 3, sparse=sparse, dtype=D), nn.Linear(4, 3, dtype=D)

    def forward(self, x):
        return self.layer(x).tanh() * self.table(torch.tensor([1, 3])).sum(0)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_sparse_gradient_is_that_of_the_dense_table(name):
    gradients = []
    for net in (Looked(True), Looked(False)):
        gradients.append(torch.autograd.grad(PRODUCTS[name](net)[1].square().sum(), net.table.weight)[0])
    assert gradients[0].is_sparse
    torch.testing.assert_close(gradients[0].to_dense(), gradients[1])
