"""Derivatives from their definition: slow loops of finite differences in float64, without a graph.

The fourth-order stencil has an error of h⁴f⁽⁵⁾/30 + ε|f|/h, about 10⁻¹³ of the size of f for h = 10⁻³, on functions
that have no kink within 2h. What needs first derivatives in an inner loop takes plain backward passes on the module as
PyTorch has it, which `test_products` holds equal to the differences.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

STEP = 1e-3


def derivative(function: Callable[[float], Tensor]) -> Tensor:
    """The derivative at 0 of a function of one number."""
    near = (function(STEP) - function(-STEP)) / (2 * STEP)
    far = (function(2 * STEP) - function(-2 * STEP)) / (4 * STEP)
    change = float((near - far).norm())
    assert change <= 1e-2 * float(near.norm()) + 1e-6, "a kink lies within the step: choose other inputs"
    return (4 * near - far) / 3


@contextmanager
def isolated(module, seed: int = 0):
    """Within the context a call of the module is a pure function: seeded, and its buffers are put back."""
    buffers = list(module.buffers()) if isinstance(module, nn.Module) else []
    before = [buffer.clone() for buffer in buffers]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed queues a call for CUDA, with a trace of the stack
        try:
            yield
        finally:
            for buffer, old in zip(buffers, before, strict=True):
                buffer.data.copy_(old)


def tensor_of(output) -> Tensor:
    """The logits of a dictionary."""
    return output["logits"] if isinstance(output, dict) else output


def values(module, x: Tensor, seed: int = 0) -> Tensor:
    """What the plain module returns, without a graph."""
    with isolated(module, seed), torch.no_grad():
        return tensor_of(module(x.clone())).clone()


def jvp(module, x: Tensor, tangents: Tensor) -> Tensor:
    """Jv along each tangent (P, B, *input), as the derivative of the whole batch's values: (P, B, *out)."""
    return torch.stack([derivative(lambda t, v=v: values(module, x + t * v)) for v in tangents])


def batch_jacobian(module, x: Tensor) -> Tensor:
    """∂yₙₖ/∂xₘᵢ, one element of x at a time, for the batch as a whole: (B, *out, B, *input)."""
    columns = []
    for number in range(x.numel()):
        move = torch.zeros(x.numel(), dtype=x.dtype)
        move[number] = 1.0
        columns.append(derivative(lambda t, move=move: values(module, x + t * move.view(x.shape))))
    columns = torch.stack(columns, dim=-1)
    return columns.view(*columns.shape[:-1], *x.shape)


def own_rows(full: Tensor) -> Tensor:
    """Jₙₖᵢ = ∂yₙₖ/∂xₙᵢ (B, K, *input): the blocks m = n of the batch's Jacobian (B, K, B, *input)."""
    return torch.stack([full[n, :, n] for n in range(len(full))])


def forward_product(full: Tensor, tangents: Tensor) -> Tensor:
    """Jv (P, B, *out) from the batch's Jacobian."""
    return torch.stack([torch.tensordot(full, v, dims=v.dim()) for v in tangents])


def reverse_product(full: Tensor, cotangents: Tensor) -> Tensor:
    """vᵀJ (P, B, *input) from the batch's Jacobian."""
    return torch.stack([torch.tensordot(v, full, dims=v.dim()) for v in cotangents])


def rows_by_backward(module, x: Tensor, cotangents: Tensor, seed: int = 0) -> Tensor:
    """vᵀJ by one forward pass of the plain module and one backward pass for each cotangent (P, B, *out)."""
    leaf = x.detach().clone().requires_grad_()
    with isolated(module, seed), torch.enable_grad():
        y = tensor_of(module(leaf * 1))
        rows = [torch.autograd.grad(y, leaf, v, retain_graph=True)[0] for v in cotangents]
    return torch.stack(rows)


def sketch(parameter: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Unit directions in which to move a parameter: each element alone, or `count` dense ones if it has more."""
    size = parameter.numel()
    if size <= count:
        return torch.eye(size, dtype=parameter.dtype).view(size, *parameter.shape)
    return torch.randn((count, *parameter.shape), generator=generator, dtype=parameter.dtype) / size**0.5


def parameter_derivatives(
    function: Callable[[], Tensor], parameters: Sequence[Tensor], directions: Sequence[Tensor]
) -> list[Tensor]:
    """How a vector of losses changes along each direction of each parameter: (directions, losses) per parameter."""
    derivatives = []
    for parameter, several in zip(parameters, directions, strict=True):
        before = parameter.detach().clone()

        def moved(t: float, direction: Tensor, parameter=parameter, before=before) -> Tensor:
            parameter.data.copy_(before + t * direction)
            return function()

        derivatives.append(torch.stack([derivative(lambda t, d=d, moved=moved: moved(t, d)) for d in several]))
        parameter.data.copy_(before)
    return derivatives


def squared(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ_rΣ_i (S − T)² per sample, for rows (B, R, ...)."""
    return (student - teacher).flatten(1).square().sum(1)


def relative(student: Tensor, teacher: Tensor, eps: float = 1e-6) -> Tensor:
    """Σ(S − T)² / (ΣT² + eps) per sample."""
    return squared(student, teacher) / (teacher.flatten(1).square().sum(1) + eps)


def normalized(student: Tensor, teacher: Tensor, eps: float = 1e-8) -> Tensor:
    """2 (1 − cos) per row, averaged over rows; both rows are lengthened by √eps."""
    a, b = student.flatten(2), teacher.flatten(2)
    lengths = ((a.square().sum(2) + eps) * (b.square().sum(2) + eps)).sqrt()
    return (2 - 2 * ((a * b).sum(2) + eps) / lengths).mean(1)


LOSSES = {"squared": squared, "relative": relative, "normalized": normalized}
