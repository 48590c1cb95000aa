"""Samples of a function: checked, standardized and weighted."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from jacmatch.errors import InputError
from jacmatch.surrogates.perceptron import Cotangents, Inputs, Values
from jacmatch.surrogates.solver import Standardized

_NEIGHBORS = 3
_DISAGREES = 0.7  # median error of the change between neighbors, as a share of the median change
_AROUND = 8  # neighbors that judge the partials of one sample
_OUTLIER = 4.5  # error of a sample's partials over that of its neighbors' median; 4 of 170 correct sets had more
_CLOSE = 100  # samples above which eight neighbors are near enough
_FACTORS = (-0.5, 3.0)  # of the partials of an input, beyond which they are called wrong; correct: -0.4 to 1.6
_FAR_AWAY = 1e8  # distance of a value from the median, over the median distance
_ENOUGH = 20  # samples
_RANGE = (1e-100, 1e100)  # of standard deviations and standardized partials
_MANY = 500  # samples from which on noise makes minibatches the better choice

Jacobian = Float[ndarray, "sample out input"]


class DataWarning(UserWarning):
    """Warning that samples look wrong, although they can be used."""


@dataclass(frozen=True, eq=False)
class Scaler:
    """Means and scales of inputs and outputs: standardized = (raw − mean) / scale."""

    x_mean: Float[ndarray, "input"]  # of each input
    x_scale: Float[ndarray, "input"]  # standard deviation of each input, 1 where it never varies
    y_mean: Float[ndarray, "out"]  # of each output
    y_scale: Float[ndarray, "out"]  # standard deviation of each output, 1 where it never varies

    @property
    def zero(self) -> Float[ndarray, "out"]:
        """The raw 0 of each output in standardized units."""
        return np.asarray(-self.y_mean / self.y_scale)

    def inputs(self, x: Inputs) -> Inputs:
        """Return standardized inputs."""
        return np.asarray((x - self.x_mean) / self.x_scale)

    def outputs(self, y: Values) -> Values:
        """Return raw outputs of standardized ones."""
        return np.asarray(self.y_mean + y * self.y_scale)

    def jacobian(self, j: Jacobian) -> Jacobian:
        """Return the raw Jacobian of a standardized one."""
        return np.asarray(j * self.y_scale[:, None] / self.x_scale)


def check_jacobian(
    jacobian: Any, shape: tuple[int, ...], of: str = "outputs", name: str = "`jacobian` of `fit`"
) -> Jacobian:
    """Return partials of the shape, or (N, K·D) with those of the first output first, as (N, K, D); NaN if unknown."""
    try:
        if np.iscomplexobj(jacobian):
            raise TypeError("complex numbers")
        given = np.asarray(jacobian, dtype=np.float64)
    except (TypeError, ValueError) as error:
        rule = f"{name} must be an array of floats."
        raise InputError(rule, got=type(jacobian).__name__, do="Use NaN for unknown partials.") from error
    samples, inputs = shape[0], shape[-1]
    if given.shape not in (shape, (samples, int(np.prod(shape[1:])))):
        rule = f"{name} must have the shape {shape}: samples, {of}, inputs."
        raise InputError(rule, got=f"shape {given.shape}", do="A table (N, K·D) has the partials of output 0 first.")
    given = given.reshape(samples, int(np.prod(shape[1:-1])), inputs)
    bad = np.isinf(given).any((1, 2))
    if bad.any():
        rule = f"{name} must be finite, or NaN for an unknown partial."
        raise InputError(rule, got=f"infinity in {int(bad.sum())} of {samples} rows, first in row {int(bad.argmax())}")
    return given


def check_cotangents(cotangents: Any, samples: int, output: tuple[int, ...], name: str = "`cotangents`") -> Cotangents:
    """Return cotangents (N, P, *output) as an array (N, P, K)."""
    try:
        given = np.asarray(cotangents, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be an array of floats.", got=type(cotangents).__name__) from error
    if given.ndim != 2 + len(output) or given.shape[0] != samples or given.shape[2:] != output or not given.shape[1]:
        axes = ", ".join(map(str, (samples, "P", *output)))
        rule = f"{name} must have the shape ({axes}): samples, projections, axes of the output."
        raise InputError(rule, got=f"shape {given.shape}")
    if not np.isfinite(given).all():
        do = "Where a projection is not known, set it to NaN in `jacobian` (in a file: `j_train`)."
        raise InputError(f"{name} must be finite.", got="NaN or infinity", do=do)
    return given.reshape(samples, given.shape[1], -1)


def shared_scale(values: Values, output: tuple[int, ...]) -> Float[ndarray, "out"]:
    """Return one scale for all entries of a field, or for those of each k of (K, H, W): the RMS standard deviation."""
    parts = values.reshape(len(values), output[0] if len(output) > 2 else 1, -1)
    scale = np.sqrt(parts.var(0).mean(1))
    scale[scale <= 1e-14 * np.abs(parts).max((0, 2), initial=0.0)] = 1.0
    return np.repeat(scale, parts.shape[2])


def standardize(
    x: Inputs,
    y: Values,
    jacobian: Float[ndarray, "sample row input"] | None = None,
    *,
    sample_weight: Any = None,
    output_weights: Any = None,
    partial_weights: Any = None,
    jacobian_weight: float | str = "auto",
    x_scale: Float[ndarray, "input"] | None = None,
    y_scale: Float[ndarray, "out"] | None = None,
    cotangents: Cotangents | None = None,
) -> tuple[Standardized, Scaler]:
    """Return samples in standardized units, and the scaler; the arguments are those of `JacobianRegressor`.

    The error of a projection is divided by its unit ‖u t‖/‖u‖, for units t of the outputs.
    """
    n, k, d = len(x), y.shape[1], x.shape[1]
    weight = _weights("sample_weight", 1.0 if sample_weight is None else sample_weight, (n,))
    some = weight > 0
    scaler = Scaler(
        np.average(x, axis=0, weights=weight),
        _deviation(x[some]) if x_scale is None else np.asarray(x_scale, np.float64),
        np.average(y, axis=0, weights=weight),
        _deviation(y[some]) if y_scale is None else np.asarray(y_scale, np.float64),
    )
    _check_range("standard deviation of an input", scaler.x_scale)
    _check_range("standard deviation of an output", scaler.y_scale)
    of_output = _weights("output_weights", 1.0 if output_weights is None else output_weights, (k,))
    y_weights = weight[:, None] * of_output
    scaled = (y - scaler.y_mean) / scaler.y_scale
    t = t_weights = u = None
    if jacobian is not None:
        known = ~np.isnan(jacobian)
        unit, squares = scaler.y_scale[:, None], np.ones(())
        if cotangents is None:
            of_partial = _weights("partial_weights", 1.0 if partial_weights is None else partial_weights, (n, k, d))
            w = y_weights[:, :, None] * of_partial * known
        else:
            squares = np.einsum("npk,npk->np", cotangents, cotangents)[:, :, None]
            u = cotangents * scaler.y_scale
            unit = np.sqrt(np.einsum("npk,npk->np", u, u)[:, :, None] / np.where(squares > 0, squares, 1.0))
            unit[squares == 0] = 1.0
            u /= unit
            w = weight[:, None, None] * (known & (squares > 0))
        if w.any():
            w = w * d / (w * squares).sum()
            j = np.where(known, jacobian, 0.0) * scaler.x_scale / unit
            _check_range("largest partial of an output in standardized units", np.abs(j).max(initial=0.0) or 1.0)
            size = float((w * j * j).sum())
            factor = 1 / size if jacobian_weight == "auto" and size > 0 else jacobian_weight
            factor = 1.0 if factor == "auto" else float(factor)
            t, t_weights = j.transpose(2, 0, 1).copy(), factor * w.transpose(2, 0, 1)
            if not factor:
                t = t_weights = None
    u = None if t is None else u
    return Standardized(scaler.inputs(x), scaled, t, y_weights / y_weights.sum(), t_weights, u), scaler


def _check_range(name: str, given: Any) -> None:
    """Refuse numbers whose squares or quotients would be zeros or infinities."""
    bad = ~((np.ravel(given) > _RANGE[0]) & (np.ravel(given) < _RANGE[1]))
    if bad.any():
        rule = f"The {name} of a surrogate must be between {_RANGE[0]:g} and {_RANGE[1]:g}."
        raise InputError(rule, got=f"{np.ravel(given)[bad][0]:.2g}", do="Choose other units, and look for wrong rows.")


def _deviation(columns: Float[ndarray, "sample column"]) -> Float[ndarray, "column"]:
    """Return standard deviations, 1 where a column never varies beyond rounding."""
    largest = np.abs(columns).max(0, initial=0.0)
    share = (columns / np.where(largest > 0, largest, 1.0)).std(0)
    return np.asarray(np.where(share > 1e-14, share * largest, 1.0))


def _weights(name: str, given: Any, shape: tuple[int, ...]) -> ndarray:
    """Return weights broadcast to the shape."""
    rule = f"`{name}` of `JacobianRegressor` must be finite, at least 0, and not all 0"
    try:
        weights = np.broadcast_to(np.asarray(given, dtype=np.float64), shape)
    except ValueError as error:
        got = f"shape {np.shape(given)}"
        raise InputError(f"{rule}, and fit the shape {shape}.", got=got) from error
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise InputError(f"{rule}.", got="NaN, infinity, a negative weight or zeros")
    return weights


def suspicious(x: Inputs, y: Values, jacobian: Jacobian | None, *, field: bool = False) -> list[str]:
    """Return one line for each problem of the samples; constant outputs are usual in a field."""
    lines = ["a single sample: the prediction is constant, or linear if its partials are known."] if len(x) == 1 else []
    for name, columns in (("input", x), ("output", y))[: 1 if field else 2]:
        still = np.flatnonzero(np.ptp(columns, axis=0) == 0)
        if len(still) and len(x) > 1:
            numbers = ", ".join(map(str, still[:8]))
            lines.append(f"{name} {numbers} never varies in these {len(x)} samples: leave it out.")
    off = np.abs(y - np.median(y, 0))
    row, output = divmod(int((off / np.maximum(np.median(off, 0), 1e-300)).argmax()), y.shape[1])
    if off[row, output] > _FAR_AWAY * (usual := np.median(off[:, output])) > 0:
        lines.append(
            f"output {output} in row {row} is {off[row, output] / usual:.0e} times as far from the median as usual."
        )
    known = None if jacobian is None or np.isnan(jacobian).any() else jacobian.reshape(len(x), -1)
    return lines + _contradictions(x, y if known is None else np.hstack([y, known])) + _disagreement(x, y, jacobian)


def is_noisy(x: Inputs, y: Values, jacobian: Jacobian | None) -> bool:
    """Return whether the partials of many samples miss most of the change between neighbors, as for noisy values."""
    if jacobian is None:
        return False
    rows = ~np.isnan(jacobian).any((1, 2))
    pairs = _pairs(x[rows], y[rows], jacobian[rows]) if rows.sum() >= _MANY else None
    return pairs is not None and bool((_missed(*pairs)[0] > _DISAGREES).any())


def _contradictions(x: Inputs, y: Values) -> list[str]:
    """Return a line about samples with equal inputs and different outputs or partials."""
    _, groups, counts = np.unique(x, axis=0, return_inverse=True, return_counts=True)
    if (counts < 2).all():
        return []
    groups = groups.reshape(-1)
    high, low = (np.full((len(counts), y.shape[1]), sign * np.inf) for sign in (-1, 1))
    np.maximum.at(high, groups, y)
    np.minimum.at(low, groups, y)
    far = ((high - low) / _deviation(y)).max(1)
    worst = int(far.argmax())
    if far[worst] < 1e-6:
        return []
    rows = ", ".join(map(str, np.flatnonzero(groups == worst)[:4]))
    number = int((far >= 1e-6).sum())
    return [
        f"{number} input(s) occur more than once with different outputs or partials; the largest difference, "
        f"{far[worst]:.2g} standard deviations, is in rows {rows}. They are averaged."
    ]


def _missed(j: Jacobian, near: ndarray, step: ndarray, change: ndarray) -> tuple[ndarray, ndarray]:
    """Return how much of the change between neighbors the partials do not explain, as a share of the median change.

    The median (K,), and for each sample the least (N, K). The change is the mean of both Jacobians times the step, up
    to third order.
    """
    near, step, change = near[:, :_NEIGHBORS], step[:, :_NEIGHBORS], change[:, :_NEIGHBORS]
    off = np.abs(change - np.einsum("nmkd,nmd->nmk", 0.5 * (j[near] + j[:, None]), step))
    typical = np.maximum(np.median(np.abs(change), (0, 1)), 1e-9)
    return np.median(off, (0, 1)) / typical, off.min(1) / typical


def _pairs(
    x: Inputs, y: Values, jacobian: Jacobian
) -> tuple[Jacobian, Int[ndarray, "sample neighbor"], ndarray, ndarray] | None:
    """Return standardized partials, the nearest neighbors, and the steps and changes of the values to them."""
    if not _ENOUGH <= len(x) <= 5000:
        return None
    from sklearn.neighbors import NearestNeighbors

    z, values = x / _deviation(x), y / _deviation(y)
    near = NearestNeighbors(n_neighbors=_AROUND + 1).fit(z).kneighbors(z, return_distance=False)[:, 1:]
    scaled = jacobian * _deviation(x) / _deviation(y)[:, None]
    return scaled, near, z[near] - z[:, None], values[near] - values[:, None]


def _outlying(j: Jacobian, near: ndarray, step: ndarray, change: ndarray) -> Float[ndarray, "sample out"]:
    """Return how much worse a sample's partials explain the changes to its neighbors than their median partials do."""

    def error(own: Jacobian) -> Float[ndarray, "sample out"]:
        off = change - np.einsum("nmkd,nmd->nmk", 0.5 * (j[near] + own[:, None]), step)
        return np.asarray(np.sqrt((off**2).mean(1)))

    least = 0.05 * np.sqrt((change**2).mean((0, 1))) + 1e-9
    return np.asarray(error(j) / (error(np.median(j[near], 1)) + least))


