"""The straightforward code that the library is compared with, and the bare training step around each method.

Only the benchmarks use it. It is the only other file that differentiates and steps an optimizer.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacmatch_research.bench.claims import NotMeasured


def add_gradient(loss: Tensor) -> None:
    """Add the gradient of a loss to the parameters."""
    torch.autograd.backward(loss)


def stepper(network: nn.Module, loss: Callable[..., Tensor]) -> Callable[..., None]:
    """A function that makes one step of Adam on the network's parameters.

    `loss` computes the loss of a step from the arguments of the function.
    """
    optimizer = torch.optim.Adam(network.parameters())

    def step(*batch: Any) -> None:
        optimizer.zero_grad()
        add_gradient(loss(*batch))
        optimizer.step()

    return step


def adam_step(network: nn.Module, *, fused: bool) -> Callable[[], object]:
    """A step of Adam with constant gradients, fused or as PyTorch selects it."""
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    return torch.optim.Adam(network.parameters(), fused=fused or None).step


def loop_jacobian(
    network: nn.Module, x: Float[Tensor, "batch *input"], *, create_graph: bool = False
) -> Float[Tensor, "batch output *input"]:
    """The full Jacobian by a loop of backward passes over the outputs, as a user would write it."""
    leaf = x.clone().requires_grad_()
    y = network(leaf)
    rows = [
        torch.autograd.grad(y[:, k].sum(), leaf, create_graph=create_graph, retain_graph=True)[0]
        for k in range(y.shape[1])
    ]
    return torch.stack(rows, 1)


def torch_func_jacobian(network: nn.Module, x: Float[Tensor, "batch *input"]) -> Float[Tensor, "batch output *input"]:
    """The full Jacobian as PyTorch's documentation of `torch.func` computes it: `jacrev` of a sample, under `vmap`."""

    def single(each: Tensor) -> Tensor:
        outputs: Tensor = network(each[None])
        return outputs[0]

    rows: Tensor = torch.func.vmap(torch.func.jacrev(single))(x)
    return rows


def torchjd_jacobian(network: nn.Module, x: Float[Tensor, "batch *input"]) -> Float[Tensor, "batch output *input"]:
    """The full Jacobian by the engine of TorchJD, of the outputs summed over the samples, which are independent.

    Raises:
        NotMeasured: TorchJD is not installed.
    """
    try:
        from torchjd.autojac import jac
    except ImportError as missing:
        raise NotMeasured("torchjd is not installed: pip install torchjd") from missing
    leaf = x.clone().requires_grad_()
    (rows,) = jac(network(leaf).sum(0), leaf)
    return cast("Tensor", rows.transpose(0, 1))


def norm_penalty(
    network: nn.Module, x: Float[Tensor, "batch *input"]
) -> tuple[Float[Tensor, "batch output"], Float[Tensor, ""]]:
    """Outputs and ½ K ‖vᵀJ‖², the mean over the batch, v uniform on the unit sphere: one projection, in plain PyTorch.

    References:
        Hoffman, Roberts & Yaida 2019, arXiv:1908.02729, algorithm 1.
    """
    leaf = x.clone().requires_grad_()
    outputs = network(leaf)
    v = torch.randn_like(outputs)
    v = v / v.norm(dim=1, keepdim=True)
    (row,) = torch.autograd.grad((v * outputs).sum(), leaf, create_graph=True)
    return outputs, outputs.shape[1] * row.square().sum() / (2 * len(x))


def row_loss(
    student: nn.Module, teacher: nn.Module, x: Float[Tensor, "batch *input"], y: Int[Tensor, "batch"]
) -> Float[Tensor, ""]:
    """The loss of labels, outputs and one random row, teacher's and student's, as written in plain PyTorch."""
    leaf = x.clone().requires_grad_()
    targets, outputs = teacher(leaf), student(leaf)
    v = torch.randn_like(outputs)
    (target_row,) = torch.autograd.grad((v * targets).sum(), leaf)
    (row,) = torch.autograd.grad((v * outputs).sum(), leaf, create_graph=True)
    apart = (outputs - targets.detach()).square().sum() + (row - target_row).square().sum()
    loss: Tensor = nn.functional.cross_entropy(outputs, y) + apart / len(x)
    return loss
