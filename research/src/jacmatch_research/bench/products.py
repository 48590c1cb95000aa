"""`jacmatch bench products`: the exact Jacobian, one Jv and the norm penalty against straightforward code."""

from collections.abc import Callable
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn

from jacmatch.jacobian import BatchNormPolicy, jacobian, jvp_products
from jacmatch.models import build
from jacmatch.objectives import jacobian_norm_penalty
from jacmatch_research.bench import rivals
from jacmatch_research.bench.claims import Benchmark, Case, Claim, Conditions, Measured, Spread, compare
from jacmatch_research.bench.step import CPU_STEP

FULL = Claim("full Jacobian, 100 outputs ÷ loop of backward passes", must=0.7, aim=0.4)
FUNC = Claim("full Jacobian, 100 outputs ÷ `vmap(jacrev(...))` of torch.func", must=0.8)
TORCHJD = Claim("full Jacobian, 100 outputs ÷ `torchjd.autojac.jac`", must=0.8)
JV = Claim("Jv with backward ÷ plain pass over a doubled batch", must=1.2, aim=1.05)
JV_SMALL = Claim(f"{JV.text}, small batch", must=1.4, aim=1.2)
SEVERAL = Claim(
    "seconds per direction of P directions of Jv at once, with backward ÷ seconds of one direction", must=0.9
)
ONE = Claim("one direction of Jv ÷ one direction: what the measurement cannot tell apart")
PENALTY = Claim("Jacobian-norm penalty ÷ straightforward `autograd.grad` (Hoffman et al.)", must=1.0, aim=0.9)

OUTPUTS = 100
SHAPES = {"mlp": (784,), "resnet20": (3, 32, 32), "vgg4": (3, 32, 32)}
FULL_CASES = ((1, "values", False), (2, "values", False), (8, "values", False), (2, "training", True))
PASSES = {
    "VGG-4, 28×28, training": ("vgg4", (1, 28, 28), 64, True),
    "VGG-4, 28×28, evaluation": ("vgg4", (1, 28, 28), 64, False),
    "ResNet-20, 32×32, training": ("resnet20", (3, 32, 32), 64, True),
    "ResNet-20, 32×32, evaluation": ("resnet20", (3, 32, 32), 64, False),
    "ViT-Tiny, 32×32, batch 16": ("vit-tiny", (3, 32, 32), 16, True),
}
AT_ONCE = {
    "VGG-4, 28×28, batch 16": ("vgg4", (1, 28, 28), 16),
    "ResNet-20, 32×32, batch 16": ("resnet20", (3, 32, 32), 16),
    "ViT-Tiny, 32×32, batch 4": ("vit-tiny", (3, 32, 32), 4),
}
PENALISED = {"VGG-4, 28×28": ("vgg4", (1, 28, 28), 64), "ResNet-20, 32×32": ("resnet20", (3, 32, 32), 32)}


def _network(conditions: Conditions, name: str, batch: int) -> tuple[nn.Module, Tensor]:
    """A network with many outputs and constant parameters, and a batch for it; quick, a small perceptron."""
    shape = SHAPES[name]
    name, outputs = ("mlp", 10) if conditions.quick else (name, OUTPUTS)
    network = build(name, outputs, shape).eval().to(conditions.device).requires_grad_(False)
    return network, torch.rand(batch, *shape, device=conditions.device)


def full_jacobian(conditions: Conditions, name: str, batch: int, training: bool) -> Measured:
    """Time of the library's Jacobian ÷ time of a loop, alone or with the gradient of the parameters, as in training."""
    network, x = _network(conditions, name, batch)
    network.requires_grad_(training)

    def ours() -> None:
        network.zero_grad()
        _, product = jacobian(network, x)
        if training:
            rivals.add_gradient(product.square().sum())

    def theirs() -> None:
        network.zero_grad()
        product = rivals.loop_jacobian(network, x, create_graph=training)
        if training:
            rivals.add_gradient(product.square().sum())

    times = compare(conditions, ours, theirs, 9)
    return Measured(times.spread, details={"batch": batch, "baseline_seconds": times.baseline_seconds})


def beside_peer(conditions: Conditions, name: str, batch: int, peer: Callable[[nn.Module, Tensor], Tensor]) -> Measured:
    """Time of the library's Jacobian ÷ time of another library's; the two results are compared first."""
    network, x = _network(conditions, name, batch)
    torch.testing.assert_close(jacobian(network, x)[1], peer(network, x), rtol=1e-3, atol=1e-5)
    times = compare(conditions, lambda: jacobian(network, x), lambda: peer(network, x), 15)
    return Measured(times.spread, details={"batch": batch, "baseline_seconds": times.baseline_seconds})


