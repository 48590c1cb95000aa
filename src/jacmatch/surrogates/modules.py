"""Surrogates as PyTorch modules: minibatch training, and networks of the second-order solver as modules."""

import warnings
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.datasets import Split
from jacmatch.datasets.data import statistics
from jacmatch.errors import InputError, unknown_name
from jacmatch.jacobian import Estimator, EveryRow, RandomInputs, SampledRows
from jacmatch.models import scaled_mlp
from jacmatch.models.mlp import ProcessMean, ScaledMLP
from jacmatch.objectives import Regression
from jacmatch.surrogates.gaussian_process import GaussianProcess
from jacmatch.surrogates.perceptron import Parameters, Perceptron
from jacmatch.surrogates.samples import Scaler
from jacmatch.surrogates.solver import Standardized
from jacmatch.teachers import Teacher
from jacmatch.training import Training, fit
from jacmatch.training.loop import OnStep

PARTIALS = ("none", "jacobian", "jv", "rows")
"""Nothing; the whole Jacobian; products with random input directions; rows, sampled anew in each step."""
_LOOKED_AT = 256  # samples from which the weight `scale` is computed

Weight = float | int | Literal["scale"]
"""A number; a `GradientShare`; or `scale`, where zero partials would cost as much as the mean value does."""


def fit_surrogate(
    x: Float[Tensor, "sample *input"],
    y: Float[Tensor, "sample out"],
    *,
    jacobian: Float[Tensor, "sample out *input"] | None = None,
    teacher: Teacher | nn.Module | None = None,
    partials: str = "jacobian",
    probes: int = 1,
    weight: Weight = "scale",
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "softplus",
    student: nn.Module | None = None,
    x_scale: Float[Tensor, "*input"] | None = None,
    y_scale: Float[Tensor, "out"] | None = None,
    steps: int = 2000,
    batch_size: int = 128,
    lr: float = 3e-3,
    seed: int = 0,
    device: str = "cpu",
    on_step: OnStep | None = None,
    slopes: str | None = None,
    **training: Any,
) -> nn.Module:
    """Train a network on values and partials; it takes and returns raw units, and is in evaluation mode.

    Inputs, outputs and partials are compared in units of `x_scale` and `y_scale`; see `objectives.Regression`.

    Args:
        x: Inputs.
        y: Values.
        jacobian: Partials ∂yₖ/∂xᵢ at the inputs. Without them, a teacher is queried in each step.
        teacher: Teacher that returns the partials if none are given.
        partials: Which partials are compared; see `PARTIALS`.
        probes: Number of products or rows in a step.
        weight: Weight of the partials; the values have weight 1.
        hidden: Widths of the hidden layers.
        activation: Activation function.
        student: Network to train instead of a new one; it takes and returns raw units.
        x_scale: Units of the inputs; their standard deviation if None.
        y_scale: Units of the outputs; their standard deviation if None.
        steps: Number of optimizer steps.
        batch_size: Number of samples in a step, or all samples if there are fewer.
        lr: Maximum learning rate.
        seed: Seed of weights, batches and directions.
        device: Device on which the network is trained.
        on_step: Called after each step; see `training.fit`.
        slopes: The former name of `partials`.
        **training: Other fields of `Training`.

    Raises:
        InputError: An argument is invalid, or no partials are known.
        UnsupportedError: The teacher cannot answer the query.

    Example:
        >>> x = torch.linspace(0, 3, 16)[:, None]
        >>> net = fit_surrogate(x, x.sin(), jacobian=x.cos()[:, :, None], hidden=(16,), steps=20)
        >>> net(x).shape
        torch.Size([16, 1])
    """
    if slopes is not None:
        message = "`slopes` of `fit_surrogate` is now `partials`; the old name will be removed in the next release."
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        partials = slopes
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = new_student(x, y, hidden, activation, y_scale) if student is None else student
    known: dict[str, Any] = {"jacobian": jacobian, "teacher": teacher, "partials": partials, "probes": probes}
    objective = regression(network, x, y, weight=weight, x_scale=x_scale, y_scale=y_scale, seed=seed, **known)
    settings = Training(steps=steps, batch_size=batch_size, lr=lr, **training)
    fit(objective, Split(x, y), settings, seed=seed, device=device, on_step=on_step)
    return network.eval()


