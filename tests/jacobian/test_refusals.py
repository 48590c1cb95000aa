"""What cannot be done is refused, by an error that says what can; nothing is silently zero."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import jacobian, jvp, jvp_products, vjp, vjp_products
from jacmatch.jacobian.verification import unverified

from . import reference
from .faults import WithoutForwardMode

X = torch.linspace(-1, 1, 6).double().view(2, 3)
V = torch.linspace(1, 2, 6).double().view(2, 3)


def linear() -> nn.Linear:
    return nn.Linear(3, 3).double()


def image() -> nn.Conv2d:
    return nn.Conv2d(1, 2, 2).double()


BAD = {
    "integers-jvp": (
        lambda: jvp(linear(), X.long(), V),
        r"`x` of `jvp` must be of a floating-point type\. Got torch.int",
    ),
    "integers-vjp": (lambda: vjp(linear(), X.long(), V), r"`x` of `vjp` must be .* \(`from_embeddings`\)"),
    "integers-jacobian": (
        lambda: jacobian(linear(), X.byte()),
        r"floating-point type\. Got torch.uint8\. Scale images",
    ),
    "tangents-shape": (lambda: jvp(linear(), X, V[:, :2]), r"`tangents` must have the shape .*2, 3\)\), with at least"),
    "no-tangents": (lambda: jvp(linear(), X, V[None][:0]), r"at least one probe. Got shape \(0, 2, 3\)"),
    "no-cotangents": (lambda: vjp(linear(), X, V[None][:0]), r"at least one probe. Got shape \(0, 2, 3\)"),
    "no-outputs": (
        lambda: jacobian(lambda x: linear()(x)[:, :0], X),
        r"\(batch, out\), at least one. Got shape \(2, 0\)",
    ),
    "tangents-of-one": (lambda: jvp(linear(), X, V[0]), r"`tangents` must have the shape .* Got shape \(3,\)"),
    "tangents-batch": (
        lambda: jvp_products(linear(), X, V),
        r"`tangents` .* Got shape \(2, 3\)\. One direction for each sample",
    ),
    "cotangents-shape": (
        lambda: vjp(linear(), X, V[:, :2]),
        r"`cotangents` must have the shape .* Got shape \(1, 2, 2\)",
    ),
    "cotangents-deep": (lambda: vjp(linear(), X, V[None, None]), r"`cotangents` .* Got shape \(1, 1, 2, 3\)"),
    "cotangents-made": (lambda: vjp_products(linear(), X, lambda y: y), r"`cotangents` .* Got shape \(2, 3\)"),
    "engine-unknown": (lambda: jvp(linear(), X, V, engine="foward"), r"`engine` must be .* Got 'foward'"),
    "chunk-zero": (lambda: jacobian(linear(), X, chunk_size=0), r"`chunk_size` of `jacobian` .* at least 1\. Got 0"),
    "chunk-negative": (lambda: jacobian(linear(), X, chunk_size=-2), r"`chunk_size` of `jacobian` .* Got -2"),
    "step-forward": (
        lambda: jvp_products(linear(), X, V[None], engine="forward", step=0.1),
        r"`step` of `jvp_products` is for the engine 'differences'\. Got engine='forward'",
    ),
    "step-reverse": (
        lambda: jvp_products(linear(), X, V[None], engine="reverse", step=0.1),
        r"`step` of `jvp_products` is for the engine 'differences'\. Got engine='reverse'",
    ),
    "step-zero": (lambda: jvp_products(linear(), X, V[None], step=0.0), r"`step` of a difference must be .* Got 0\.0"),
    "step-endless": (
        lambda: jvp_products(linear(), X, V[None], step=float("inf")),
        r"must be a positive number\. Got inf",
    ),
    "jacobian-of-an-image": (lambda: jacobian(image(), torch.ones(2, 1, 3, 3).double()), r"`jacobian`"),
    "jacobian-of-numbers": (lambda: jacobian(lambda x: x.sum(1), X), r"`jacobian`"),
}


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    call, message = BAD[name]
    with pytest.raises(InputError, match=message):
        call()


def test_inference_mode():
    module = linear()
    with torch.inference_mode():
        made_there = torch.ones(2, 3, dtype=torch.float64)
        for call in (
            lambda: jvp(module, X, V),
            lambda: vjp(module, X, V),
            lambda: jacobian(module, X),
        ):
            with pytest.raises(InputError, match=r"must not run under torch\.inference_mode.*Use torch\.no_grad\(\)"):
                call()
    with pytest.raises(InputError, match=r"inference_mode"):
        vjp(module, made_there, V)


def test_a_forward_mode_tangent_is_not_dropped():
    """Results would have no tangent, without an error; torch.func.jvp differentiates them."""
    module = torch.nn.Sequential(linear(), torch.nn.Tanh())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, V)
        for call in (jacobian, lambda net, x: vjp(net, x, V), lambda net, x: jvp(net, x, V)):
            with pytest.raises(InputError, match=r"no tangent of torch\.autograd\.forward_ad.*Use torch\.func\.jvp"):
                call(module, dual)
        jacobian(module, X)  # a level is that of all threads: another one may differentiate in forward mode
    _, change = torch.func.jvp(lambda x: jacobian(module, x)[1], (X,), (V,))
    step = 1e-6
    numeric = (jacobian(module, X + step * V)[1] - jacobian(module, X - step * V)[1]) / (2 * step)
    torch.testing.assert_close(change, numeric, rtol=1e-6, atol=1e-8)


class WithoutJvp(torch.autograd.Function):
    """sin in the newer style, without `jvp`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.cos()


