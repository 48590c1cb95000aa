"""The parameter gradient of every Jacobian loss equals finite differences of the loss, through every architecture.

The losses of the engines' side are the library's; those of the reference are written from the definitions. Jv is taken
by differences inside the differences; vᵀJ by plain backward passes inside them.
"""

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from jacmatch.jacobian import from_embeddings, jacobian, jvp, jvp_products, vjp_products
from jacmatch.losses import JACOBIAN_LOSSES

from . import reference
from .architectures import ARCHITECTURES, EXACT, made, plain

WAYS = [
    (name, way) for name, one in ARCHITECTURES.items() for way in ("vjp", "differences", *one.engines)
]  # through a network, by vᵀJ or by one of the engines for Jv


def directions(shape: torch.Size, count: int = 1) -> Tensor:
    """Fixed directions for each sample."""
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def target(shape: torch.Size) -> Tensor:
    """What the rows should be; it has nothing to do with what they are."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def losses(rows: Tensor, table) -> Tensor:
    """Every loss of the table between the rows (P, B, ...) and the target, as a mean over the batch."""
    rows = rows.transpose(0, 1)
    return torch.stack([table[name](rows, target(rows.shape)).mean() for name in reference.LOSSES])


@cache
def derivatives(name: str, way: str) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The losses, the directions of the parameters, and how the losses change along them."""
    module, x = plain(name)
    v = directions(reference.values(module, x).shape if way == "vjp" else x.shape)
    products = reference.rows_by_backward if way == "vjp" else reference.jvp

    def value() -> Tensor:
        return losses(products(module, x, v), reference.LOSSES)

    parameters = list(module.parameters())
    generator = torch.Generator().manual_seed(3)
    moves = [reference.sketch(parameter, 2, generator) for parameter in parameters]
    return value(), moves, reference.parameter_derivatives(value, parameters, moves)


def along(gradients, moves: list[Tensor]) -> list[Tensor]:
    """Σ g·d for each direction d of each parameter, zero where there is no gradient."""
    return [
        torch.zeros(len(several), dtype=torch.float64) if g is None else several.flatten(1) @ g.flatten()
        for g, several in zip(gradients, moves, strict=True)
    ]


def assert_gradients(loss: Tensor, parameters: list[Tensor], moves: list[Tensor], expected: list[Tensor]) -> None:
    """Each parameter's derivatives are right to 10⁻⁶ of their size, or to 10⁻⁸ of the size of all."""
    got = along(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True), moves)
    size = torch.cat(expected).norm()
    assert size > 0
    for number, (mine, right) in enumerate(zip(got, expected, strict=True)):
        error = float((mine - right).norm() / max(right.norm(), 0.01 * size))
        assert error <= 1e-6, f"parameter {number} of shape {tuple(parameters[number].shape)}"


@pytest.mark.parametrize(
    ("name", "way"), [pytest.param(*one, marks=pytest.mark.ci if one[1] == "differences" else []) for one in WAYS]
)
def test_gradients_of_jacobian_losses(name, way):
    architecture = ARCHITECTURES[name]
    module, x = made(name)
    torch.manual_seed(0)
    if way == "vjp":
        cotangents = directions(reference.values(module, x).shape)
        rows = vjp_products(module, x, cotangents, batch_norm=architecture.batch_norm).products
        key = way
    else:
        rows = jvp_products(module, x, directions(x.shape), engine=way, batch_norm=architecture.batch_norm).products
        key = "jvp"
    mine = losses(rows, JACOBIAN_LOSSES)
    value, moves, expected = derivatives(name, key)
    torch.testing.assert_close(mine.detach(), value, rtol=1e-6, atol=0)
    parameters = list(module.parameters())
    for number, loss in enumerate(mine):
        assert_gradients(loss, parameters, moves, [several[:, number] for several in expected])


