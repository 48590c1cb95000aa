"""Operators whose derivative is missing or wrong in PyTorch, as compositions of operators whose derivatives are right.

The compositions are registered with ATen's dispatcher, under the key at which autograd records an operator, for as long
as a pass with derivatives lasts. They therefore apply however an operator is called: as
`torch.nn.functional.layer_norm`, `torch.native_layer_norm`, `torch.ops.aten.native_layer_norm`, in a TorchScript
interpreter or in an exported graph. The operators that Python code calls most often are replaced earlier, by the faster
rules of `op_replacements`.
"""

import cmath
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jacmatch.jacobian.rules.base import shared
from jacmatch.jacobian.rules.batch_norm import Statistics, moments, move_running_statistics, scale_and_shift

Kernel = Callable[..., Any]


class Policy(threading.local):
    """The batch statistics that are constants for the input, in this thread; None if there are none."""

    frozen: Statistics | None = None


_policy = Policy()


def native_layer_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.native_layer_norm`: (x − μ) r, μ and r = 1/√(σ² + ε) over the last axes, then scaled and shifted."""
    dims = list(range(x.dim() - len(normalized_shape), x.dim()))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(dims, keepdim=True)
    centered = wide - mean
    rstd = (centered.square().mean(dims, keepdim=True) + eps).rsqrt()
    y = centered * rstd
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype), mean, rstd


def native_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.native_batch_norm`, with batch statistics that follow the policy of the pass."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    shape = (1, -1) + (1,) * (x.dim() - 2)
    if training or running_mean is None or running_var is None:
        var, mean = moments(wide) if _policy.frozen is None else _policy.frozen.of(wide, in_kernel=True)
        if running_mean is not None and running_var is not None:
            move_running_statistics(running_mean, running_var, mean, var, x.numel() // x.shape[1], momentum)
    else:
        # clones, since the buffers may be written before the backward pass
        var, mean = running_var.clone(), running_mean.clone()
    rstd = (var + eps).rsqrt()
    scale, shift = scale_and_shift(rstd, mean, weight, bias)
    y = wide * scale.view(shape) + shift.view(shape)
    return y.to(x.dtype), mean if training else x.new_empty(0), rstd if training else x.new_empty(0)


def instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    _: bool = True,
    *,
    by: Callable[..., Tensor] | None = None,
) -> Tensor:
    """`torch.instance_norm`: each channel of each sample by its own statistics, which no policy holds constant.

    `by` is a layer normalization to use instead of the composition.
    """
    if not use_input_stats:
        return native_batch_norm(x, weight, bias, running_mean, running_var, False, momentum, eps)[0]
    if running_mean is not None and running_var is not None:
        var, mean = (each.mean(0) for each in torch.var_mean(x.flatten(2), 2, unbiased=False))
        move_running_statistics(running_mean, running_var, mean, var, x[0, 0].numel(), momentum)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    normalized = (x, x.shape[2:], None, None, eps)
    y = native_layer_norm(*normalized)[0] if by is None else by(*normalized)
    if weight is not None:
        y = y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def cholesky_inverse(factor: Tensor, upper: bool = False) -> Tensor:
    """`torch.cholesky_inverse`, (L Lᵀ)⁻¹ or (UᵀU)⁻¹, by a triangular solve."""
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=upper)
    return inverse @ inverse.mH if upper else inverse.mH @ inverse


def cholesky_solve(right: Tensor, factor: Tensor, upper: bool = False) -> Tensor:
    """`torch.cholesky_solve`, by two triangular solves."""
    lower = factor.mH if upper else factor
    half = torch.linalg.solve_triangular(lower, right, upper=False)
    whole: Tensor = torch.linalg.solve_triangular(lower.mH, half, upper=True)
    return whole


def logcumsumexp(x: Tensor, dim: int) -> Tensor:
    """`torch.logcumsumexp`, by logarithmically many sums of two."""
    return _scan(x, dim, log_sum)


def cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.cumprod`, by logarithmically many products of two, so that nothing is divided by a factor of zero."""
    return _scan(x if dtype is None else x.to(dtype), dim, torch.mul)


def _scan(x: Tensor, dim: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """All prefixes of an associative operation along an axis."""
    if x.dim() == 0:
        return x.clone()
    size, step = x.shape[dim], 1
    while step < size:
        moved = combine(x.narrow(dim, step, size - step), x.narrow(dim, 0, size - step))
        x = torch.cat([x.narrow(dim, 0, step), moved], dim)
        step *= 2
    return x.clone() if step == 1 else x


def log_sum(a: Tensor, b: Tensor) -> Tensor:
    """Return log(eᵃ + eᵇ) with finite derivatives of every order, also where the two are far apart or −∞."""
    if a.is_complex() or b.is_complex():
        largest = torch.maximum(a.real, b.real).detach()
        return largest + ((a - largest).exp() + (b - largest).exp()).log()
    empty = b == -math.inf
    known = torch.where(empty, torch.zeros_like(b), b)
    return torch.where(empty, a, known - torch.nn.functional.logsigmoid(known - a))


def hardsigmoid(x: Tensor) -> Tensor:
    """`torch.nn.functional.hardsigmoid`, min(max(x + 3, 0), 6) / 6."""
    return torch.nn.functional.hardtanh(x + 3.0, 0.0, 6.0) / 6.0


def hardswish(x: Tensor) -> Tensor:
    """`torch.nn.functional.hardswish`, x · hardsigmoid(x)."""
    return x * hardsigmoid(x)


def mish(x: Tensor) -> Tensor:
    """`torch.nn.functional.mish`, whose second derivative is NaN in PyTorch for large x."""
    return x * torch.nn.functional.softplus(x).tanh()


def sinc(x: Tensor) -> Tensor:
    """`torch.sinc`, sin(u) / u of u = πx, by its series where |u| < 1."""
    u = math.pi * x
    near = u.abs() < 1
    square, series = torch.where(near, u, 0.0).square(), torch.ones_like(u)
    for k in range(8, 0, -1):
        series = 1 - square * series / (2 * k * (2 * k + 1))
    far = torch.where(near, 1.0, u)
    return torch.where(near, series, far.sin() / far)


def glu(x: Tensor, dim: int = -1) -> Tensor:
    """`torch.nn.functional.glu`, a · sigmoid(b) of two halves."""
    first, second = torch.chunk(x, 2, dim)
    return first * second.sigmoid()


def cdist_forward(x1: Tensor, x2: Tensor, p: float, compute_mode: int | None) -> Tensor:
    """`torch.cdist`: distances of all pairs of rows by the p-norm; at distance 0 its derivatives are 0."""
    return _norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def euclidean_dist(x1: Tensor, x2: Tensor) -> Tensor:
    """`torch.cdist` for many rows, by a product of matrices."""
    square = x1.square().sum(-1, keepdim=True) + x2.square().sum(-1).unsqueeze(-2) - 2 * x1 @ x2.mT
    return _root(square.clamp_min(0))


def pdist_forward(x: Tensor, p: float = 2.0) -> Tensor:
    """`torch.nn.functional.pdist`: distances of all pairs of rows i < j."""
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return _norm(x[i] - x[j], p)


def _norm(difference: Tensor, p: float) -> Tensor:
    size = difference.abs()
    if p == 0:
        return (difference != 0).to(difference.dtype).sum(-1)
    if math.isinf(p):
        return size.amax(-1)
    if p == 2:
        return _root(difference.square().sum(-1))
    zero = size == 0
    powers = torch.where(zero, 0.0, torch.where(zero, 1.0, size).pow(p)).sum(-1)
    return torch.where(powers == 0, 0.0, torch.where(powers == 0, 1.0, powers).pow(1 / p))


def _root(square: Tensor) -> Tensor:
    return torch.where(square == 0, 0.0, torch.where(square == 0, 1.0, square).sqrt())


def linalg_det(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.linalg.det`, the product of the diagonal of U in P A = L U.

    For a singular A, derivatives are those of the mean of det(A + t I) over complex t on a circle.
    """
    diagonal, parity, factors, pivots, info = _factors(a)
    value = diagonal.prod(-1) * parity
    with suppress(RuntimeError):  # vmap reads no value
        if bool(info.any()):
            n = a.shape[-1] + 1
            radius = (1.1 * torch.linalg.matrix_norm(a.detach(), keepdim=True) + 1e-3) * torch.eye(n - 1).to(a)
            several = [linalg_det(a + cmath.exp(2j * math.pi * k / n) * radius)[0] for k in range(n)]
            mean = torch.stack(several).mean(0)
            mean = mean if a.is_complex() else mean.real
            value = value.detach() + mean - mean.detach()
    return value, factors, pivots


def linalg_slogdet(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`torch.linalg.slogdet`: sign and logarithm of the absolute value of the determinant."""
    diagonal, parity, factors, pivots, _ = _factors(a)
    return torch.sgn(diagonal).prod(-1) * parity, diagonal.abs().log().sum(-1), factors, pivots


def _factors(a: Tensor) -> tuple[Tensor, ...]:
    """The diagonal of U in P A = L U, the sign of P, and LU."""
    factors, pivots, info = torch.linalg.lu_factor_ex(a)
    rows = torch.arange(1, pivots.shape[-1] + 1, device=pivots.device)
    parity = 1 - 2 * ((pivots != rows).sum(-1) % 2)
    return factors.diagonal(dim1=-2, dim2=-1), parity.to(a.dtype), factors, pivots, info


