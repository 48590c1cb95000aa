"""Graphs that are not kept but made again in the backward pass: rows in chunks, and checkpoints inside the network."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from jacmatch import jvp, unverified, vjp
from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import PooledFeatures, jvp_products, vjp_products


def network(*more):
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.GELU(), *more, nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(24, 4),
    )  # fmt: skip


def gradients(module, x, v, y=None, **settings):
    """Gradients, and buffers afterwards, of a loss of outputs and rows together."""
    result = vjp_products(module, x, v, **settings)
    loss = result.outputs.square().mean() + (result.products - 0.1).square().sum()
    roots = [*module.parameters(), *([] if y is None else [y])]
    return torch.autograd.grad(loss, roots), {name: buffer.clone() for name, buffer in module.named_buffers()}


@pytest.mark.parametrize("policy", ["frozen", "batch"])
@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_rows_in_chunks_have_the_same_gradients(policy, chunk_size):
    torch.manual_seed(0)
    module, x, v = network(nn.Dropout(0.3)).double(), torch.rand(5, 2, 6, 6).double(), torch.randn(5, 5, 4).double()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    results = []
    for settings in ({}, {"chunk_size": chunk_size}):
        module.load_state_dict(start)
        torch.manual_seed(1)
        results.append((*gradients(module, x, v, batch_norm=policy, **settings), torch.rand(3)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-13)
    assert results[0][1]["1.num_batches_tracked"] == 1


def test_chunks_with_an_input_that_was_computed():
    """The graph before the input is not that of the network: it is passed once, at the end."""
    module, v = network().double().eval(), torch.randn(3, 4, 4).double()
    start = torch.rand(4, 2, 6, 6).double().requires_grad_()
    results = []
    for settings in ({}, {"chunk_size": 1}):
        results.append(gradients(module, (2 * start).sin(), v, start, **settings)[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-13)


def test_chunks_of_a_plain_function():
    weight = torch.rand(3, 3).double().requires_grad_()
    x, v = torch.rand(4, 3).double(), torch.randn(2, 4, 3).double()
    results = []
    for chunk_size in (None, 1):
        result = vjp_products(lambda z: (z @ weight).tanh(), x, v, chunk_size=chunk_size)
        results.append(torch.autograd.grad(result.products.square().sum() + result.values.sum(), weight))
    torch.testing.assert_close(results[1], results[0])


class Alive(TorchDispatchMode):
    """The most bytes that were alive at one time, of what operations have returned."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata)
        self.most = max(self.most, self.now)
        return result

    def forget(self, key):
        self.now -= self.sizes.pop(key, 0)


def most_alive(step):
    with Alive() as alive:
        step()
    return alive.most


def test_eight_rows_in_chunks_of_one_need_the_memory_of_one():
    wide = nn.Sequential(nn.Conv2d(1, 48, 3, padding=1), nn.Tanh(), nn.Conv2d(48, 48, 3, padding=1), nn.Tanh(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4))  # fmt: skip
    x = torch.rand(24, 1, 8, 8)

    def needed(rows, chunk_size):
        v = torch.randn(rows, 24, 4)
        return most_alive(lambda: gradients(wide, x, v, chunk_size=chunk_size))

    one = needed(1, None)
    assert needed(8, 1) <= 1.1 * one  # the eight rows themselves stay
    assert needed(8, None) > 3 * one


def test_chunks_below_one_are_refused():
    with pytest.raises(InputError, match=r"`chunk_size` of `vjp_products` must be an integer of at least 1\."):
        vjp_products(network(), torch.rand(2, 2, 6, 6), torch.randn(1, 2, 4), chunk_size=0)


class Checkpointed(nn.Module):
    """A network whose first part is not kept."""

    def __init__(self, reentrant):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.GELU(), nn.Conv2d(6, 6, 3, padding=1), nn.Tanh())
        self.last = nn.Linear(6, 4)
        self.reentrant = reentrant

    def forward(self, x):
        features = self.first(x) if self.reentrant is None else checkpoint(self.first, x, use_reentrant=self.reentrant)
        return self.last(functional.adaptive_avg_pool2d(features, 1).flatten(1))


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_checkpoints_inside_the_network_change_no_gradient(chunk_size):
    module, x, v = Checkpointed(None).double(), torch.rand(4, 2, 6, 6).double(), torch.randn(2, 4, 4).double()
    plain, _ = gradients(module, x, v)
    module.reentrant = False
    torch.testing.assert_close(gradients(module, x, v, chunk_size=chunk_size)[0], plain, rtol=1e-11, atol=1e-13)