def _wrong_units(j: Jacobian, near: ndarray, step: ndarray, change: ndarray) -> str | None:
    """Return a line about inputs whose partials would explain the changes better if multiplied by a factor."""
    parts = 0.5 * (j[near] + j[:, None]) * step[:, :, None]
    for k in range(j.shape[1]):
        columns, values = parts[:, :, k].reshape(-1, j.shape[2]), change[:, :, k].ravel()
        inverse = np.linalg.pinv(columns.T @ columns)
        factors = inverse @ columns.T @ values
        errors = np.sqrt(_AROUND * np.maximum(np.diag(inverse), 0) * (values - columns @ factors).var())
        beyond = np.maximum(factors - _FACTORS[1], _FACTORS[0] - factors) - 5 * errors
        if (wrong := np.flatnonzero(beyond > 0)[:8]).size:
            inputs, times = ", ".join(map(str, wrong)), ", ".join(f"{factors[i]:.2g}" for i in wrong)
            return (
                f"the partials of output {k} with respect to input {inputs} would agree best with the changes between "
                f"neighboring samples if they were {times} times as large: check their units, signs and order."
            )
    return None


def _disagreement(x: Inputs, y: Values, jacobian: Jacobian | None) -> list[str]:
    """Return a line about partials that do not explain how the values change between neighbors, where all are known."""
    if jacobian is None:
        return []
    rows = np.flatnonzero(~np.isnan(jacobian).any((1, 2)))
    pairs = _pairs(x[rows], y[rows], jacobian[rows])
    if pairs is None:
        return []
    if (wrong := _wrong_units(*pairs)) is not None:
        return [wrong]
    usual, share = _missed(*pairs)
    if (usual > _DISAGREES).any():
        output = int(usual.argmax())
        return [
            f"the partials of output {output} do not explain how it changes between neighboring samples, the least "
            f"in row {int(rows[share[:, output].argmax()])}: check their units, signs and order (samples, outputs, "
            "inputs), unless the values are noisy."
        ]
    ratios = _outlying(*pairs)
    row, output = divmod(int(ratios.argmax()), ratios.shape[1])
    if len(rows) < _CLOSE or ratios[row, output] <= _OUTLIER:
        return []
    return [
        f"the partials of output {output} in row {int(rows[row])} disagree with the values of its neighbors "
        f"{ratios[row, output]:.1f} times as much as usual: the largest disagreement of all."
    ]
