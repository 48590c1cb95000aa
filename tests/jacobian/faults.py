"""Planted faults: modules whose derivatives are wrong, cannot be had, or mean nothing."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def linear(inputs=5, outputs=4):
    return nn.Linear(inputs, outputs)


class Applied(nn.Module):
    """A function of linear layers and the input."""

    def __init__(self, function, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.function = function

    def forward(self, x):
        return self.function(x, *self.layers)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh() ** 2)


class WithoutForwardMode(torch.autograd.Function):
    """sin in the style that torch.func does not take."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.cos()


@torch.library.custom_op("jacmatch_tests::square", mutates_args=())
def square(x: Tensor) -> Tensor:
    """An operator with a backward, and no rule for forward mode."""
    return x**2


@torch.library.custom_op("jacmatch_tests::cut_square", mutates_args=())
def cut_square(x: Tensor) -> Tensor:
    """An operator whose backward cannot be differentiated, and does not say so."""
    return x**2


@torch.library.custom_op("jacmatch_tests::bare_square", mutates_args=())
def bare_square(x: Tensor) -> Tensor:
    """An operator without a backward."""
    return x**2


class WithoutTangent(torch.autograd.Function):
    """tanh with a right backward, and a forward-mode rule that says zero."""

    @staticmethod
    def forward(x):
        return x.tanh()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh() ** 2)

    @staticmethod
    def jvp(ctx, tangent):
        return torch.zeros_like(tangent)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


square.register_autograd(lambda ctx, g: 2 * ctx.saved_tensors[0] * g, setup_context=_keep)
cut_square.register_autograd(lambda ctx, g: 2 * ctx.saved_tensors[0].detach() * g.detach(), setup_context=_keep)


class Counts(nn.Module):
    """Its output depends on how often it was called."""

    def __init__(self, as_buffer):
        super().__init__()
        self.layer = linear()
        if as_buffer:
            self.register_buffer("calls", torch.zeros(()))
        else:
            self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) * (1 + self.calls)


def at_zeros():
    """A batch with a sample of zeros."""
    x = torch.randn(6, 5)
    x[0] = 0
    return x


def with_nan():
    x = torch.randn(6, 5)
    x[2, 1] = float("nan")
    return x


def plain():
    return torch.randn(6, 5)


@dataclass(frozen=True)
class Fault:
    """A module with a fault, and what the doctor should say.

    Attributes:
        build: Makes the module.
        code: Of the finding. It is a note, not a fault, where the library deals with the matter by itself.
        remedy: Words in its remedy.
        engine: The engine that is right all the same.
        batch: Makes the input.
    """

    build: Callable[[], nn.Module]
    code: str
    remedy: str
    engine: str = "none"
    batch: Callable[[], Tensor] = plain


def layered(function: Callable[..., Tensor], layers: int = 1) -> Callable[[], nn.Module]:
    """A function of the input and of linear layers: the first from 5 to 4, the others from 4 to 4."""
    return lambda: Applied(function, *(linear(4 if number else 5) for number in range(layers)))


def side_by_side(function: Callable[..., Tensor]) -> Callable[[], nn.Module]:
    """A function of the input and of two linear layers from 5 to 4."""
    return lambda: Applied(function, linear(), linear())


DETACHED = {
    "output": Fault(layered(lambda x, a: a(x).detach()), "detached", "Remove .detach()"),
    "input": Fault(layered(lambda x, a: a(x.detach())), "detached", "engine='differences'", "differences"),
    "inside": Fault(layered(lambda x, a, b: b(a(x).tanh().data), 2), "detached", ".data"),
    "through numpy": Fault(
        layered(lambda x, a: a(torch.from_numpy(x.detach().numpy()))), "detached", "numpy", "differences"
    ),
    "a factor": Fault(
        layered(lambda x, a: a(x) * (1 + x.detach().norm(dim=1, keepdim=True))),
        "partly-detached",
        "Remove what cuts the graph",
        "differences",
    ),
}

TAKEN_ONCE = {
    "once differentiable, inside": Fault(
        layered(lambda x, a, b: b(Once.apply(a(x))), 2), "once-differentiable", "without once_diff", "differences"
    ),
    "once differentiable, first": Fault(
        layered(lambda x, a: a(Once.apply(x))), "once-differentiable", "engine='differences'", "differences"
    ),
    "once differentiable, last": Fault(
        layered(lambda x, a: Once.apply(a(x))), "once-differentiable", "Write its backward", "differences"
    ),
    "custom_op with a cut backward": Fault(
        layered(lambda x, a, b: b(cut_square(a(x))), 2), "wrong-gradient", "custom backward", "differences"
    ),
}

