"""What is said of one engine: its state in a word or two, and findings with their way out."""

import torch
from torch import Tensor

from jacmatch.errors import UnsupportedError
from jacmatch.jacobian.diagnosis import Finding

Verdict = tuple[str, list[Finding]]

RIGHT: Verdict = ("right", [])


def once(reason: str) -> Verdict:
    """A derivative that cannot be differentiated."""
    what = f"A derivative in the module can be taken only once: {reason}."
    way_out = "Write its backward in torch operations, without once_differentiable; or engine='differences'."
    return "once only", [Finding("once-differentiable", "fault", what, way_out)]


def not_finite(what: str) -> Verdict:
    """NaN or infinity that is not in the values."""
    return "NaN", [Finding("nan-derivative", "fault", what, "Look for sqrt, powers, norm or division at zero.")]


def rounded(what: str, dtype: torch.dtype, error: float) -> Verdict:
    """Right in float64, and `error` away from it in the module's own type."""
    state = "right" if error <= 0.5 else f"off by {error:.0%} in {dtype}"
    said = f"{what} in {dtype} is {error:.0%} away from float64."
    way_out = "Use a larger batch where statistics of few values are divided by, or float64."
    return state, [Finding("rounding", "note" if error <= 0.5 else "fault", said, way_out)]


def without_parameters(name: str) -> Verdict:
    """Products that no parameter can change, as far as autograd knows."""
    what = f"A penalty on the products of engine '{name}' has no gradient with respect to any parameter."
    way_out = "Remove what detaches the parameters or their results."
    return "no gradient", [Finding("detached-parameters", "fault", what, way_out)]


def wrong(name: str, products: Tensor, error: float) -> Verdict:
    """Products that differ from the reference."""
    if not products.any():
        what = f"Engine '{name}' returns zero although the outputs move: an operation has no {name}-mode rule."
        way_out = "Use an engine that is right, or write the operation in torch operations."
        return "silently zero", [Finding(f"{name}-zero", "fault", what, way_out)]
    if name == "differences":
        return wrong_differences(f"Differences in {products.dtype} are off by {error:.0%}", error)
    cause = "detach, .data, numpy, no_grad" + (", or an operation without forward mode" if name == "forward" else "")
    what = f"Engine '{name}' is off by {error:.0%}: a part of the derivative is missing ({cause})."
    code = "partly-detached" if name == "reverse" else "forward-incomplete"
    way_out = "Remove what cuts the graph, or use an engine that is right."
    return f"off by {error:.0%}", [Finding(code, "fault", what, way_out)]


def wrong_differences(what: str, error: float) -> Verdict:
    """Differences that are off because of the module, not because of a mistake."""
    what = f"{what}: the module is too curved or too noisy."
    return f"off by {error:.0%}", [Finding("differences-inaccurate", "note", what, "Use an engine that is right.")]


def wrong_gradient(name: str, error: float) -> Verdict:
    """A parameter gradient that differs from the reference; differences that span a kink are off by a little."""
    if name == "differences" and error <= 0.5:
        return wrong_differences(f"The parameter gradient of a penalty on differences is off by {error:.0%}", error)
    what = f"The parameter gradient of a penalty by engine '{name}' is off by {error:.0%}."
    way_out = "Look for a derivative that is cut off inside a custom backward; use an engine that is right."
    return f"gradient off by {error:.0%}", [Finding("wrong-gradient", "fault", what, way_out)]


def refused(name: str, failure: UnsupportedError, *, moves: bool) -> Verdict:
    """What the engine itself refused; `moves` says whether the outputs depend on the input at all."""
    reason = str(failure).partition(" Use engine=")[0]
    if "detaches" in reason:
        if not moves:
            return "no derivative", []
        what = "The outputs move with the input, but are cut off from it: something detaches them."
        way_out = "Remove .detach(), .data, numpy or no_grad from the module, or engine='differences'."
        return "detached", [Finding("detached", "fault", what, way_out)]
    way_out = "Use an engine that is right, or write the operation in torch operations."
    return "cannot", [Finding(f"{name}-unsupported", "fault" if name == "reverse" else "note", reason[:300], way_out)]


def fails(name: str, reason: str) -> Verdict:
    """What only went wrong when the products were differentiated."""
    way_out = "Write the operation in torch operations, or register its backward."
    return "fails", [Finding("engine-fails", "fault", f"Engine '{name}' fails: {reason}", way_out)]