def linalg_solve_ex(
    a: Tensor, b: Tensor, *, left: bool = True, check_errors: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`torch.linalg.solve_ex`, by the factors of P A = L U."""
    factors, pivots, info = torch.linalg.lu_factor_ex(a)
    if check_errors:
        torch._linalg_check_errors(info, "torch.linalg.solve_ex", is_matrix=a.dim() == 2)
    vector = b.dim() == 1 or (b.dim() == a.dim() - 1 and b.shape == a.shape[:-1])
    solution = torch.linalg.lu_solve(factors, pivots, b.unsqueeze(-1) if vector else b, left=left)
    return solution.squeeze(-1) if vector else solution, factors, pivots, info


def householder_product(vectors: Tensor, tau: Tensor) -> Tensor:
    """`torch.linalg.householder_product`: the first columns of Π (I − τᵢ vᵢ vᵢᴴ), vᵢ below a 1 on the diagonal."""
    rows, columns = vectors.shape[-2:]
    unit = torch.eye(rows, columns, dtype=vectors.dtype, device=vectors.device)
    reflectors = vectors.tril(-1) + unit
    product = unit.expand_as(vectors)
    for i in reversed(range(tau.shape[-1])):
        v = reflectors[..., i : i + 1]
        product = product - tau[..., i, None, None] * v @ (v.mH @ product)
    return product


def _in_place(composition: Kernel) -> Kernel:
    return lambda x, *rest: x.copy_(composition(x.clone(), *rest))  # its derivative needs the previous x


def _no_stats(x: Tensor, weight: Any, bias: Any, training: bool, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return native_batch_norm(x, weight, bias, None, None, training, *rest)


def _functional(x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    mean, var = mean.clone(), var.clone()
    return (*native_batch_norm(x, weight, bias, mean, var, *rest), mean, var)


def _with_update(x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _cudnn(x, weight, bias, mean, var, True, *rest)


def _cudnn(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any) -> tuple[Tensor, ...]:
    return (*native_batch_norm(x, weight, bias, mean, var, *rest), x.new_empty(0, dtype=torch.uint8))


FIRST_ORDER: dict[str, Kernel] = {each.__name__: each for each in (cholesky_inverse, cholesky_solve)}
"""Operators whose first derivative is already wrong."""

KERNELS: dict[str, Kernel] = {
    **FIRST_ORDER,
    **{each.__name__: each for each in (native_layer_norm, native_batch_norm, instance_norm, logcumsumexp, cumprod)},
    **{each.__name__: each for each in (hardsigmoid, hardswish, mish, glu)},
    **{f"{each.__name__}_": _in_place(each) for each in (hardsigmoid, hardswish, mish)},
    **{f"_{each.__name__}": each for each in (cdist_forward, euclidean_dist, pdist_forward)},
    **{f"_{each.__name__}": each for each in (linalg_det, linalg_slogdet, linalg_solve_ex)},
    "_native_batch_norm_legit": native_batch_norm,
    "_native_batch_norm_legit.no_stats": _no_stats,
    "_native_batch_norm_legit_functional": _functional,
    "_batch_norm_with_update": _with_update,
    "cudnn_batch_norm": _cudnn,
    "linalg_householder_product": householder_product,
}
"""All operators whose derivatives, up to the third, are missing or wrong (torch 2.13)."""


def _kernel(name: str, composition: Kernel) -> Kernel:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        # No derivative is recorded, as in the forward pass of one of our rules. PyTorch's own kernel is faster.
        if not torch.is_grad_enabled() and not torch._C._is_fwd_grad_enabled():
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*args, **kwargs)
        return composition(*args, **kwargs)

    return kernel


_WRAPPED = {name: _kernel(name, composition) for name, composition in KERNELS.items()}


@contextmanager
def right_derivatives(frozen: Statistics | None, *, first_order: bool = False) -> Iterator[None]:
    """Within the context the operators of `KERNELS`, or of `FIRST_ORDER` alone, are compositions, in all threads."""
    before, _policy.frozen = _policy.frozen, frozen
    keys = ["AutogradCPU", "AutogradCUDA"][: 1 + torch.cuda.is_initialized()]  # type: ignore[no-untyped-call]
    groups = [(key, first) for key in keys for first in ((True,) if first_order else (True, False))]
    try:
        with ExitStack() as stack:
            for group in groups:
                stack.enter_context(shared(("kernels", *group), partial(_registered, *group)))
            yield
    finally:
        _policy.frozen = before


@contextmanager
def _registered(key: str, first: bool) -> Iterator[None]:
    """Context in which the kernels of `FIRST_ORDER`, or all others, are registered under a dispatch key."""
    library = torch._C._dispatch_library("IMPL", "aten", "")
    for name, kernel in _WRAPPED.items():
        if (name in FIRST_ORDER) == first:
            library.impl(name, key, kernel, False)  # type: ignore[call-arg]
    try:
        yield
    finally:
        library.reset()
