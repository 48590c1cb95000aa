"""What a network returned, features of its layers, and text as a function of its embeddings."""

import re
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import from_embeddings, jvp, jvp_products, output_tensor, run, vjp, vjp_products

from . import reference
from .architectures import Applied, made

Y, OTHER = torch.ones(2, 3), torch.zeros(2, 5)
Named = namedtuple("Named", ["scores", "hidden"])


@dataclass
class Output:
    """As the libraries for language models have it."""

    logits: Tensor
    loss: Tensor | None = None


OUTPUTS = {
    "tensor": Y,
    "tuple": (Y,),
    "list": [Y],
    "tuple-with-none": (Y, None),
    "none-first": (None, Y),
    "only-one-attribute": SimpleNamespace(scores=Y, loss=None),
    "logits": {"hidden": OTHER, "logits": Y},
    "out": {"aux": OTHER, "out": Y},
    "logits-before-out": {"out": OTHER, "logits": Y},
    "only-one": {"scores": Y},
    "only-one-tensor": {"scores": Y, "loss": None},
    "object": Output(Y),
    "object-with-out": SimpleNamespace(aux=OTHER, out=Y),
}
UNCLEAR = {
    "none": (None, "Got a NoneType without a tensor"),
    "number": (1.0, "Got a float without a tensor"),
    "empty": ((), "Got a tuple without a tensor"),
    "tuple": ((Y, OTHER), f"Got a tuple of 2 tensors, [0] {tuple(Y.shape)}, [1] {tuple(OTHER.shape)}. Select one: "),
    "named-tuple": (Named(Y, OTHER), "Got a Named of 2 tensors, [0] "),
    "inner": ((Y, (OTHER, None)), "Got a tuple of 2 tensors, [0] "),
    "two-keys": ({"b": Y, "a": OTHER}, "Got a dictionary of 2 tensors, ['b'] "),
    "no-tensor": ({"loss": None}, "Got a dictionary without a tensor"),
    "object": (SimpleNamespace(scores=Y, hidden=OTHER), "Got a SimpleNamespace of 2 tensors, .scores "),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_outputs_are_selected(name):
    assert output_tensor(OUTPUTS[name]) is Y


@pytest.mark.parametrize("name", UNCLEAR)
def test_unclear_outputs_are_refused(name):
    output, got = UNCLEAR[name]
    with pytest.raises(InputError, match=re.escape(got)):
        output_tensor(output)


@pytest.mark.parametrize("engine", ["forward", "reverse", "differences", "auto"])
def test_unclear_outputs_are_refused_by_every_engine(engine):
    x = torch.ones(2, 3)
    with pytest.raises(InputError, match="must return one tensor, or a dictionary or object with `logits`"):
        jvp(lambda x: {"loss": None, "scores": 1}, x, x, engine=engine)
    with pytest.raises(
        InputError,
        match=r"output=lambda out: out\['a'\]; for doctor .* lambda x: module\(x\)\['a'\]",
    ):
        vjp(lambda x: {"a": x, "b": x}, x, x)


def network() -> nn.Sequential:
    """A convolution whose result is overwritten by what follows it."""
    module = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Sequential(nn.Conv2d(3, 4, 2)), nn.Flatten(), nn.Linear(4, 3)
    )
    return module.double()


IMAGES = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_features_are_those_of_the_layers():
    module = network()
    outputs, features = run(module, IMAGES, ("0", "2.0", "2"))
    first = module[0](IMAGES)
    second = module[2](first.relu())
    assert torch.equal(features["0"], first)  # before the activation overwrote it
    assert torch.equal(features["2.0"], second)
    assert torch.equal(features["2"], second)
    assert torch.equal(outputs, module[4](second.flatten(1)))
    assert list(features) == ["0", "2.0", "2"]


def test_without_layers_there_are_no_features():
    outputs, features = run(network(), IMAGES)
    assert features == {}
    assert outputs.shape == (3, 3)


@pytest.mark.parametrize("way", ["vjp", "forward", "reverse", "differences"])
@pytest.mark.parametrize("probes", [1, 2])
def test_features_come_with_the_products_and_can_be_trained_on(way, probes):
    module = network()
    plain = run(module, IMAGES, ("0", "2"))[1]
    if way == "vjp":
        cotangents = torch.ones(probes, 3, 3, dtype=torch.float64)
        result = vjp_products(module, IMAGES, cotangents, layers=("0", "2"))
    else:
        result = jvp_products(module, IMAGES, IMAGES.expand(probes, *IMAGES.shape), layers=("0", "2"), engine=way)
    assert set(result.features) == {"0", "2"}
    for name, feature in result.features.items():
        torch.testing.assert_close(feature, plain[name], rtol=1e-12, atol=1e-12)
        mine = torch.autograd.grad(feature.square().sum(), module[0].weight, retain_graph=True)[0]
        right = torch.autograd.grad(plain[name].square().sum(), module[0].weight, retain_graph=True)[0]
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9)


