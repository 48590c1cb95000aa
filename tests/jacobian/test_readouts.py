"""Each readout is what its formula says, and its derivative is right in every engine."""

import dataclasses
import importlib
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from jacmatch.errors import InputError
from jacmatch.jacobian import (
    READOUTS,
    AttentionMaps,
    AttentionPixel,
    Context,
    LabelLogit,
    Logits,
    LogProbabilities,
    Loss,
    OutputsFrom,
    PCAFeatures,
    PooledFeatures,
    Products,
    Readout,
    TopLogit,
    jvp_products,
    run,
    vjp_products,
)

from . import reference
from .ways import every_way, go

LABELS = torch.tensor([2, 0, 1])
MIXED = torch.tensor([[0.3, 0.0, 0.7], [1.0, 0.0, 0.0], [0.2, 0.5, 0.3]], dtype=torch.float64)
TEACHER = torch.tensor([[0.1, 0.9, 0.0], [5.0, 1.0, 2.0], [-3.0, -2.0, -1.0]], dtype=torch.float64)
PIXELS = torch.tensor([3, 0, 2])
X = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def network() -> nn.Sequential:
    """Features (B, 3, 5, 5) at layer "0", overwritten by an activation, and (B, 4, 2, 2) at "2"."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 3, 2),
        nn.Hardtanh(-100, 100, inplace=True),
        nn.Conv2d(3, 4, 2, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()


CASES: dict[str, tuple[Readout, Context]] = {
    "logits": (Logits(), Context()),
    "log-probabilities": (LogProbabilities(), Context()),
    "log-probabilities-warm": (LogProbabilities(temperature=3.0), Context()),
    "label-logit": (LabelLogit(), Context(labels=LABELS)),
    "label-logit-mixed": (LabelLogit(), Context(labels=MIXED)),
    "top-logit": (TopLogit(), Context(teacher_outputs=TEACHER)),
    "loss": (Loss(), Context(labels=LABELS)),
    "loss-mixed": (Loss(), Context(labels=MIXED)),
    "attention-pixel": (AttentionPixel("2"), Context(pixels=PIXELS)),
    "attention-pixel-power": (AttentionPixel("0", p=4.0, size=2), Context(pixels=PIXELS)),
    "attention-pixel-own": (AttentionPixel("0", size=2), Context()),
    "attention-maps": (AttentionMaps(("0", "2"), ((3, 2), (2, 2))), Context()),
    "attention-maps-power": (AttentionMaps(("2", "0"), ((1, 1), (5, 5)), p=4.0), Context()),
    "pooled-features": (PooledFeatures("2"), Context()),
    "pooled-features-windows": (PooledFeatures("0", size=2), Context()),
    "outputs-from": (OutputsFrom(1), Context()),
    "pca-features": (PCAFeatures("2", 2).fitted(network(), X), Context()),
    "pca-features-whitened": (PCAFeatures("4", 2, whiten=True).fitted(network(), X), Context()),
}
each = pytest.mark.parametrize("name", CASES)


def softened(y: list[float], temperature: float = 1.0) -> list[float]:
    """log softmax(y / τ)."""
    total = math.log(math.fsum(math.exp(value / temperature) for value in y))
    return [value / temperature - total for value in y]


def pooled(z: Tensor, size: int | tuple[int, int]) -> Tensor:
    """The mean over windows of (C, H, W), with edges of a window at ⌊iH/size⌋ and ⌈(i+1)H/size⌉."""
    height, width = z.shape[1:]
    down, across = size if isinstance(size, tuple) else (size, size)
    means = torch.zeros(len(z), down, across, dtype=z.dtype)
    for i in range(down):
        for j in range(across):
            rows = slice(i * height // down, math.ceil((i + 1) * height / down))
            columns = slice(j * width // across, math.ceil((j + 1) * width / across))
            means[:, i, j] = z[:, rows, columns].mean((1, 2))
    return means


def principal_components(readout: PCAFeatures, features: dict[str, Tensor]) -> list[list[float]]:
    """By eigenvectors of the covariance, each with the sign that the readout has chosen."""
    z = features[readout.layer]
    z = z.mean((2, 3)) if z.dim() == 4 else z
    values, vectors = torch.linalg.eigh(torch.cov(z.mT))
    values, vectors = values.flip(0)[: readout.k], vectors.flip(1)[:, : readout.k]
    vectors = vectors * (vectors * readout.components).sum(0).sign()
    scale = values.sqrt() if readout.whiten else values[:1].sqrt()
    return ((z - z.mean(0)) @ vectors / scale).tolist()


def by_definition(name: str, y: Tensor, features: dict[str, Tensor], sample: int) -> list[float]:
    """The values of one sample, by loops."""
    outputs = y[sample].tolist()
    mixture = MIXED[sample].tolist()
    label = int(LABELS[sample])
    if name.startswith("log-probabilities"):
        return softened(outputs, 3.0 if name.endswith("warm") else 1.0)
    if name.startswith("attention-maps"):
        readout = CASES[name][0]
        maps = [sum(channel.abs() ** readout.p for channel in features[layer][sample]) for layer in readout.layers]
        pairs = zip(maps, readout.sizes, strict=True)
        return [value for one, size in pairs for value in pooled(one[None], size).flatten().tolist()]
    if name.startswith("attention-pixel"):
        readout = CASES[name][0]
        z = features[readout.layer][sample]
        attention = sum(channel.abs() ** readout.p for channel in z)
        attention = pooled(attention[None], readout.size)[0] if readout.size else attention
        flat = attention.flatten().tolist()
        return [max(flat)] if name.endswith("own") else [flat[int(PIXELS[sample])]]
    if name.startswith("pca"):
        return principal_components(CASES[name][0], features)[sample]
    return {
        "logits": lambda: outputs,
        "outputs-from": lambda: outputs[1:],
        "label-logit": lambda: [outputs[label]],
        "label-logit-mixed": lambda: [math.fsum(p * value for p, value in zip(mixture, outputs, strict=True))],
        "top-logit": lambda: [outputs[[1, 0, 2][sample]]],
        "loss": lambda: [-softened(outputs)[label]],
        "loss-mixed": lambda: [-math.fsum(p * value for p, value in zip(mixture, softened(outputs), strict=True))],
        "pooled-features": lambda: features["2"][sample].mean((1, 2)).tolist(),
        "pooled-features-windows": lambda: pooled(features["0"][sample], 2).flatten().tolist(),
    }[name]()


@each
def test_values_are_those_of_the_definition(name):
    readout, context = CASES[name]
    module = network()
    with torch.no_grad():
        outputs, features = run(module, X, ("0", "2", "4"))
        values = readout(outputs, features, context)
    expected = [by_definition(name, outputs, features, sample) for sample in range(3)]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    assert values.shape == (3, expected.shape[1])
    assert isinstance(readout, Readout)


@each
def test_derivatives_are_those_of_the_definition(name):
    """vᵀJ and Jv in each engine, the values they come with, and the parameter gradient of a loss on each."""
    readout, context = CASES[name]
    module = network()

    def function(x: Tensor) -> Tensor:
        outputs, features = run(module, x, readout.layers)
        return readout(outputs, features, context)

    y = reference.values(function, X)
    v, u = torch.randn(2, *X.shape, dtype=torch.float64), torch.randn(2, *y.shape, dtype=torch.float64)
    weight = module[0].weight
    moves = [reference.sketch(weight, 1, torch.Generator().manual_seed(3))]

    def assert_right(result: Products, expected: Tensor, derivatives: Tensor, tolerance: float) -> None:
        assert result.products.shape == expected.shape
        assert (result.products.detach() - expected).norm() <= tolerance * expected.norm()
        torch.testing.assert_close(result.values.detach(), y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result.outputs, module(X), rtol=1e-12, atol=1e-12)
        (gradient,) = torch.autograd.grad(result.products.square().sum(), weight, retain_graph=True)
        assert (moves[0].flatten(1) @ gradient.flatten() - derivatives).norm() <= 1e-6 * derivatives.norm()

    def truth(products, directions: Tensor) -> tuple[Tensor, Tensor]:
        (derivatives,) = reference.parameter_derivatives(
            lambda: products(function, X, directions).square().sum()[None], [weight], moves
        )
        return products(function, X, directions), derivatives[:, 0]

    rows = vjp_products(module, X, u, readout=readout, context=context)
    assert_right(rows, *truth(reference.rows_by_backward, u), 1e-9)
    columns_and_derivatives = truth(reference.jvp, v)
    for engine, tolerance in (("forward", 1e-9), ("reverse", 1e-9), ("differences", 1e-8)):
        columns = jvp_products(module, X, v, readout=readout, context=context, engine=engine)
        assert_right(columns, *columns_and_derivatives, tolerance)
        left, right = (rows.products * v).sum(), (u * columns.products).sum()  # uᵀ(Jv) = (uᵀJ)v
        torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-9)


def test_the_top_class_is_the_teachers_and_never_the_students():
    student = torch.tensor([[9.0, 1.0, 2.0]])
    teacher = torch.tensor([[0.0, 1.0, 0.5]])
    assert float(TopLogit()(student, {}, Context(teacher_outputs=teacher))) == 1.0
    with pytest.raises(InputError, match="`TopLogit` needs `teacher_outputs`"):
        TopLogit()(student, {}, Context(labels=torch.tensor([0])))


def test_the_largest_pixel_is_that_of_the_pooled_map():
    readout = AttentionPixel("z", p=1.5, size=2)
    z = torch.randn(3, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    maps = [pooled((sample.abs() ** 1.5).sum(0)[None], 2).flatten().tolist() for sample in z]
    assert readout.largest({"z": z}).tolist() == [one.index(max(one)) for one in maps]
    torch.testing.assert_close(
        readout(torch.zeros(3, 1), {"z": z}, Context()), torch.tensor([[max(one)] for one in maps])
    )


def test_pooling_commutes_with_the_derivative():
    """The derivative of the pooled map's pixel is the mean of the derivatives of the pixels that it pools."""
    readout, whole = AttentionPixel("2", size=1), AttentionPixel("2")
    module, v = network(), torch.randn(1, *X.shape, dtype=torch.float64)
    first = Context(pixels=torch.zeros(3, dtype=torch.int64))
    pooled_derivative = jvp_products(module, X, v, readout=readout, context=first).products
    derivatives = [
        jvp_products(module, X, v, readout=whole, context=Context(pixels=torch.full((3,), pixel))).products
        for pixel in range(4)
    ]
    torch.testing.assert_close(pooled_derivative, torch.stack(derivatives).mean(0), rtol=1e-12, atol=1e-12)


