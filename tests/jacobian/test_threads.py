"""Passes in several threads at once, and with another default device: each is right, and leaves all switches alone."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo
from torch import nn

from jacmatch import Distillation, UnsupportedError, jvp, vjp
from jacmatch.jacobian.modules import twice_differentiable
from jacmatch.jacobian.rules.base import is_toward_input, toward_input


def switches():
    """What a pass sets for the whole process."""
    return (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cudnn.enabled,
        torch._C._get_mkldnn_enabled(),
        str(torch._dynamo.eval_frame._stance.stance),
    )


def test_passes_that_overlap_leave_the_switches_as_they_were():
    module, before = nn.LSTM(2, 2), switches()
    first, second = (twice_differentiable(module) for _ in range(2))
    with ThreadPoolExecutor(1) as other:
        first.__enter__()
        other.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        during = switches()
        other.submit(second.__exit__, None, None, None).result()
    assert before == switches()
    assert during != before


def test_a_backward_pass_by_the_input_is_one_of_its_thread():
    with ThreadPoolExecutor(1) as other, toward_input():
        assert is_toward_input()
        assert not other.submit(lambda: is_toward_input()).result()
    assert not is_toward_input()


class Meeting(nn.Module):
    """A network in whose forward pass two threads wait for each other, if they can."""

    def __init__(self, barrier):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv1d(1, 2, 2), nn.LayerNorm(3), nn.GELU(), nn.Flatten(), nn.Linear(6, 3))
        self.barrier = barrier

    def forward(self, x):
        try:
            self.barrier.wait(0.02)
        except threading.BrokenBarrierError:
            self.barrier.reset()
        return self.layers(x[:, None])


@pytest.mark.ci
@pytest.mark.parametrize("way", ["forward", "reverse", "rows"])
def test_threads_at_once_get_the_products_of_one(way):
    barrier = threading.Barrier(2)
    x = torch.randn(5, 4, dtype=torch.float64)

    def product(module):
        return vjp(module, x, x[:, :3])[1] if way == "rows" else jvp(module, x, x, engine=way)[1]

    def results(module):
        products = product(module)
        return [products, *torch.autograd.grad(products.square().sum(), list(module.parameters())[:4])]

    modules = [Meeting(barrier).double() for _ in range(2)]
    expected = results(Meeting(threading.Barrier(1)).double())
    with ThreadPoolExecutor(2) as threads:
        for result in threads.map(results, modules):
            for each, right in zip(result, expected, strict=True):
                torch.testing.assert_close(each, right)


class Truncated(torch.autograd.Function):
    """A function whose forward-mode rule is wrong."""

    @staticmethod
    def forward(x):
        return x.exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]

    @staticmethod
    def jvp(ctx, tangent):
        return tangent


def test_a_thread_waits_for_the_verdict_of_another():
    """While one checks an engine, the other must not use it."""
    started, module = threading.Event(), nn.Linear(3, 3).double()
    x = torch.randn(4, 3, dtype=torch.float64)

    def call(z):
        started.set()
        return Truncated.apply(module(z))

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(lambda: jvp(call, x, x, engine="forward"))
        started.wait()
        second = threads.submit(lambda: jvp(call, x, x, engine="forward"))
        for each in (first, second):
            with pytest.raises(UnsupportedError, match="Jv by engine 'forward' of this module is wrong"):
                each.result()


def test_another_default_device_switches_no_check_off():
    """On it, random numbers of a generator on the CPU cannot be drawn."""
    module, x = nn.Linear(3, 3).double(), torch.randn(4, 3, dtype=torch.float64)
    torch.set_default_device("meta")
    try:
        with pytest.raises(UnsupportedError, match="Jv by engine 'forward' of this module is wrong"):
            jvp(lambda z: Truncated.apply(module(z)), x, x, engine="forward")
        terms = Distillation(module, copy.deepcopy(module), labels=0, jacobians=1.0)(x)
    finally:
        torch.set_default_device(None)
    assert terms["loss"] == 0