@pytest.mark.ci
@pytest.mark.parametrize(("name", "engine"), [(name, way) for name, way in WAYS if way in EXACT])
def test_gradients_through_several_directions_at_once(name, engine):
    """They are the sum of those through each direction by itself."""
    gradients = []
    for chosen in (slice(0, 3), slice(0, 1), slice(1, 2), slice(2, 3)):
        module, x = made(name)
        torch.manual_seed(0)
        v = directions(x.shape, 3)[chosen]
        rows = jvp_products(module, x, v, engine=engine, batch_norm=ARCHITECTURES[name].batch_norm).products
        loss = (rows - target(rows.shape[1:])).square().sum()
        parameters = list(module.parameters())
        several = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients.append([torch.zeros_like(p) if g is None else g for g, p in zip(several, parameters, strict=True)])
    size = torch.cat([g.flatten() for g in gradients[0]]).norm()
    for together, *single in zip(*gradients, strict=True):
        assert (together - sum(single)).norm() <= 1e-10 * size


@pytest.mark.parametrize("chunk_size", [1, 2, None])
def test_gradient_through_the_full_jacobian(chunk_size):
    module, x = made("encoder-layer")

    def value() -> Tensor:
        eye = torch.eye(3, dtype=torch.float64)[:, None].expand(-1, len(x), -1)
        return losses(reference.rows_by_backward(module, x, eye), reference.LOSSES)

    parameters = list(module.parameters())
    moves = [reference.sketch(parameter, 1, torch.Generator().manual_seed(3)) for parameter in parameters]
    expected = reference.parameter_derivatives(value, parameters, moves)
    mine = losses(jacobian(module, x, chunk_size=chunk_size)[1].transpose(0, 1), JACOBIAN_LOSSES)
    for number, loss in enumerate(mine):
        assert_gradients(loss, parameters, moves, [several[:, number] for several in expected])


@pytest.mark.parametrize("way", ["vjp", "forward", "reverse", "differences"])
@pytest.mark.parametrize("name", ["mlp-tanh", "batchnorm-train", "layernorm-gelu", "encoder-layer"])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_with_respect_to_the_input(name, way, frozen):
    """x asks for a gradient, as when an adversarial point is sought: here x itself is made from z."""
    module, z = made(name)
    module.requires_grad_(not frozen)
    v = directions(torch.Size([3, 3])) if way == "vjp" else directions(z.shape)
    z.requires_grad_()
    x = z.sin()
    rows = vjp_products(module, x, v).products if way == "vjp" else jvp_products(module, x, v, engine=way).products
    loss = losses(rows, JACOBIAN_LOSSES)[0]
    module, _ = made(name)
    products = reference.rows_by_backward if way == "vjp" else reference.jvp
    moves = [reference.sketch(z, 3, torch.Generator().manual_seed(3))]

    def value() -> Tensor:
        return losses(products(module, z.detach().sin(), v), reference.LOSSES)

    expected = reference.parameter_derivatives(value, [z], moves)
    assert_gradients(loss, [z], moves, [expected[0][:, 0]])