def test_an_attention_map_at_zero_has_a_derivative():
    """Dead channels are the rule after ReLU."""
    module = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU()).double()
    with torch.no_grad():
        module[0].bias.fill_(-100)
    context = Context(pixels=torch.zeros(3, dtype=torch.int64))
    result = vjp_products(module, X, torch.ones(1, 3, 1, dtype=X.dtype), readout=AttentionPixel("1"), context=context)
    assert not result.products.any()
    (gradient,) = torch.autograd.grad(result.products.square().sum(), module[0].weight)
    assert not gradient.any()


def test_readout_and_extra_layers_together():
    result = vjp_products(
        network(), X, torch.ones(1, 3, 4, dtype=X.dtype), readout=PooledFeatures("2"), layers=("0", "2")
    )
    assert set(result.features) == {"0", "2"}
    torch.testing.assert_close(result.values, result.features["2"].mean((2, 3)), rtol=1e-12, atol=1e-12)


REFUSED = {
    "labels": (
        LabelLogit(),
        Context(),
        "`LabelLogit` needs `labels` in its context. Got None. Pass Context(labels=...).",
    ),
    "teacher": (
        TopLogit(),
        Context(),
        "`TopLogit` needs `teacher_outputs` in its context. Got None. Pass Context(teach",
    ),
    "loss": (Loss(), Context(), "`Loss` needs `labels` in its context. Got None."),
    "pixel": (
        AttentionPixel("5"),
        Context(),
        "Layer '5' must return features (batch, channel, height, width). Got shape",
    ),
    "pooled": (
        PooledFeatures("5"),
        Context(),
        "(batch, channel, height, width). Got shape (3, 3). Name a convolutional",
    ),
    "unknown": (PooledFeatures("7"), Context(), "The layer of a readout must be a known name. Got '7'."),
}