def test_reentrant_checkpoints_are_refused():
    with pytest.raises(UnsupportedError, match=r"set use_reentrant=False"):
        gradients(Checkpointed(True), torch.rand(4, 2, 6, 6), torch.randn(1, 4, 4))


class Attention(nn.Module):
    """Attention by the fused operator of PyTorch."""

    def forward(self, x):
        tokens = x.view(len(x), 1, 2, 3)
        return functional.scaled_dot_product_attention(tokens, tokens, tokens).flatten(1)


class CheckpointedMiddle(nn.Module):
    """A perceptron whose middle may be computed again."""

    def __init__(self, layer, checkpointed):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.middle = nn.Sequential(nn.Linear(6, 6), layer, nn.Tanh())
        self.checkpointed = checkpointed

    def forward(self, x):
        h = self.first(x)
        return self.last(checkpoint(self.middle, h, use_reentrant=False) if self.checkpointed else self.middle(h))


@pytest.mark.parametrize("way", ["rows", "reverse", "auto", "differences"])
@pytest.mark.parametrize("layer", [nn.LayerNorm(6), Attention(), nn.Hardswish(), nn.BatchNorm1d(6), nn.ReLU()])
def test_what_is_computed_again_is_computed_as_it_was(layer, way):
    """The user's backward pass comes after the pass with derivatives, whose operators it needs all the same."""
    torch.manual_seed(0)
    x, v, u = torch.randn(5, 4).double(), torch.randn(5, 4).double(), torch.randn(5, 3).double()
    module = CheckpointedMiddle(layer, False).double()
    results = []
    for module.checkpointed in (False, True):
        products = vjp(module, x, u)[1] if way == "rows" else jvp(module, x, v, engine=way)[1]
        results.append((products, torch.autograd.grad(products.square().sum(), module.first.weight)[0]))
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-8)  # `auto` may take another engine


@pytest.mark.parametrize("way", ["rows", "reverse"])
def test_what_is_computed_again_does_not_count_as_another_pass_in_training(way):
    x = torch.randn(5, 4).double()
    module = CheckpointedMiddle(nn.BatchNorm1d(6), True).double()
    products = vjp(module, x, torch.ones(5, 3).double())[1] if way == "rows" else jvp(module, x, x, engine=way)[1]
    products.square().sum().backward()
    assert module.middle[1].num_batches_tracked == 1


def test_checkpoints_that_are_turned_on_later():
    """Forward mode was right before; the pass that it then refuses counts once all the same."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.BatchNorm1d(4), CheckpointedMiddle(nn.Tanh(), False)).double()
    x = torch.randn(5, 4).double()
    assert jvp_products(module, x, x[None]).engine == "forward"
    module[1].checkpointed = True
    assert jvp_products(module, x, x[None]).engine == "reverse"
    assert module[0].num_batches_tracked == 2


def test_forward_mode_refuses_what_is_computed_again():
    x = torch.randn(5, 4)
    with pytest.raises(UnsupportedError, match=r"Engine 'forward'.*checkpoint.*'reverse'"):
        jvp(CheckpointedMiddle(nn.ReLU(), True), x, x, engine="forward")


def test_a_user_s_own_contexts_of_a_checkpoint_are_entered():
    entered = []

    class Noted:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            entered.append(self.name)

        def __exit__(self, *_):
            return None

    layer, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.randn(2, 3)

    def module(z):
        return checkpoint(layer, z, use_reentrant=False, context_fn=lambda: (Noted("forward"), Noted("again")))

    with unverified():  # the check of an engine before its first use has passes of its own
        vjp(module, x, x)[1].square().sum().backward()
    assert entered[0] == "forward"
    assert set(entered[1:]) == {"again"}


def test_chunks_behind_an_inner_layer_keep_the_gradients_of_the_layers_after_it():
    """The readout's values do not depend on the last layer, and the outputs do."""
    module, x, v = network().double().eval(), torch.rand(3, 2, 6, 6).double(), torch.randn(4, 3, 6).double()
    results = []
    for settings in ({}, {"chunk_size": 1}):
        result = vjp_products(module, x, v, readout=PooledFeatures("2"), **settings)
        loss = result.outputs.square().mean() + result.products.square().sum()
        results.append(torch.autograd.grad(loss, [*module.parameters()], allow_unused=True))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-13)
