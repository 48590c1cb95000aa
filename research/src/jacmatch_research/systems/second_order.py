"""L-BFGS in float64 for networks with a structure that `JacobianRegressor` does not support."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Int
from scipy.optimize import minimize
from torch import Tensor, nn

from jacmatch.jacobian.engines import parameter_gradients

DECAYS = (1e-3, 1e-5, 1e-7)
"""Weight decays that are tried, from strong to weak."""
Loss = Callable[[Int[Tensor, "sample"]], Tensor]
"""Numbers of samples to their mean loss."""


def minimize_by_lbfgs(
    network: nn.Module, loss: Loss, samples: int, *, evaluations: int, seed: int, decays: Sequence[float] = DECAYS
) -> dict[str, float]:
    """Train a network in float64 over all samples, as `JacobianRegressor`; return evaluations and weight decay.

    The weight decay, toward the initial parameters of the network, is selected by the loss on a fifth of the samples.
    Each decay starts from the parameters of the next stronger one. The last fit is to all samples. The last fit takes
    `evaluations` evaluations of loss and gradient, and all other fits together take as many.
    """
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    held_out, others = order[: samples // 5], order[samples // 5 :]
    parameters = list(network.parameters())
    origin = theta = _as_vector(parameters).numpy()

    def evaluate(at: np.ndarray, rows: Tensor, decay: float) -> tuple[float, np.ndarray]:
        nn.utils.vector_to_parameters(torch.from_numpy(at.copy()), parameters)
        value = loss(rows)
        gradients = [
            torch.zeros_like(p) if gradient is None else gradient
            for p, gradient in zip(parameters, parameter_gradients(value, parameters, retain_graph=False), strict=True)
        ]
        off = at - origin
        return float(value.detach()) + 0.5 * decay * float(off @ off), _as_vector(gradients).numpy() + decay * off

    results: list[tuple[float, float, np.ndarray]] = []
    total = 0
    each = evaluations // len(decays)
    for decay, rows, most in (*((decay, others, each) for decay in decays), (None, order, evaluations)):
        if decay is None:
            _, decay, theta = min(results, key=lambda result: result[0])
        options = {"maxcor": 50, "maxfun": most, "maxiter": most, "ftol": 1e-15, "gtol": 1e-11}
        solution = minimize(evaluate, theta, (rows, decay), method="L-BFGS-B", jac=True, options=options)
        theta, total = solution.x, total + int(solution.nfev)
        nn.utils.vector_to_parameters(torch.from_numpy(theta.copy()), parameters)
        results.append((float(loss(held_out).detach()), decay, theta))
    return {"evaluations": float(total), "weight_decay": results[-1][1]}


def _as_vector(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([each.detach().reshape(-1) for each in tensors])