WITHOUT_RULE = {
    "custom_op without jvp": Fault(
        layered(lambda x, a, b: b(square(a(x))), 2), "forward-unsupported", "in torch operations", "reverse"
    ),
    "custom_op without jvp, on one branch": Fault(
        side_by_side(lambda x, a, b: a(x) + square(b(x))), "forward-unsupported", "engine that is correct", "reverse"
    ),
    "a jvp of zero": Fault(
        layered(lambda x, a, b: b(WithoutTangent.apply(a(x))), 2), "forward-zero", "engine that is correct", "reverse"
    ),
    "a jvp of zero, on one branch": Fault(
        side_by_side(lambda x, a, b: a(x) + WithoutTangent.apply(b(x))),
        "forward-incomplete",
        "Remove what cuts the graph, or use an engine that is correct",
        "reverse",
    ),
    "custom_op without backward": Fault(
        layered(lambda x, a, b: b(bare_square(a(x))), 2), "reverse-unsupported", "torch operations"
    ),
}

IN_PLACE = {
    "on the input": Fault(layered(lambda x, a: a(x.mul_(2))), "in-place-input", "x.clone()", "reverse"),
    "first activation": Fault(
        lambda: nn.Sequential(nn.ReLU(inplace=True), linear()), "in-place-input", "x.clone()", "reverse"
    ),
}

COUPLED = {
    name: Fault(layered(function), "couples-samples", "use `jacobian`", "reverse")
    for name, function in {
        "by the mean": lambda x, a: a(x - x.mean(0, keepdim=True)),
        "by softmax": lambda x, a: a(x).softmax(0),
        "with those before": lambda x, a: a(x).cumsum(0),
        "with the last": lambda x, a: a(x) + x[-1:].sum(),
    }.items()
}

BY_CHANCE = {
    name: Fault(build, "non-deterministic", "Remove the random numbers or the state")
    for name, build in {
        "noise in both modes": layered(lambda x, a: a(x) + torch.randn(len(x), 4)),
        "dropout in evaluation": lambda: layered(lambda x, a: functional.dropout(a(x), 0.5))().eval(),
        "another generator": layered(lambda x, a: a(x) * random.random()),
        "counts its calls": lambda: Counts(as_buffer=False),
        "counts in a buffer": lambda: Counts(as_buffer=True),
        "counts in a buffer, evaluation": lambda: Counts(as_buffer=True).eval(),
    }.items()
}

ZERO = {
    "zero times": Fault(layered(lambda x, a: a(x) * 0), "zero-jacobian", "dead", "reverse"),
    "rounded": Fault(layered(lambda x, a: a(x).round()), "zero-jacobian", "rounding", "reverse"),
    "argmax": Fault(
        layered(lambda x, a: functional.one_hot(a(x).argmax(1), 4).to(x)), "zero-jacobian", "argmax", "differences"
    ),
    "dead": Fault(lambda: nn.Sequential(linear(), nn.Threshold(50, 0), linear(4)), "zero-jacobian", "dead", "reverse"),
    "saturated": Fault(
        lambda: nn.Sequential(linear(), nn.Softmax(1)), "zero-jacobian", "scale", "reverse", lambda: 1e4 * plain()
    ),
    "constant": Fault(layered(lambda x, a: a.bias.expand(len(x), 4)), "zero-jacobian", "Look for", "differences"),
}

NOT_A_NUMBER = {
    "outputs": Fault(layered(lambda x, a: a(x).log()), "not-finite", "Look for log"),
    "input": Fault(layered(lambda x, a: a(x)), "not-finite", "Clean the data", batch=with_nan),
    "derivative": Fault(
        layered(lambda x, a: a((x**4).sqrt())), "nan-derivative", "Look for sqrt", "differences", at_zeros
    ),
    "second derivative": Fault(
        lambda: Applied(lambda x, a: a(x).abs() ** 1.5, nn.Linear(5, 4, bias=False)),
        "nan-derivative",
        "powers",
        "differences",
        at_zeros,
    ),
}

FAULTS = {
    f"{kind}: {name}": fault
    for kind, faults in {
        "detached": DETACHED,
        "derivative taken once": TAKEN_ONCE,
        "no rule": WITHOUT_RULE,
        "in place": IN_PLACE,
        "coupled": COUPLED,
        "chance": BY_CHANCE,
        "zero": ZERO,
        "NaN": NOT_A_NUMBER,
    }.items()
    for name, fault in faults.items()
}
