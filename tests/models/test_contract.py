"""What every row of the catalogue must do, on gray and on RGB images and, for the perceptron, on vectors."""

import copy
import functools
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from jacmatch.errors import InputError
from jacmatch.models import CATALOG, build, load_weights, save_weights

SMALLEST = {"vgg9": 17}
"""Sides of the images; 8 pixels where not listed."""
MEAN = {1: (0.3,), 3: (0.5, 0.4, 0.3)}
STD = {1: (0.35,), 3: (0.2, 0.25, 0.3)}


def fresh(name, channels=3, *, seed=0):
    torch.manual_seed(seed)
    side = SMALLEST.get(name, 8)
    return build(name, 4, (channels, side, side), MEAN[channels], STD[channels])


drawn_once = functools.cache(fresh)


def make(name, channels=3):
    """A copy, which takes less time than to draw the weights of a large model again."""
    return copy.deepcopy(drawn_once(name, channels))


def images(model, count=3, *, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *model.shape, generator=generator)


def evaluated(model):
    """The model in eval mode with running statistics of a batch; at 0 and 1 the scale grows from block to block."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for module in norms:
        module.momentum = 1.0
    with torch.no_grad():
        model.train()(images(model, 16, seed=4).to(model.mean.dtype))
    for module in norms:
        module.momentum = 0.1
    return model.eval()


each_model = pytest.mark.parametrize("name", CATALOG)
DEEP = {"vgg9", "resnet32", "resnet56", "resnet110", "resnet32x4", "wrn-40-1", "wrn-40-2"}
"""More of the layers that the smaller ones of the same family have."""
each_kind_of_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in DEEP else []) for name in CATALOG]
)


def test_the_builders_have_one_signature():
    for name, builder in CATALOG.items():
        parameters = list(inspect.signature(builder).parameters.values())
        assert [each.name for each in parameters[:4]] == ["outputs", "shape", "mean", "std"], name
        assert all(each.default is None for each in parameters[2:4]), name
        assert all(each.kind is each.KEYWORD_ONLY for each in parameters[4:]), name


@each_model
@pytest.mark.parametrize("channels", [1, 3])
def test_outputs_are_finite_and_differ_between_samples(name, channels):
    model = make(name, channels).eval()
    x = images(model)
    with torch.no_grad():
        outputs = model(x)
    assert outputs.shape == (3, 4)
    assert outputs.isfinite().all()
    assert (outputs[0] - outputs[1]).abs().max() > 1e-6


@each_model
def test_one_step_lowers_the_loss_and_reaches_every_parameter(name):
    model = make(name)
    x, labels = images(model, 6), torch.tensor([0, 1, 2, 3, 0, 1])
    before = F.cross_entropy(model(x), labels)
    before.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    with torch.no_grad():
        squared = sum(parameter.grad.square().sum() for parameter in model.parameters())
        for parameter in model.parameters():
            parameter -= 1e-3 / squared * parameter.grad  # the loss falls by 1e-3 to first order
    after = F.cross_entropy(model(x), labels)
    assert 0 < before - after < 2e-3


@each_model
@pytest.mark.parametrize("channels", [1, 3])
def test_normalization_is_inside(name, channels):
    model = make(name, channels).eval()
    bare = build(name, 4, model.shape).eval()
    bare.load_state_dict({**model.state_dict(), "mean": bare.mean, "std": bare.std})
    mean = torch.tensor(MEAN[channels]).reshape(1, channels, 1, 1)
    std = torch.tensor(STD[channels]).reshape(1, channels, 1, 1)
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), bare((x - mean) / std))
        assert (model(x) - bare(x)).abs().max() > 1e-4


@each_model
def test_weights_are_a_function_of_the_seed(name):
    first, same, other = (fresh(name, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], same[key]) for key in first)
    matrices = [key for key in first if first[key].ndim >= 2 and key not in {"mean", "std"}]
    assert all(not torch.equal(first[key], other[key]) for key in matrices)


@each_model
def test_in_eval_a_sample_is_on_its_own_and_buffers_stay(name):
    model = evaluated(make(name).double())
    x = images(model).double()
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    with torch.no_grad():
        outputs = model(x)
        torch.testing.assert_close(model(x.flip(0)).flip(0), outputs, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model(x[:1]), outputs[:1], rtol=1e-9, atol=1e-9)
    assert all(torch.equal(buffers[key], value) for key, value in model.named_buffers())


@each_model
def test_in_train_only_the_running_statistics_move(name):
    model = make(name).train()
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    model(images(model))
    moved = {key for key, value in model.named_buffers() if not torch.equal(buffers[key], value)}
    assert moved == set(buffers) - {"mean", "std"}


@each_kind_of_model
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.ci
def test_gradient_of_a_jacobian_norm_is_right(name, training):
    """Double backward against a central difference along one direction of all parameters, in float64."""
    model = evaluated(make(name).double()).train(training)
    x = images(model).double().requires_grad_()
    cotangent = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def penalty():
        (row,) = torch.autograd.grad(model(x), x, cotangent, create_graph=True)
        return row.square().sum()

    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1 for p in parameters]
    step = 1e-8  # few ReLUs change sign on such a short way; float64 leaves eight digits
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(penalty(), parameters, allow_unused=True)
        values = []
        for sign in (1, -2):
            with torch.no_grad():
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter += sign * step * direction
            values.append(penalty().item())
    derivative = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True) if g is not None)
    assert derivative == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


# PyTorch's own first use of forward mode compiles its decompositions with the deprecated torch.jit.script.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@each_kind_of_model
def test_forward_and_reverse_mode_are_adjoint(name):
    model = evaluated(make(name).double())
    x = images(model).double().requires_grad_()
    generator = torch.Generator().manual_seed(2)
    tangent = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    cotangent = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        _, jv = torch.func.jvp(model, (x.detach(),), (tangent,))
        (vj,) = torch.autograd.grad(model(x), x, cotangent)
    assert (jv * cotangent).sum().item() == pytest.approx((vj * tangent).sum().item(), rel=1e-10)


@each_model
def test_weights_survive_the_file(name, tmp_path):
    model = make(name)
    model(images(model))  # so that running statistics are not those of a new model
    save_weights(model, tmp_path / "w.safetensors")
    other = build(name, 4, model.shape)
    load_weights(other, tmp_path / "w.safetensors")
    state = other.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    x = images(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), other.eval()(x))


@each_model
@pytest.mark.parametrize("wrong", [(1, 0), (0, 2)], ids=["gray for RGB", "wider"])
def test_a_sample_of_another_shape_is_refused(name, wrong):
    model = make(name)
    channels, side, _ = model.shape
    x = torch.zeros(2, 1 if wrong[0] else channels, side, side + wrong[1])
    with pytest.raises(InputError, match=rf"shape it was built for, \(3, {side}, {side}\). Got \("):
        model(x)


@each_model
@pytest.mark.parametrize("outputs", [0, -3])
def test_outputs_below_one_are_refused(name, outputs):
    with pytest.raises(InputError, match=rf"`outputs` of `.+` must be at least 1. Got {outputs}"):
        CATALOG[name](outputs, (3, 32, 32))


@each_model
@pytest.mark.parametrize("shape", [(), (3, 0, 32), (3, -1, 32)])
def test_empty_shapes_are_refused(name, shape):
    with pytest.raises(InputError, match=r"`shape` of `.+` must have at least one axis, each of at least 1. Got"):
        CATALOG[name](2, shape)


@pytest.mark.parametrize("name", [name for name in CATALOG if name != "mlp"])
def test_vectors_are_refused_by_image_models(name):
    with pytest.raises(InputError, match=r"must be \(channels, height, width\). Got \(16,\). For vectors use `mlp`"):
        CATALOG[name](2, (16,))


@each_model
@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.1, 0.2), (1.0,), "`mean` of `.+` must have one number, or one for each of the 3 channels.*Got 2 numbers"),
        ((0.1,), (1.0, 1.0, 0.0), "`std` of `.+` must be finite and above 0. Got .*never varies give 1"),
        ((0.1,), (-1.0,), "`std` of `.+` must be finite and above 0"),
        ((float("nan"),), (1.0,), "`mean` of `.+` must be finite. Got"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(name, mean, std, message):
    with pytest.raises(InputError, match=message):
        CATALOG[name](2, (3, 32, 32), mean, std)