def to_module(net: Perceptron, theta: Parameters, scaler: Scaler, shape: tuple[int, ...] | None = None) -> ScaledMLP:
    """Return a fitted network as a module in float32, raw units in and out.

    The scales of an input with more than one axis are folded into the first layer.
    """
    shape = (net.widths[0],) if shape is None else shape
    layers = [(weight.copy(), bias.copy()) for weight, bias in net.layers(theta)]
    mean, scale = scaler.x_mean, scaler.x_scale
    if len(shape) > 1:
        weight, bias = layers[0]
        layers[0] = (weight / scale, bias - weight @ (mean / scale))
        mean, scale = np.zeros(shape[0]), np.ones(shape[0])
    numbers = (mean.tolist(), scale.tolist(), scaler.y_mean.tolist(), scaler.y_scale.tolist())
    module = scaled_mlp(shape, net.widths[-1], net.widths[1:-1], net.activation, *numbers)
    linear = [layer for layer in module.network.layers if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer, (weight, bias) in zip(linear, layers, strict=True):
            layer.weight.copy_(torch.from_numpy(weight))
            layer.bias.copy_(torch.from_numpy(bias))
    return module.eval()


def to_process_module(process: GaussianProcess, scaler: Scaler, shape: tuple[int, ...]) -> ProcessMean:
    """Return the mean of a Gaussian process as a module, raw units in and out."""
    n = len(process.groups[0].observed.x)
    module = ProcessMean(len(scaler.y_mean), shape, n, len(process.groups))
    arrays = {"x_mean": scaler.x_mean, "x_scale": scaler.x_scale, "y_mean": scaler.y_mean, "y_scale": scaler.y_scale}
    for name, array in (arrays | {"points": process.groups[0].observed.x}).items():
        getattr(module, name).copy_(torch.as_tensor(array))
    for number, group in enumerate(process.groups):
        outputs = torch.from_numpy(group.outputs)
        entries = torch.from_numpy(group.weights)
        module.values[:, outputs] = entries[0]
        module.partials[:, :, outputs] = entries[1:].transpose(0, 1)
        module.lengths[number] = torch.from_numpy(group.lengths)
        used = group.constants > 0
        module.constants[number, used] = torch.from_numpy(np.log(group.constants[used]))
        module.groups[outputs] = number
        if process.logs is not None:
            sign = module.signs[outputs] = torch.from_numpy(process.logs.sign)[outputs]
            module.y_mean[outputs] = torch.where(sign == 0, module.y_mean[outputs], module.y_scale[outputs].log())
            module.y_scale[outputs] = torch.where(sign == 0, module.y_scale[outputs], 1.0)
        module.y_mean[outputs] += module.y_scale[outputs] * torch.from_numpy(group.mean)
    return module.eval()


def to_parameters(module: ScaledMLP, net: Perceptron) -> Parameters:
    """Return the parameters of a module's perceptron as one vector in float64."""
    linear = [layer for layer in module.network.layers if isinstance(layer, nn.Linear)]
    theta = np.zeros(net.count)
    for layer, (weight, bias) in zip(linear, net.layers(theta), strict=True):
        weight[:], bias[:] = layer.weight.detach().cpu().numpy(), layer.bias.detach().cpu().numpy()
    return theta


def fit_minibatches(
    data: Standardized, net: Perceptron, *, steps: int, seed: int, device: str = "cpu", jacobian_weight: float = 1.0
) -> Parameters:
    """Return the parameters of a network trained by Adam in minibatches, in float32."""
    shape = (net.widths[0],)
    student = scaled_mlp(shape, net.widths[-1], net.widths[1:-1], net.activation)
    x, y = torch.from_numpy(data.x).float(), torch.from_numpy(data.y).float()
    table = None
    if data.t is not None and data.t_weights is not None:
        partials = np.where(data.t_weights > 0, data.t, np.nan).transpose(1, 2, 0)
        table = torch.from_numpy(partials.copy()).float()
    partials = "none" if table is None else "jacobian"
    units: dict[str, Any] = {"x_scale": torch.ones(shape), "y_scale": torch.ones(net.widths[-1])}
    how: dict[str, Any] = {"student": student, "steps": steps, "seed": seed, "device": device}
    fit_surrogate(x, y, jacobian=table, partials=partials, weight=jacobian_weight, **units, **how)
    return to_parameters(student, net)


def new_student(
    x: Float[Tensor, "sample *input"],
    y: Float[Tensor, "sample out"],
    hidden: tuple[int, ...],
    activation: str,
    y_scale: Float[Tensor, "out"] | None = None,
) -> nn.Module:
    """Build a perceptron that is scaled by the means and standard deviations of these points.

    An output that never varies is scaled by its unit, `y_scale`.
    """
    mean, std = statistics(Split(x, y))
    scale = deviation(y) if y_scale is None else torch.where(y.std(0, unbiased=False) > 0, deviation(y), y_scale)
    return scaled_mlp(tuple(x.shape[1:]), y.shape[1], hidden, activation, mean, std, y.mean(0), scale)


def regression(
    student: nn.Module,
    x: Float[Tensor, "sample *input"],
    y: Float[Tensor, "sample out"],
    *,
    jacobian: Float[Tensor, "sample out *input"] | None = None,
    teacher: Teacher | nn.Module | None = None,
    partials: str = "jacobian",
    probes: int = 1,
    weight: Weight = "scale",
    x_scale: Float[Tensor, "*input"] | None = None,
    y_scale: Float[Tensor, "out"] | None = None,
    seed: int = 0,
) -> Regression:
    """Return the objective of `fit_surrogate`, for your own loop; the arguments are the same."""
    if partials not in PARTIALS:
        raise unknown_name("`partials` of `fit_surrogate`", partials, PARTIALS)
    if partials != "none" and jacobian is None and teacher is None:
        rule = "`jacobian` or `teacher` of `fit_surrogate` must be given if partials are compared."
        raise InputError(rule, do='Set partials="none" for values alone.')
    units: dict[str, Any] = {
        "inputs": x.std(0, unbiased=False) if x_scale is None else x_scale,
        "outputs": deviation(y) if y_scale is None else y_scale,
    }
    units = {name: torch.where(unit > 0, unit, 1.0) for name, unit in units.items()}
    if partials == "none":
        return Regression(student, jacobians=0.0, seed=seed, **units)
    probe: Estimator = EveryRow()
    if partials == "jv":
        probe = RandomInputs(probes)
    elif partials == "rows":
        probe = SampledRows(min(probes, y.shape[1]))
    if jacobian is not None:
        units["table"] = jacobian
    queried = teacher if jacobian is None else None
    factor = _by_scale(x, y, queried, probe, seed, units) if weight == "scale" else weight
    return Regression(student, queried, jacobians=factor, probe=probe, seed=seed, **units)


def deviation(y: Float[Tensor, "sample *entry"]) -> Float[Tensor, "*entry"]:
    """The standard deviation of each entry, 1 where it never varies."""
    std = y.std(0, unbiased=False)
    return torch.where(std > 0, std, torch.ones_like(std))


def _by_scale(
    x: Tensor, y: Tensor, teacher: Teacher | nn.Module | None, probe: Estimator, seed: int, units: dict[str, Any]
) -> float:
    """The weight at which a constant student loses as much by its partials as by its values."""
    mean = _Constant(y.mean(0))
    part = slice(min(len(x), _LOOKED_AT))
    with torch.no_grad():
        terms = Regression(mean, teacher, jacobians=1.0, probe=probe, seed=seed, **units).eval()(x[part], y[part])
    values, jacobians = (float(terms[name]) for name in ("values", "jacobians"))
    return values / jacobians if values > 0 and jacobians > 0 else 1.0


class _Constant(nn.Module):
    """A constant network that can be differentiated."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs + 0 * x.flatten(1).sum(1, keepdim=True)
