"""The cells of the table: what each derivative of a configuration is, compared with differences."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import jacmatch
from jacmatch.errors import InputError, UnsupportedError

from . import table
from .configurations import Configuration, NoOutputsError
from .differences import Estimate, NoReferenceError, Reference, reference
from .table import BASELINES, DERIVATIVES, ENGINES

TOLERANCE = 1e-4
"""Relative error above which a derivative is wrong; more where the differences are less certain."""
ENGINE_TOLERANCE = 1e-2
"""The same for the engine `differences`, which is an approximation, and for `auto`, which may take it."""
FLOOR = 1e-9
"""A derivative below this part of the outputs counts as zero; a thousand times more where it is an approximation."""
Cells = dict[str, str]


def measure(configuration: Configuration, *, only: tuple[str, ...] = (*DERIVATIVES, *BASELINES)) -> Cells:
    """For each derivative `right`, `refused`, `wrong`, `raw` or `none` (no reference), with the reason behind it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = reference(configuration.network, configuration.x)
    except (NoReferenceError, NoOutputsError) as reason:
        return {"none": str(reason) or "no floating-point outputs"}
    except Exception as reason:
        return {"none": f"the module fails: {type(reason).__name__}: {_line(reason)}"}
    ways = _ways(configuration, expected)
    return {name: _cell(ways[name], configuration.network, expected, name) for name in only}


def line(configuration: Configuration) -> tuple[table.Row, Cells]:
    """The line of the table for a configuration, and the cells with their reasons."""
    cells = measure(configuration)
    if "none" not in cells:
        cells["doctor"] = diagnose(configuration)
    return table.row(configuration.name, cells), cells


Way = Callable[[nn.Module], tuple[Tensor, Tensor, Tensor]]
"""Outputs, the value that is compared, and the number uᵀJw whose parameter gradient is."""


def diagnose(configuration: Configuration) -> str:
    """What the doctor says of each product, as `engine=state, ... | codes of its faults`.

    It gives one state for reverse mode, which makes two products: `right for vjp; ...` is right for vᵀJ only. Where the
    Jacobian is zero it looks at vᵀJ only.
    """
    try:
        with _left_alone(configuration.network), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            diagnosis = jacmatch.doctor(configuration.network, configuration.x.clone())
    except (InputError, UnsupportedError) as reason:
        return f"refused: {_line(reason)}"
    except Exception as reason:
        return f"raw: {type(reason).__name__}: {_line(reason)}"
    states = dict(diagnosis.engines)
    reverse = states.pop("reverse", "")
    if reverse:
        states = {"vjp": "right" if reverse.startswith("right") else reverse} | states
    if reverse.startswith("right") and not any(finding.code == "zero-jacobian" for finding in diagnosis.findings):
        states["reverse"] = reverse
    text = ", ".join(f"{name}={state}" for name, state in states.items())
    codes = dict.fromkeys(finding.code for finding in diagnosis.findings if finding.severity == "fault")
    return f"{text} | {' '.join(codes)}"


def _ways(configuration: Configuration, expected: Reference) -> dict[str, Way]:
    x, w, u = configuration.x, expected.w, expected.u

    def vjp(network: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        y, row = jacmatch.vjp(network, x.clone(), u)
        return y, (row * w).sum(), (row * w).sum()

    def jvp(engine: str) -> Way:
        def way(network: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
            y, product = jacmatch.jvp(network, x.clone(), w, engine=engine)
            return y, product, (product * u).sum()

        return way

    def jacobian(network: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        y, rows = jacmatch.jacobian(network, x.clone())
        product = (rows.flatten(2) @ w.flatten(1)[..., None])[..., 0] if x.dim() > 1 else rows * w[:, None]
        return y, product, (product * u).sum()

    def torch_vjp(network: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        y = network(leaf)
        (row,) = torch.autograd.grad(y, leaf, u, create_graph=True)
        return y, (row * w).sum(), (row * w).sum()

    def torch_jvp(network: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        y, product = torch.func.jvp(network, (x.clone(),), (w,))
        return y, product, (product * u).sum()

    jvps = {engine: jvp(engine) for engine in ENGINES}
    return {"vjp": vjp, **jvps, "jacobian": jacobian, "torch vjp": torch_vjp, "torch jvp": torch_jvp}


def _cell(way: Way, network: nn.Module, expected: Reference, name: str) -> str:
    own = name == "jacobian"
    product, gradient = (expected.own, expected.own_gradient) if own else (expected.product, expected.gradient)
    if name in ("vjp", "torch vjp"):
        product = Estimate((product.value * expected.u).sum(), product.uncertainty)
        size = float((expected.product.value * expected.u).norm())
    else:
        size = float(product.value.norm())
    parameters = [each for each in network.parameters() if each.requires_grad]
    stage = "value"
    try:
        with _left_alone(network), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            y, value, number = way(network)
            stage = "gradient"
            gradients: tuple[Tensor | None, ...] = (None,) * len(parameters)
            if number.requires_grad:
                gradients = torch.autograd.grad(number, parameters, allow_unused=True)
    except (InputError, UnsupportedError) as reason:
        return f"refused: {stage}: {_line(reason)}"
    except Exception as reason:
        return f"raw: {stage}: {type(reason).__name__}: {_line(reason)}"
    if not torch.allclose(y.detach(), expected.outputs, rtol=1e-9, atol=1e-12):
        if expected.random:
            return "none: other random numbers"
        return f"wrong: outputs: off by {_off(y, expected.outputs, 0.0):.0e}"
    if not product.known:
        return "none: no difference"
    approximate = name in ("auto", "differences")  # auto may take differences
    tolerance = ENGINE_TOLERANCE if approximate else TOLERANCE
    floor = FLOOR * (1e3 if approximate else 1) * float(expected.outputs.abs().max() + 1e-30)
    error = _off(value, product.value, max(size, floor))
    if not error <= max(tolerance, 10 * product.uncertainty):
        return f"wrong: value: off by {error:.0e}"
    if not gradient.known:
        return "right: value only"
    parts = [(g.detach() * p).sum() for g, p in zip(gradients, expected.directions, strict=True) if g is not None]
    total = torch.stack(parts).sum() if parts else torch.zeros((), dtype=value.dtype)
    spread = max([floor, abs(float(gradient.value)), *(float(part.abs()) for part in parts)])
    error = _off(total, gradient.value, spread)
    if not error <= max(tolerance, 10 * gradient.uncertainty):
        return f"wrong: gradient: off by {error:.0e}"
    return "right"


def _off(got: Tensor, truth: Tensor, size: float) -> float:
    if got.shape != truth.shape:
        return float("inf")
    return float((got.detach() - truth).norm()) / max(float(truth.norm()), size, 1e-300)


@contextmanager
def _left_alone(network: nn.Module) -> Iterator[None]:
    """The buffers are put back: each derivative is taken of the same network."""
    before = copy.deepcopy(dict(network.named_buffers()))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in network.named_buffers():
                buffer.copy_(before[name])


def _line(reason: BaseException) -> str:
    return (str(reason).strip().splitlines() or [""])[0][:160]
