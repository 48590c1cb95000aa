"""The function that a surrogate learns: two examples, how it is called and differentiated, and its checks."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from jacmatch import datasets
from jacmatch.errors import InputError, UnsupportedError, converted_errors, in_one_line, user_callable
from jacmatch.jacobian import finite_differences, products
from jacmatch.models import ValuesOnly, catalog
from jacmatch.models.values import onnx

_TYPES = "must return float32 or float64."
OURS = "It is called with float64 tensors or arrays on the CPU, and returns the same."


def checked(rule: str, given: Any, x: Float[Tensor, "sample input"]) -> Float[Tensor, "sample *out"]:
    """Return the result of a call as a tensor of finite numbers with one row per point."""
    if isinstance(given, np.ndarray) or np.isscalar(given) or isinstance(given, list | tuple):
        with converted_errors(f"{rule} must return an array.", OURS, of=ValueError):  # rows of different lengths
            array = np.asarray(given)
        if array.dtype.kind != "f" or array.dtype == np.float16:
            raise InputError(f"{rule} {_TYPES}", got=f"{array.dtype}", do="Convert with .astype(float).")
        given = torch.from_numpy(np.array(array, np.float64, order="C"))
    if not isinstance(given, Tensor):
        raise InputError(f"{rule} must return a tensor or an array.", got=type(given).__name__, do=OURS)
    if given.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{rule} {_TYPES}", got=given.dtype, do="Convert with .double().")
    if given.device != x.device:
        raise InputError(f"{rule} must return a tensor on the {x.device}.", got=given.device, do=OURS)
    if given.dim() == 0 or len(given) != len(x):
        rule = f"{rule} must return one row for each of the {len(x)} points."
        do = "If it takes one point at a time, wrap it: lambda x: np.stack([f(each) for each in x])."
        raise InputError(rule, got=f"shape {tuple(given.shape)}", do=do)
    return finite(rule, given.detach(), x)


def finite(
    rule: str, given: Float[Tensor, "sample *out"], x: Float[Tensor, "sample input"]
) -> Float[Tensor, "sample *out"]:
    """Return the tensor if all numbers are finite; the `InputError` names a point where they are not."""
    bad = torch.nonzero(~given.reshape(len(x), -1).isfinite().all(1))
    if len(bad):
        rule = f"{rule} must be finite."
        got = f"NaN or infinity at {len(bad)} of {len(x)} points, first at x = {format_point(x[int(bad[0])])}"
        raise InputError(rule, got=got, do="Sample where it is defined (--low, --high), or pass the points.")
    return given


def format_point(x: Float[Tensor, "input"]) -> str:
    """Return a point as text: its first eight numbers."""
    shown = ", ".join(f"{value:.6g}" for value in x[:8].tolist())
    return f"({shown}{', …' if len(x) > 8 else ''})"


Way = Literal["own", "autograd", "differences"]
WAYS: tuple[Way, ...] = ("own", "autograd", "differences")
NON_SMOOTH = 0.1  # change of a derivative within one step, as a share of the largest one, that is reported


@dataclass
class Function:
    """A function of a batch (N, D) with values (N, K), evaluated in float64; see `open_function`."""

    name: str  # name, as the user wrote it
    call: Callable[[Any], Any]  # the function itself
    arrays: Literal["torch", "numpy"]  # whether it takes and returns tensors or arrays
    own: Callable[[Any], Any] | None  # its own Jacobian, (N, K, D) for the same batch; None if it has none
    way: Way  # how the Jacobian is computed
    units: Float[Tensor, "input"]  # typical change of each input; steps of differences are relative to it
    step: float | None = None  # relative step; None: ε^⅓, where ε is the precision of the returned values
    dtype: torch.dtype = torch.float64  # dtype of the arguments of a torch function
    points: int = 0  # number of evaluations so far, including those for differences
    seconds: float = 0.0  # seconds spent in the function
    differenced: int = 0  # number of points where the Jacobian was computed by differences
    non_smooth: int = 0  # number of these points where the function is not smooth within the step
    precision: float = field(default=float(torch.finfo(torch.float64).eps))  # ε of the dtype of the returned values

    def values(self, x: Float[Tensor, "sample input"]) -> Float[Tensor, "sample out"]:
        """Return the values at x."""
        given = self._timed(self.call, x)
        y = checked(self.name, given, x)
        if y.dim() != 2 or not y.shape[1]:
            rule = f"{self.name} must return values ({len(x)}, K) for a batch ({len(x)}, {x.shape[1]})."
            do = "Add an output axis: y[:, None]." if y.dim() == 1 else "One row for each point."
            do = "Pass fields as npz:FILE, or flattened: y.reshape(len(y), -1)." if y.dim() > 2 else do
            raise InputError(rule, got=f"shape {tuple(y.shape)}", do=do)
        single = isinstance(given, np.ndarray) and given.dtype == np.float32
        self.precision = float(torch.finfo(torch.float32 if single else y.dtype).eps)
        return y.double()

    def jacobian(self, x: Float[Tensor, "sample input"]) -> Float[Tensor, "sample out input"]:
        """Return the Jacobians at x, computed in the selected way."""
        if self.way == "own":
            assert self.own is not None
            j = checked(f"The Jacobian of {self.name}", self._timed(self.own, x), x)
            wanted = f"({len(x)}, K, {x.shape[1]})"
            if j.dim() != 3 or j.shape[2] != x.shape[1]:
                rule = f"The Jacobian of {self.name} must have the shape {wanted}."
                raise InputError(rule, got=f"shape {tuple(j.shape)}", do="The order is batch, outputs, inputs.")
            return j.double()
        if self.way == "autograd":
            return self._by_autograd(x)
        j, non_smooth = self.by_differences(x)
        self.differenced, self.non_smooth = self.differenced + len(x), self.non_smooth + int(non_smooth.sum())
        return j

    def by_differences(
        self, x: Float[Tensor, "sample input"], step: float | None = None
    ) -> tuple[Float[Tensor, "sample out input"], Bool[Tensor, "sample"]]:
        """Return Jacobians by central differences, and where the function is not smooth within the step.

        A function is not smooth at a point if the one-sided derivatives (f(x + h) − f(x))/h and (f(x) − f(x − h))/h
        differ by more than `NON_SMOOTH` of the largest derivative of that output.
        """
        y = self.values(x)
        step = self.step if step is None else step
        h = self.precision ** (1 / 3) if step is None else step
        moved = (x + h * self.units).to(self.dtype) != (x - h * self.units).to(self.dtype)
        if not moved.all():
            rule = f"`--step` of `surrogate` must change each input of {self.name} in {str(self.dtype)[6:]}."
            raise InputError(rule, got=f"{h:g} of a unit", do="Give a larger one, or other --input-units.")
        evaluated: list[Tensor] = []

        def evaluate(z: Tensor) -> Tensor:
            evaluated.append(self.values(z))
            return evaluated[-1]

        v = torch.diag(self.units)[:, None, :].expand(-1, len(x), -1)
        derivatives = finite_differences.central(evaluate, x, v, step=h)  # by unit; evaluates x + hv, then x − hv
        pairs = zip(evaluated[::2], evaluated[1::2], strict=True)
        sides = torch.stack([plus - 2 * y + minus for plus, minus in pairs]) / h
        rounding = 8 * self.precision * y.abs().amax(0) / h
        non_smooth = (sides.abs() > NON_SMOOTH * derivatives.abs().amax((0, 1)) + rounding).any(2).any(0)
        return (derivatives / self.units.view(-1, 1, 1)).permute(1, 2, 0), non_smooth

    def _by_autograd(self, x: Tensor) -> Tensor:
        start = time.perf_counter()
        try:
            j = products.jacobian(self.call, x.to(self.dtype))[1]
        except (RuntimeError, UnsupportedError) as error:
            rule = f"{self.name} must be differentiable by autograd for `--jacobian autograd`."
            do = "Use --jacobian differences, or provide its Jacobian."
            raise InputError(rule, got=in_one_line(error), do=do) from error
        self.seconds += time.perf_counter() - start
        self.points += len(x)
        return finite(f"The Jacobian of {self.name} by autograd", j.detach().double(), x)

    def _timed(self, call: Callable[[Any], Any], x: Tensor) -> Any:
        start = time.perf_counter()
        argument: Any = x.clone().to(self.dtype) if self.arrays == "torch" else x.numpy(force=True).copy()
        rule = f"{self.name} must take a batch of {len(x)} points with {x.shape[1]} inputs."
        with converted_errors(rule, OURS), torch.no_grad():  # the user's code may raise anything
            given = call(argument)
        self.seconds += time.perf_counter() - start
        self.points += len(x) if call is self.call else 0
        return given


def is_code(spec: str) -> bool:
    """Return whether a function is one of a PACKAGE.MODULE:CALLABLE, which is imported and called."""
    module_name, _, attribute = spec.partition(":")
    other = module_name in ("npz", "csv", "parquet", "onnx")
    return bool(attribute) and not other and all(map(str.isidentifier, module_name.split(".")))


def import_callable(spec: str, flag: str = "--teacher") -> Any:
    """Import the object that `PACKAGE.MODULE:CALLABLE` names; its code runs because the user named it."""
    module_name, _, attribute = spec.partition(":")
    if module_name == "onnx":
        return onnx_function(attribute)
    rule = f"`{flag} {spec}` must be PACKAGE.MODULE:CALLABLE, onnx:FILE, or a table (npz:, csv: or parquet:FILE)."
    taken = module_name in datasets.LOADERS or module_name in catalog.FAMILIES  # in a --config too
    if taken or not is_code(spec):
        raise InputError(rule, got=repr(spec), do="`jacmatch list` has the names of built-in functions.")
    return user_callable(spec, f"`{flag} {spec}`", rule)


def onnx_function(path: str) -> Callable[[Any], Any]:
    """Return the function of an ONNX file that maps arrays (N, D) to values, in float32."""
    network: ValuesOnly | None = None

    def call(x: np.ndarray) -> np.ndarray:
        nonlocal network
        points = torch.from_numpy(np.asarray(x, np.float32))
        if network is None:
            network = onnx(path, None, tuple(points.shape[1:]))
        values: np.ndarray = network(points).numpy()
        return values

    return call


def open_function(
    name: str,
    call: Callable[[Any], Any],
    x: Float[Tensor, "sample input"],
    units: Float[Tensor, "input"],
    *,
    own: Callable[[Any], Any] | None = None,
    way: Way | Literal["auto"] = "auto",
    step: float | None = None,
) -> Function:
    """Return the function, after testing what it accepts and how its Jacobian can be computed.

    It is called with tensors that require gradients, then with plain tensors, then with arrays; only with arrays if it
    and its own Jacobian take them. A module is put into evaluation mode.

    `own` is by default its attribute `jacobian`, and `way` the first available of own, autograd and differences.
    """
    own = getattr(call, "jacobian", None) if own is None else own
    if isinstance(call, nn.Module):
        call.eval()
    if step is not None and not 0 < step < float("inf"):
        raise InputError("`--step` of `surrogate` must be positive and finite.", got=step)
    arrays, dtype, traced = _taken(name, call, own, x)
    chosen: Way = "own" if own is not None else "autograd" if traced else "differences"
    if way != "auto":
        chosen = way
        if way == "own" and own is None:
            do = "Give it an attribute `jacobian`, or name one with --jacobian PACKAGE.MODULE:CALLABLE."
            raise InputError(f"{name} must have a Jacobian of its own for `--jacobian own`.", got="none", do=do)
        if way == "autograd" and not traced:
            rule = f"{name} must be differentiable by autograd for `--jacobian autograd`."
            got = "values without a gradient" if arrays == "torch" else "a NumPy function"
            raise InputError(rule, got=got, do="Use --jacobian differences, or provide its Jacobian.")
    return Function(name, call, arrays, own, chosen, units, step, dtype)


def _of_arrays(call: Callable[[Any], Any], own: Callable[[Any], Any] | None, x: Tensor) -> bool:
    """Whether function and Jacobian both take arrays and return no tensors: tensors are not tried then."""
    try:
        return own is not None and not any(isinstance(each(x.numpy().copy()), Tensor) for each in (call, own))
    except Exception:  # the user's code may raise anything
        return False


def _taken(
    name: str, call: Callable[[Any], Any], own: Callable[[Any], Any] | None, x: Tensor
) -> tuple[Literal["torch", "numpy"], torch.dtype, bool]:
    """Return whether the function takes tensors or arrays, their dtype, and whether autograd works."""
    if _of_arrays(call, own, x):
        return "numpy", torch.float64, False
    failures = []
    for dtype in (torch.float64, torch.float32):
        try:
            y = call(x.to(dtype, copy=True).requires_grad_())
            if isinstance(y, Tensor) and y.requires_grad:
                return "torch", dtype, True
        except Exception as error:  # the user's code may raise anything
            failures.append(f"tensors of {str(dtype).removeprefix('torch.')}: {in_one_line(error)}")
    try:
        if not isinstance(call(x.numpy().copy()), Tensor):
            return "numpy", torch.float64, False
    except Exception as error:
        failures.append(f"arrays: {in_one_line(error)}")
    for dtype in (torch.float64, torch.float32):
        try:
            call(x.to(dtype, copy=True))
            return "torch", dtype, False
        except Exception:  # reported above
            continue
    rule = f"{name} must take a batch ({len(x)}, {x.shape[1]}) of tensors or arrays."
    raise InputError(rule, got="; ".join(failures), do="Call it in Python to see where.")


_REPEATS = 1e-9  # largest relative difference between two calls
_ALONE = 1e-5  # between a point in a batch and the same point alone: float32 adds up in another order
_AGREES = 1e-3  # between a Jacobian and differences, as a share of the largest derivative


@dataclass(frozen=True)
class FunctionCheck:
    """The result of `check_function`."""

    outputs: int  # K
    way: str  # how the Jacobian is computed
    disagreement: float | None  # largest difference from finite differences over the largest derivative, if compared
    non_smooth: float  # fraction of the points where the function is not smooth within the step
    point: str | None  # one of these points
    calls: int = 0  # evaluations in the check
    values: Float[Tensor, "sample out"] | None = None  # at the points
    jacobians: Float[Tensor, "sample out input"] | None = None  # at the points, unless computed by differences

    def plain(self) -> dict[str, Any]:
        """Return the check as plain values, for a result."""
        names = {"non_smooth": "bent", "point": "place"}  # names in results of version 0.1
        plain = {names.get(name, name): value for name, value in vars(self).items()}
        return {name: value for name, value in plain.items() if name not in ("values", "jacobians")}


def check_function(function: Function, x: Float[Tensor, "sample input"], *, derivatives: bool = True) -> FunctionCheck:
    """Check a function at some points, before training."""
    y = function.values(x)
    largest = y.abs().amax(0).clamp_min(torch.finfo(torch.float64).tiny)
    again = ((function.values(x) - y).abs() / largest).max()
    if again > _REPEATS:
        rule = f"{function.name} must return the same values for the same points."
        do = "Fix its random numbers (a seed set inside the function), or pass data as npz:FILE."
        raise InputError(rule, got=f"two calls that differ by {float(again):.2g} of the largest value", do=do)
    alone = ((torch.cat([function.values(each[None]) for each in x[:4]]) - y[:4]).abs() / largest).max()
    if alone > _ALONE:
        rule = f"{function.name} must return for each point of a batch what it returns for the point alone."
        do = "If it takes one point at a time, wrap it: lambda x: np.stack([f(each) for each in x])."
        raise InputError(rule, got=f"a difference of {float(alone):.2g} of the largest value", do=do)
    if not derivatives:
        return FunctionCheck(y.shape[1], "none", None, 0.0, None, values=y)
    return _with_derivatives(function, x, y)


def _with_derivatives(function: Function, x: Tensor, y: Tensor) -> FunctionCheck:
    """Check that the function is smooth and that the Jacobian is its derivative."""
    estimate, non_smooth = function.by_differences(x)
    share = float(non_smooth.double().mean())
    worst = format_point(x[int(non_smooth.int().argmax())]) if share else None
    if function.way == "differences":
        return FunctionCheck(y.shape[1], function.way, None, share, worst, values=y)
    j = function.jacobian(x)
    if j.shape != estimate.shape:
        rule = f"The Jacobian of {function.name} must have the shape {tuple(estimate.shape)}."
        raise InputError(rule, got=f"shape {tuple(j.shape)}", do="The order is batch, outputs, inputs.")
    comparisons = [_compared(function, y, j, estimate, non_smooth)]
    if function.step is not None:  # a long step is inexact where the function curves, a short one where it is noisy
        comparisons.append(_compared(function, y, j, *function.by_differences(x, function.precision ** (1 / 3))))
    known = [each for each in comparisons if each is not None]
    if not known:
        return FunctionCheck(y.shape[1], function.way, None, share, worst, values=y, jacobians=j)
    estimate, beyond, off = min(known, key=lambda each: float(each[1].max()))
    if float(beyond.max()) > _AGREES:
        n, k, i = (int(each) for each in torch.unravel_index(beyond.argmax(), beyond.shape))
        raise InputError(
            f"The Jacobian of {function.name} ({function.way}) must agree with differences of its values.",
            got=f"a largest disagreement at ∂y{k}/∂x{i}, x = {format_point(x[n])}: {float(j[n, k, i]):.6g}, and "
            f"{float(estimate[n, k, i]):.6g} by differences",
            do="Correct the Jacobian, or use --jacobian differences; where the values are noisy, use a longer --step.",
        )
    return FunctionCheck(y.shape[1], function.way, off, share, worst, values=y, jacobians=j)


def _compared(
    function: Function, y: Tensor, j: Tensor, estimate: Tensor, non_smooth: Tensor
) -> tuple[Tensor, Tensor, float] | None:
    """Return differences, the relative deviations of the Jacobian from them beyond rounding, and the largest with it.

    The result is None if the function is not smooth at the step for more than half of the points.
    """
    if float(non_smooth.double().mean()) > 0.5:
        return None
    largest = (estimate.abs() * function.units)[~non_smooth].amax((0, 2)).clamp_min(1e-300)[:, None]  # of each output
    rounding = 8 * function.precision ** (2 / 3) * y.abs().amax(0)[:, None]
    off = (j - estimate).abs() * function.units
    beyond = (off - rounding) / largest
    beyond[non_smooth] = 0.0  # differences are meaningless there
    return estimate, beyond, float((off / largest)[~non_smooth].max())


LOW = (0.05, 100.0, 63_070.0, 990.0, 63.1, 700.0, 1120.0, 9855.0)
HIGH = (0.15, 50_000.0, 115_600.0, 1110.0, 116.0, 820.0, 1680.0, 12_045.0)


def flow(x: Float[Tensor, "sample 8"]) -> Float[Tensor, "sample 1"]:
    """Flow through a borehole in m³/a, for r_w, r (m), T_u (m²/a), H_u (m), T_l (m²/a), H_l, L (m) and K_w (m/a).

    Q = 2π T_u (H_u − H_l) / (λ (1 + 2 L T_u/(λ r_w² K_w) + T_u/T_l)), λ = ln(r/r_w). Almost monotonic.

    References:
        Harper & Gupta 1983, BMI/ONWI-516; Morris, Mitchell & Ylvisaker 1993, Technometrics 35(3) (the ranges).
    """
    well, reach, upper, head, lower, below, length, conductivity = x.unbind(1)
    depth = torch.log(reach / well)
    resistance = 1 + 2 * length * upper / (depth * well**2 * conductivity) + upper / lower
    return (2 * math.pi * upper * (head - below) / (depth * resistance))[:, None]


def ishigami(x: Float[Tensor, "sample 3"]) -> Float[Tensor, "sample 1"]:
    """The Ishigami function sin x₁ + 7 sin² x₂ + 0.1 x₃⁴ sin x₁, angles in [−π, π], without units.

    References:
        Ishigami & Homma 1990; Crestaux, Le Maître & Martinez 2009 (the factors).
    """
    first, second, third = x.unbind(1)
    return (torch.sin(first) * (1 + 0.1 * third**4) + 7 * torch.sin(second).square())[:, None]


flow.low, flow.high = LOW, HIGH  # type: ignore[attr-defined]
ishigami.low, ishigami.high = (-math.pi,) * 3, (math.pi,) * 3  # type: ignore[attr-defined]

EXAMPLES: dict[str, Callable[[Tensor], Tensor]] = {"borehole": flow, "ishigami": ishigami}
"""The functions by name."""
