"""What a pass with derivatives does to a module: its buffers once, its random numbers once, and a graph or none."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from jacmatch.errors import InputError
from jacmatch.jacobian import jacobian, jvp, jvp_products, unverified, vjp, vjp_products

from .architectures import ARCHITECTURES, EXACT, Applied, convolutional, made
from .faults import WithoutForwardMode
from .ways import WAYS, every_policy, every_way, go


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_same_buffers(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert one
    for name, buffer in one.items():
        torch.testing.assert_close(buffer, other[name], rtol=1e-12, atol=1e-12, msg=name)


STATISTICS = {
    "2d": lambda: convolutional(nn.BatchNorm2d(4), nn.Tanh()),
    "1d": lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(32), nn.Linear(32, 3)),
    "momentum": lambda: convolutional(nn.BatchNorm2d(4, momentum=0.3, affine=False), nn.Tanh()),
    "cumulative": lambda: convolutional(nn.BatchNorm2d(4, momentum=None), nn.Tanh()),
    "twice": lambda: convolutional(nn.BatchNorm2d(4), nn.Tanh(), nn.BatchNorm2d(4)),
    "instance": lambda: convolutional(nn.InstanceNorm2d(4, track_running_stats=True), nn.Tanh()),
}


@every_way
@every_policy
@pytest.mark.parametrize("name", STATISTICS)
def test_running_statistics_are_those_of_one_plain_pass(name, policy, way):
    module = STATISTICS[name]().double().train()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    for _ in range(2):  # from statistics that have already moved
        expected = copy.deepcopy(module)
        expected(x)
        go(way, module, x, batch_norm=policy)
        assert_same_buffers(buffers_of(module), buffers_of(expected))


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_the_full_jacobian_counts_as_one_pass(chunk_size):
    module, x = made("batchnorm-train")
    expected = copy.deepcopy(module)
    expected(x)
    jacobian(module, x, chunk_size=chunk_size)
    assert_same_buffers(buffers_of(module), buffers_of(expected))


@every_way
@every_policy
def test_a_layer_that_stands_in_evaluation_mode_is_not_written(policy, way):
    module = convolutional(nn.BatchNorm2d(4), nn.Tanh(), nn.BatchNorm2d(4)).double().train()
    module[1].eval()
    before, passes = buffers_of(module[1]), int(module[3].num_batches_tracked)
    go(way, module, torch.randn(3, 2, 4, 4, dtype=torch.float64), batch_norm=policy)
    assert_same_buffers(before, buffers_of(module[1]))
    assert module[3].num_batches_tracked == passes + 1
    assert not module[1].training
    assert module[3].training


@every_way
@every_policy
@pytest.mark.parametrize("name", ["batchnorm-eval", "instancenorm-tracked-eval"])
def test_buffers_are_unchanged_in_evaluation(name, policy, way):
    module, x = made(name)
    before = buffers_of(module)
    go(way, module, x, batch_norm=policy)
    jacobian(module, x)
    assert_same_buffers(before, buffers_of(module))


@every_policy
@pytest.mark.parametrize(
    ("function", "engine"),
    [(WithoutForwardMode.apply, "reverse"), (Tensor.detach, "differences")],
    ids=["forward", "both"],
)
@pytest.mark.parametrize("context", [nullcontext, unverified], ids=["verified", "unverified"])
def test_an_engine_that_fails_has_not_counted_as_a_pass(function, engine, policy, context):
    """`auto` tries forward first, which gets as far as the first BatchNorm layer, then reverse, which sees them all."""
    module = convolutional(nn.BatchNorm2d(4), Applied(function), nn.BatchNorm2d(4)).double().train()
    module[:2].requires_grad_(False)  # what is detached has no gradient that could be right
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    expected = copy.deepcopy(module)
    expected(x)
    with context():
        assert go("auto", module, x, batch_norm=policy).engine == engine
    assert_same_buffers(buffers_of(module), buffers_of(expected))


@pytest.mark.parametrize("engine", ["forward", "reverse", "differences"])
@pytest.mark.parametrize(("policy", "alone"), [("frozen", True), ("batch", False)])
def test_whether_samples_move_each_other(policy, alone, engine):
    """With frozen statistics a product belongs to its sample alone; the outputs are those of the batch either way."""
    module, x = made("batchnorm-train")
    v = torch.zeros(1, *x.shape, dtype=x.dtype)
    v[0, 0] = 1.0  # only the first sample moves
    result = jvp_products(module, x, v, batch_norm=policy, engine=engine)
    assert result.products[0, 0].any()
    assert bool((result.products[0, 1:] == 0).all()) == alone
    torch.testing.assert_close(result.outputs, module(x), rtol=1e-12, atol=1e-12)


DROPPING = [name for name, one in ARCHITECTURES.items() if "drop" in name or name.endswith("attention-train")]


@pytest.mark.parametrize("name", [*DROPPING, "attention-without-weights-train"])
@pytest.mark.ci
def test_one_dropout_mask_for_values_and_all_directions(name):
    """Each engine drops what a plain pass with the same seed drops, and P directions at once are P single ones."""
    module, x = made(name)
    torch.manual_seed(7)
    plain_outputs = module(x)
    after = torch.get_rng_state()
    assert not torch.equal(plain_outputs, module(x))
    for way in WAYS:
        torch.manual_seed(7)
        several = go(way, module, x, probes=3)
        assert torch.equal(torch.get_rng_state(), after), way  # one mask was drawn, not one for each direction
        torch.testing.assert_close(several.outputs, plain_outputs, rtol=1e-12, atol=1e-12)
        generator = torch.Generator().manual_seed(1)
        v = torch.randn((3, *(plain_outputs.shape if way == "vjp" else x.shape)), generator=generator, dtype=x.dtype)
        for number in range(3):
            torch.manual_seed(7)
            if way == "vjp":
                single = vjp_products(module, x, v[number : number + 1])
            else:
                single = jvp_products(module, x, v[number : number + 1], engine=way)
            torch.testing.assert_close(single.products[0], several.products[number], rtol=1e-9, atol=1e-9)


def test_the_rows_of_a_full_jacobian_have_one_dropout_mask():
    module, x = made("dropout")
    torch.manual_seed(7)
    outputs, rows = jacobian(module, x, chunk_size=2)
    for number in range(outputs.shape[1]):
        torch.manual_seed(7)
        v = torch.zeros_like(outputs)
        v[:, number] = 1.0
        torch.testing.assert_close(vjp(module, x, v)[1], rows[:, number], rtol=1e-12, atol=1e-12)


@every_way
@pytest.mark.parametrize("name", ["batchnorm-train", "encoder-layer", "lstm"])
def test_a_frozen_module_gives_results_without_a_graph(name, way):
    module, x = made(name)
    module.requires_grad_(False)
    result = go(way, module, x, layers=("0",) if name != "lstm" else ("layer",))
    for tensor in (result.outputs, result.values, result.products, *result.features.values()):
        assert not tensor.requires_grad
    assert not jacobian(module, x)[1].requires_grad


@every_way
def test_no_grad_gives_results_without_a_graph(way):
    module, x = made("encoder-layer")
    expected = go(way, module, x)
    with torch.no_grad():
        result = go(way, module, x, layers=("0",))
        assert not torch.is_grad_enabled()
    for tensor in (result.outputs, result.values, result.products, *result.features.values()):
        assert not tensor.requires_grad
    torch.testing.assert_close(result.products, expected.products.detach(), rtol=1e-12, atol=1e-12)
    assert expected.products.requires_grad
    assert expected.outputs.requires_grad


@every_way
def test_no_grad_with_an_input_that_requires_a_gradient(way):
    module, x = made("mlp-tanh")
    x.requires_grad_()
    with torch.no_grad():
        result = go(way, module, x)
    assert not result.products.requires_grad
    assert not result.outputs.requires_grad


@every_way
def test_outputs_can_be_trained_on_together_with_the_products(way):
    """The outputs belong to the same graph: one backward pass reaches every parameter, biases too."""
    module, x = made("mlp-tanh")
    result = go(way, module, x)
    (result.outputs.square().sum() + result.products.square().sum()).backward()
    both = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    module(x).square().sum().backward()
    values = [parameter.grad.clone() for parameter in module.parameters()]
    derivatives = torch.autograd.grad(
        go(way, module, x).products.square().sum(), module.parameters(), allow_unused=True
    )
    for total, value, derivative in zip(both, values, derivatives, strict=True):
        torch.testing.assert_close(total, value + (0 if derivative is None else derivative), rtol=1e-7, atol=1e-9)
    assert derivatives[-1] is None or not derivatives[-1].any()  # the last bias has no part in any derivative


@pytest.mark.parametrize("engine", EXACT)
def test_tied_and_shared_buffers(engine):
    """A layer used under two names keeps one state."""
    layer = nn.BatchNorm1d(4)
    module = nn.Sequential(layer, nn.Linear(4, 4), layer).double().train()
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = copy.deepcopy(module)
    outputs = expected(x)
    v = torch.randn_like(x)
    result = jvp(module, x, v, engine=engine)
    torch.testing.assert_close(result[0], outputs, rtol=1e-12, atol=1e-12)
    assert module[0].num_batches_tracked == 2
    assert_same_buffers(buffers_of(module), buffers_of(expected))


@every_way
@pytest.mark.usefixtures("as_users_run")
def test_an_unknown_policy_is_refused(way):
    module, x = made("batchnorm-train")
    with pytest.raises(InputError, match=r"`batch_norm` .*'freeze'"):
        go(way, module, x, batch_norm="freeze")