@pytest.mark.parametrize("name", REFUSED)
@every_way
def test_what_a_readout_lacks_is_named(name, way):
    readout, context, message = REFUSED[name]
    with pytest.raises(InputError, match=re.escape(message)):
        go(way, network(), X, readout=readout, context=context)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_must_be_positive(temperature):
    with pytest.raises(InputError, match=r"`temperature` of `LogProbabilities` must be positive\. Got"):
        LogProbabilities(temperature=temperature)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OutputsFrom(0), r"`first` of `OutputsFrom` must be an integer of at least 1\. Got 0"),
        (lambda: PCAFeatures("2", 0), r"`k` of `PCAFeatures` must be an integer of at least 1\. Got 0"),
        (lambda: PCAFeatures("2", 3).fitted(network(), X), r"below the number of inputs.*Got 3 of 3 inputs and 4 chan"),
        (lambda: PCAFeatures("7", 1).fitted(network(), X), r"The layer of a readout must be a known name\. Got '7'"),
        (lambda: run_readout(PCAFeatures("2", 1)), r"must have the statistics of its layer\. Got none"),
        (
            lambda: run_readout(replace(PCAFeatures("2", 1).fitted(network(), X), layer="0")),
            r"must have the statistics of its layer\. Got those of 4 channels for 3",
        ),
    ],
)
def test_a_readout_that_cannot_be(make, message):
    with pytest.raises(InputError, match=message):
        make()


def run_readout(readout: Readout) -> Tensor:
    return readout(*run(network(), X, readout.layers), Context())


def test_the_dictionary_names_every_readout():
    package = importlib.import_module("jacmatch.jacobian")  # `jacmatch.jacobian` is a function
    exported = {
        value
        for name in package.__all__
        if dataclasses.is_dataclass(value := getattr(package, name)) and "layers" in dir(value) and callable(value)
    }
    assert set(READOUTS.values()) == exported
    for name, readout in READOUTS.items():
        assert name == re.sub(r"(?<!^)(?=[A-Z][a-z])", "-", readout.__name__).lower()