class Classifier(nn.Module):
    """Token ids in, logits out."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(7, 4), body, nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.body(self.embedding(tokens))
        return self.head((hidden[0] if isinstance(hidden, tuple) else hidden).mean(1))


BODIES = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
    "lstm": lambda: nn.LSTM(4, 4, batch_first=True),
    "attention": lambda: nn.TransformerEncoderLayer(4, 1, 4, dropout=0.0, activation="gelu", batch_first=True),
}


@pytest.mark.parametrize("way", ["vjp", "jvp"])
@pytest.mark.parametrize("body", BODIES)
def test_from_embeddings_to_logits(body, way):
    module = Classifier(BODIES[body]()).double().eval()
    tokens = torch.tensor([[1, 5, 2], [0, 6, 6]])
    embeddings, function = from_embeddings(module, "embedding", tokens)
    assert torch.equal(embeddings, module.embedding(tokens))
    v = directions(torch.Size([2, 2]) if way == "vjp" else embeddings.shape)
    products = reference.rows_by_backward if way == "vjp" else reference.jvp
    expected = products(function, embeddings, v)
    rest = [parameter for name, parameter in module.named_parameters() if name != "embedding.weight"]
    moves = [reference.sketch(parameter, 1, torch.Generator().manual_seed(3)) for parameter in rest]
    derivatives = reference.parameter_derivatives(
        lambda: losses(products(function, embeddings, v), reference.LOSSES), rest, moves
    )
    if way == "vjp":
        results = [vjp_products(function, embeddings, v)]
    else:
        results = [
            jvp_products(function, embeddings, v, engine=engine) for engine in ("forward", "reverse", "differences")
        ]
    for result in results:
        torch.testing.assert_close(result.outputs, module(tokens), rtol=1e-12, atol=1e-12)
        tolerance = 1e-7 if result.engine == "differences" else 1e-9
        assert (result.products.detach() - expected).norm() <= tolerance * expected.norm()
        assert_gradients(losses(result.products, JACOBIAN_LOSSES)[0], rest, moves, [one[:, 0] for one in derivatives])


@pytest.mark.parametrize("engine", ["auto", "forward", "reverse"])
def test_embeddings_of_a_float32_lstm(engine):
    """The layer that must leave oneDNN stands behind a plain function here."""
    module = Classifier(nn.LSTM(4, 4, batch_first=True))
    tokens = torch.tensor([[1, 5, 2], [0, 6, 6]])
    embeddings, function = from_embeddings(module, "embedding", tokens)
    v = directions(embeddings.shape)
    result = jvp_products(function, embeddings, v.float(), engine=engine)
    exact = Classifier(nn.LSTM(4, 4, batch_first=True)).double()
    exact.load_state_dict(module.state_dict())
    embeddings, function = from_embeddings(exact, "embedding", tokens)
    expected = reference.jvp(function, embeddings, v)
    torch.testing.assert_close(result.products.detach().double(), expected, rtol=1e-4, atol=1e-6)
    assert result.engine == ("forward" if engine == "auto" else engine)


NORMALISATIONS = {
    "batch_norm": lambda z, scale: functional.batch_norm(z * scale, None, None, training=True),
    "layer_norm": lambda z, scale: functional.layer_norm(z * scale, z.shape[1:], eps=0.1),
    "instance_norm": lambda z, scale: functional.instance_norm(z * scale, eps=0.1),
}


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_normalisation_upstream_is_silently_wrong_and_ours_is_right(name):
    """torch.func.jvp holds the statistics that were saved for the backward pass constant (pytorch #196699).

    When the first assertion fails, PyTorch has been mended, and `twice_differentiable(statistics=True)` can go.
    """
    x, v = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(1, 4, 3, 5, dtype=torch.float64)
    scale = torch.linspace(0.5, 1.5, 5, dtype=torch.float64).requires_grad_()

    def function(z: Tensor) -> Tensor:
        return NORMALISATIONS[name](z, scale).sin()

    moves = [torch.eye(5, dtype=torch.float64)]
    (expected,) = reference.parameter_derivatives(
        lambda: reference.jvp(function, x, v).square().sum()[None], [scale], moves
    )
    expected = expected[:, 0]
    upstream = torch.func.jvp(function, (x,), (v[0],))[1]
    torch.testing.assert_close(upstream.detach()[None], reference.jvp(function, x, v), rtol=1e-8, atol=1e-8)
    (wrong,) = torch.autograd.grad(upstream.square().sum(), scale)
    assert (wrong - expected).norm() > 0.01 * expected.norm()
    for engine in ("forward", "reverse"):
        _, products = jvp(function, x, v, engine=engine)
        (right,) = torch.autograd.grad(products.square().sum(), scale)
        assert (right - expected).norm() <= 1e-6 * expected.norm()


SOLVED = {
    "solve": lambda a: torch.linalg.solve(a, torch.ones(len(a), 3, dtype=a.dtype)),
    "det": lambda a: torch.linalg.det(a)[:, None],
    "logdet": lambda a: torch.logdet(a)[:, None],
}


@pytest.mark.parametrize("name", SOLVED)
def test_linear_algebra_is_right_or_refused(name):
    """torch.func.jvp through these gives a wrong parameter gradient too: `auto` must not take the forward engine."""
    x, v = torch.randn(2, 3, 3, dtype=torch.float64), torch.randn(1, 2, 3, 3, dtype=torch.float64)
    scale = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)

    def function(z: Tensor) -> Tensor:
        return SOLVED[name](2 * torch.eye(3, dtype=z.dtype) + scale * z)

    moves = [torch.ones(1, 1, dtype=torch.float64)]
    (expected,) = reference.parameter_derivatives(
        lambda: reference.jvp(function, x, v).square().sum()[None], [scale], moves
    )
    (got,) = torch.autograd.grad(jvp(function, x, v)[1].square().sum(), scale)
    torch.testing.assert_close(got, expected[:, 0], rtol=1e-6, atol=0)