class WithJvp(WithoutJvp):
    """sin with everything."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return tangent * x.cos()


class OnceOnly(torch.autograd.Function):
    """sin whose derivative has none."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.cos()


@torch.library.custom_op("jacmatch_tests::sine", mutates_args=())
def sine(x: Tensor) -> Tensor:
    """sin as an operator of its own, with a backward pass and without a forward-mode rule."""
    return torch.from_numpy(x.numpy(force=True).copy()).sin()


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


sine.register_autograd(lambda ctx, gradient: gradient * ctx.saved_tensors[0].cos(), setup_context=_keep)


class Between(nn.Module):
    """A function between two linear layers, alone or beside an identity."""

    def __init__(self, function, beside: bool = False) -> None:
        super().__init__()
        self.first, self.function, self.last, self.beside = linear(), function, linear(), beside

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(self.function(hidden) + (hidden if self.beside else 0))


def assert_right(module: nn.Module, engine: str, used: str, tolerance: float = 1e-8) -> None:
    result = jvp_products(module, X, V[None], engine=engine)
    expected = reference.jvp(module, X, V[None])
    assert result.engine == used
    assert (result.products.detach() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(
    ("function", "reason"), [(WithoutForwardMode, "setup_context"), (WithoutJvp, "must implement the jvp function")]
)
@pytest.mark.parametrize("probes", [1, 2])
def test_a_function_without_a_forward_mode_derivative(function, reason, probes):
    module = Between(function.apply)
    with pytest.raises(UnsupportedError, match=rf"Engine 'forward' cannot.*{reason}.*Use engine='reverse'"):
        jvp_products(module, X, V.expand(probes, -1, -1), engine="forward")
    assert_right(module, "reverse", "reverse")
    assert_right(module, "auto", "reverse")
    assert_right(module, "differences", "differences")


def test_a_function_with_a_forward_mode_derivative():
    for engine in ("forward", "reverse", "differences"):
        assert_right(Between(WithJvp.apply), engine, engine)
    assert_right(Between(WithJvp.apply), "auto", "forward")


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
def test_a_custom_operator_without_a_forward_mode_rule(beside):
    """torch.func gives it a tangent of zeros, without a word."""
    module = Between(sine, beside)
    assert_right(module, "reverse", "reverse")
    assert_right(module, "differences", "differences")
    assert_right(module, "auto", "reverse")
    with pytest.raises(UnsupportedError, match=r"'forward'.*'reverse'"):
        jvp_products(module, X, V[None], engine="forward")


def test_a_function_that_is_differentiable_once():
    """vᵀJ is right, and PyTorch refuses to differentiate it: so do we, before anybody has built a loss on it."""
    module = Between(OnceOnly.apply)
    with torch.no_grad():
        row = vjp(module, X, V)[1]
    expected = reference.rows_by_backward(module, X, V[None])[0]
    torch.testing.assert_close(row, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(UnsupportedError, match=r"taken only once.*engine='differences'.*torch.no_grad\(\)"):
        vjp(module, X, V)
    with unverified():
        row = vjp(module, X, V)[1]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        row.square().sum().backward()
    with pytest.raises(UnsupportedError, match="engine='differences'"):
        jvp_products(module, X, V[None], engine="reverse")
    assert_right(module, "auto", "differences")


def test_an_operation_that_neither_exact_engine_can_do():
    each = torch.ones(3, dtype=torch.long)
    module = Between(lambda hidden: torch.segment_reduce(hidden.square().mT.contiguous(), "sum", lengths=each).mT)
    with pytest.raises(UnsupportedError, match=r"Engine 'forward' cannot.*segment_reduce.*'reverse' or 'differences'"):
        jvp_products(module, X, V[None], engine="forward")
    with pytest.raises(UnsupportedError, match=r"Engine 'reverse' cannot.*segment_reduce_backward.*'differences'"):
        jvp_products(module, X, V[None], engine="reverse")
    assert_right(module, "auto", "differences")
    with torch.no_grad():
        row = vjp(module, X, V)[1]
    torch.testing.assert_close(row, reference.rows_by_backward(module, X, V[None])[0], rtol=1e-12, atol=1e-12)


DETACHED = {
    "input": Between(lambda hidden: hidden.detach().sin()),
    "output": lambda x: x.sin().detach(),
    "numpy": lambda x: torch.from_numpy(x.numpy(force=True).copy()).sin(),
}


@pytest.mark.parametrize("name", DETACHED)
def test_values_that_are_cut_off_from_the_input(name):
    module = DETACHED[name]
    for call in (
        lambda: vjp(module, X, V),
        lambda: jacobian(module, X),
        lambda: jvp(module, X, V, engine="reverse"),
    ):
        with pytest.raises(UnsupportedError, match=r"do not depend on `x` .*engine='differences'"):
            call()
    with pytest.raises(UnsupportedError, match=r"differences"):
        jvp(module, X, V, engine="forward")
    with torch.no_grad():  # by differences of the values; their parameter gradient is cut off as well
        assert_right(module, "differences", "differences")
        assert_right(module, "auto", "differences")


def test_a_true_zero_is_not_refused():
    """Dead units have a derivative, and it is zero."""
    module = Between(lambda hidden: (hidden - 100).relu())
    for engine in ("auto", "forward", "reverse", "differences"):
        assert not jvp(module, X, V, engine=engine)[1].any()
    assert not vjp(module, X, V)[1].any()
    assert not jacobian(module, X)[1].any()


def test_replicas_in_threads_are_refused():
    module = nn.DataParallel(linear())
    module.device_ids = [0, 1]
    with pytest.raises(UnsupportedError, match=r"DataParallel.*DistributedDataParallel around the objective"):
        vjp(module, X, V)


def test_an_operation_without_any_rule_in_forward_mode_is_refused():
    """torch.cond raises a KeyError there."""
    rule = r"Engine 'forward' cannot differentiate this module.*'reverse'"
    with unverified(), pytest.raises(UnsupportedError, match=rule):
        jvp(lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), X, V, engine="forward")


@pytest.mark.parametrize("product", [jvp, vjp, lambda net, x, _: jacobian(net, x)])
def test_lazy_modules_are_refused_until_they_have_parameters(product):
    net, x = torch.nn.LazyLinear(3), torch.ones(2, 3)
    with pytest.raises(InputError, match="Call it once with a batch"):
        product(net, x, x)
    net(x)
    product(net, x, x)