def jv_pass(conditions: Conditions, name: str, shape: tuple[int, ...], batch: int, training: bool) -> Measured:
    """Time of a pass with one Jv and its backward pass ÷ a plain pass over a doubled batch and its backward pass."""
    name, batch = ("cnn3", 2) if conditions.quick else (name, batch)
    network = build(name, 10, shape).train(training).to(conditions.device)
    x = torch.rand(batch, *shape, device=conditions.device)
    doubled = torch.cat([x, x + 0.1])

    def plain() -> None:
        network.zero_grad()
        rivals.add_gradient(network(doubled).square().sum())

    times = compare(conditions, _dual_pass(network, x, 1), plain, 15)
    return Measured(times.spread, 1.0, {"batch": batch, "baseline_seconds": times.baseline_seconds})


def _dual_pass(network: nn.Module, x: Tensor, directions: int) -> Callable[[], None]:
    """Forward and backward pass with this number of products Jv by the forward engine."""
    v = torch.randn(directions, *x.shape, device=x.device)

    def run() -> None:
        network.zero_grad()
        result = jvp_products(network, x, v, engine="forward")
        rivals.add_gradient(result.outputs.square().sum() + result.products.square().sum())

    return run


def directions(conditions: Conditions, name: str, shape: tuple[int, ...], batch: int, count: int) -> Measured:
    """Passes in training mode. The lower limit counts the values as one more direction: (P + 1) ÷ 2P."""
    name, batch = ("cnn3", 2) if conditions.quick else (name, batch)
    network = build(name, 10, shape).train().to(conditions.device)
    x = torch.rand(batch, *shape, device=conditions.device)
    times = compare(conditions, _dual_pass(network, x, count), _dual_pass(network, x, 1), 15)
    median, low, high = (
        float(f"{each / count:.4g}") for each in (times.spread.median, times.spread.low, times.spread.high)
    )
    details = {"batch": batch, "directions": count, "baseline_seconds": times.baseline_seconds}
    return Measured(Spread(median, low, high, times.spread.n), (count + 1) / (2 * count), details)


def penalty(
    conditions: Conditions, name: str, shape: tuple[int, ...], batch: int, batch_norm: BatchNormPolicy
) -> Measured:
    """A step of cross-entropy with the penalty along one random direction, by the library ÷ by a loop of PyTorch.

    In the loop, the row is differentiated through the statistics of the batch, as with the policy `batch`. The default,
    `frozen`, needs fewer operations.
    """
    name, batch = ("cnn3", 2) if conditions.quick else (name, batch)
    x = torch.rand(batch, *shape, device=conditions.device)
    y = torch.randint(0, 10, (batch,), device=conditions.device)

    def step(function: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]) -> Callable[[], None]:
        network = build(name, 10, shape).to(conditions.device)

        def loss() -> Tensor:
            outputs, value = function(network, x)
            return torch.nn.functional.cross_entropy(outputs, y) + 0.01 * value

        return rivals.stepper(network, loss)

    times = compare(
        conditions, step(partial(jacobian_norm_penalty, batch_norm=batch_norm)), step(rivals.norm_penalty), 15
    )
    return Measured(times.spread, details={"batch": batch, "baseline_seconds": times.baseline_seconds})


PRODUCTS = Benchmark(
    "exact Jacobians, one Jv, and the norm penalty, against straightforward code",
    (
        *(
            Case(FULL, f"{name}, batch {batch}, {mode}", partial(full_jacobian, name=name, batch=batch, training=train))
            for name in SHAPES
            for batch, mode, train in FULL_CASES
        ),
        *(
            Case(claim, f"{name}, batch {batch}", partial(beside_peer, name=name, batch=batch, peer=peer))
            for claim, peer in ((FUNC, rivals.torch_func_jacobian), (TORCHJD, rivals.torchjd_jacobian))
            for name in SHAPES
            for batch in (2, 8)
        ),
        *(
            Case(JV, name, partial(jv_pass, name=model, shape=shape, batch=batch, training=training))
            for name, (model, shape, batch, training) in PASSES.items()
        ),
        *(
            Case(
                PENALTY,
                f"{name}, batch {batch}, BatchNorm {policy}",
                partial(penalty, name=model, shape=shape, batch=batch, batch_norm=policy),
            )
            for name, (model, shape, batch) in PENALISED.items()
            for policy in get_args(BatchNormPolicy)
        ),
    ),
)

ATTENTION = Benchmark(
    "one Jv of a vision transformer with its backward pass",
    tuple(
        Case(
            claim,
            f"ViT-Tiny, 32×32, batch {batch}",
            partial(jv_pass, name="vit-tiny", shape=(3, 32, 32), batch=batch, training=True),
        )
        for claim, batch in ((JV, 16), (JV_SMALL, 4))
    ),
)

DIRECTIONS = Benchmark(
    "several directions of Jv in one dual pass",
    tuple(
        Case(
            ONE if count == 1 else SEVERAL,
            f"{name}, P = {count}",
            partial(directions, name=model, shape=shape, batch=batch, count=count),
        )
        for count in (1, 2, 4, 8)
        for name, (model, shape, batch) in AT_ONCE.items()
    ),
)

DUAL = Benchmark(
    "one Jv in a dual pass with its backward pass, and steps with derivatives, in CPU time",
    (
        *(case for case in PRODUCTS.cases if case.claim is JV),
        *CPU_STEP,
    ),
)