def test_features_of_a_module_in_training_with_its_buffers():
    """The forward engine runs the module on copies of its buffers: the features are there all the same."""
    module, x = made("batchnorm-train")
    expected = module[1](module[0](x)).detach()
    module, x = made("batchnorm-train")
    result = jvp_products(module, x, torch.randn(2, *x.shape, dtype=x.dtype), engine="forward", layers=("1",))
    torch.testing.assert_close(result.features["1"].detach(), expected, rtol=1e-12, atol=1e-12)


def test_an_unknown_layer_is_refused():
    with pytest.raises(InputError, match=r"The layer of a readout must be a known name\. Got '2\.1'\. Nearest: 2\.0"):
        run(network(), IMAGES, ("2.1",))
    module = network()
    for engine in ("forward", "reverse", "differences", "auto"):
        with pytest.raises(InputError, match=r"Got 'convolution'"):
            jvp_products(module, IMAGES, IMAGES[None], layers=("convolution",), engine=engine)
    assert not any(layer._forward_hooks for layer in module.modules())


def test_a_layer_that_never_ran_is_refused():
    module = network()
    module.register_module("spare", nn.Linear(2, 2))
    module.forward = lambda x: x.flatten(1)
    with pytest.raises(InputError, match=r"must run once in a forward pass\. Got never ran: \['spare'\]"):
        run(module, IMAGES, ("spare",))


def test_layers_of_a_plain_function_are_refused():
    with pytest.raises(
        UnsupportedError, match=r"Features of layers \['0'\] can be computed only for an nn\.Module; got func"
    ):
        run(lambda x: x, IMAGES, ("0",))
    with pytest.raises(UnsupportedError, match=r"only for an nn\.Module; got function"):
        vjp_products(lambda x: x, IMAGES, IMAGES[None], layers=("0",))


class Tagger(nn.Module):
    """Tokens in, logits out; positions are added to the embeddings of the words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(7, 3), nn.Embedding(4, 3)
        self.head = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))

    def forward(self, tokens: Tensor) -> dict:
        return {"logits": self.head(self.words(tokens) + self.positions(torch.arange(tokens.shape[1])))}


TOKENS = torch.tensor([[1, 5, 2], [0, 6, 6]])


def test_text_as_a_function_of_its_embeddings():
    module = Tagger().double()
    embeddings, function = from_embeddings(module, "words", TOKENS)
    assert torch.equal(embeddings, module.words(TOKENS))
    assert not embeddings.requires_grad
    assert torch.equal(function(embeddings)["logits"], module(TOKENS)["logits"])
    moved = embeddings + 0.1
    positions = module.positions(torch.arange(3))
    assert torch.equal(function(moved)["logits"], module.head(moved + positions))
    full = reference.batch_jacobian(function, embeddings)
    v, u = torch.randn(2, *embeddings.shape, dtype=torch.float64), torch.randn(2, 2, 2, dtype=torch.float64)
    for engine in ("forward", "reverse"):
        products = jvp(function, embeddings, v, engine=engine)[1].detach()
        assert (products - reference.forward_product(full, v)).norm() <= 1e-9 * products.norm()
    rows = vjp_products(function, embeddings, u).products.detach()
    assert (rows - reference.reverse_product(full, u)).norm() <= 1e-9 * rows.norm()


def test_the_word_embeddings_take_no_part_in_that_function():
    module = Tagger().double()
    embeddings, function = from_embeddings(module, "words", TOKENS)
    loss = vjp(function, embeddings, torch.ones(2, 2).double())[1].square().sum()
    words, head = torch.autograd.grad(loss, [module.words.weight, module.head[0].weight], allow_unused=True)
    assert words is None
    assert head.any()


def test_the_function_leaves_no_hook():
    module = Tagger().double()
    embeddings, function = from_embeddings(module, "words", TOKENS)
    function(embeddings)
    module.head = Applied(lambda x: x.nonsense())
    with pytest.raises(AttributeError):
        function(embeddings)
    assert not any(layer._forward_hooks for layer in module.modules())


def test_an_unknown_embedding_is_refused():
    with pytest.raises(
        InputError, match=r"`layer` of `from_embeddings` must be a known name\. Got 'word'\. Nearest: words"
    ):
        from_embeddings(Tagger(), "word", TOKENS)
