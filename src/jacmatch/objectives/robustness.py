"""Robustness without a teacher: a penalty on the norm of the network's own Jacobian."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from jacmatch.errors import InputError
from jacmatch.jacobian import BatchNormPolicy, Module, RandomOutputs, pull
from jacmatch.losses import hoffman
from jacmatch.objectives.terms import precise


def jacobian_norm_penalty(
    module: Module,
    x: Float[Tensor, "batch *input"],
    *,
    probes: int = 1,
    seed: int | None = None,
    ids: Int[Tensor, "batch"] | None = None,
    batch_norm: BatchNormPolicy = "frozen",
) -> tuple[Float[Tensor, "batch *out"], Float[Tensor, ""]]:
    """Outputs y (B, K), and an unbiased estimate of ½‖J‖²_F as a mean over the batch, to be added to a loss.

    The estimate is K/2 · ‖v̂ᵀJ‖², averaged over `probes` random unit vectors v̂ on the output side; one forward pass and
    one backward pass for each.

    Args:
        module: The network.
        x: Its raw input.
        probes: Random directions for each sample, at least 1.
        seed: Seeds the directions; None draws a new seed from torch's generator at each call.
        ids: A number for each sample, which with the seed fixes its directions.
        batch_norm: Policy for BatchNorm in training mode.

    Raises:
        InputError: `probes` is below 1.

    References:
        Hoffman, Roberts & Yaida 2019, arXiv:1908.02729, equation 12 and algorithm 1.

    Example:
        >>> y, penalty = jacobian_norm_penalty(torch.nn.Linear(3, 2), torch.randn(5, 3))
        >>> y.shape, penalty.shape
        (torch.Size([5, 2]), torch.Size([]))
    """
    if probes < 1:
        raise InputError("`probes` of `jacobian_norm_penalty` must be at least 1.", got=probes)
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    ids = torch.arange(len(x), device=x.device) if ids is None else ids
    estimator = RandomOutputs(probes, law="sphere")

    def unit_vectors(values: Tensor) -> Tensor:
        v = estimator.directions(outputs=values, x=x, labels=None, ids=ids, seed=seed, draw=0, partners=None)
        return functional.normalize(v, dim=2)

    result = pull(module, x, unit_vectors, batch_norm=batch_norm)
    rows = precise(result.products.transpose(0, 1))
    return result.outputs, hoffman(rows, result.outputs.shape[1]).mean()
