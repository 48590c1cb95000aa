"""A Gaussian process conditioned on values and partials: a model for few samples, and a teacher of networks.

The prior is a constant plus a process with the squared exponential kernel k = exp(−½ Σ uᵢ²), uᵢ = (xᵢ − xᵢ′)/ℓᵢ. Its
derivatives have closed covariances: cov(f, ℓᵢ ∂ᵢ′f) = k uᵢ and cov(ℓᵢ ∂ᵢf, ℓⱼ ∂ⱼ′f) = k (δᵢⱼ − uᵢ uⱼ). Length scales
and noise maximize the marginal likelihood, whose gradient is explicit; the constant and the variance of each output are
profiled.

It is implemented here because GPyTorch's kernel with gradients supports neither missing partials nor several outputs,
and SMT needs minutes to predict the derivatives at 1,000 points.

References:
    Rasmussen & Williams 2006, sections 2.7, 5.4.1 and 9.4.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy import linalg
from scipy.optimize import minimize
from scipy.stats import qmc

from jacmatch.surrogates.perceptron import Inputs, Values
from jacmatch.surrogates.solver import Standardized

LARGEST = 6000
"""Most values and partials of one output that are conditioned on."""
QUANTILE_95 = 1.6449
"""Of a standard normal variable: half of a 90 % interval in standard deviations."""
_LEFT_OUT = 600  # entries of the samples that are left out to calibrate standard deviations
_SEARCHED = 500  # most values and partials in the search for length scales
_EVALUATIONS = 60
_NOISE = (1e-10, 1.0)  # variance of the noise, as a share of that of the process and of its scaled partials
_LENGTHS = (1e-2, 1e3)
_CHUNK = 2**22  # entries of a covariance with new points
_FREE = 2400  # values and partials of one output at the points where a network learns from a process


@dataclass(frozen=True, eq=False)
class _Observed:
    """The values and partials that are known of outputs with the same pattern.

    Attributes:
        x: Inputs.
        index: Which of the (1 + D) N entries, values first, are known.
        z: Known entries of each output, (M, K); partials not yet scaled.
        axis: Of each entry, 0 for a value and 1 + i for a partial by input i.
    """

    x: Inputs
    index: ndarray
    z: ndarray
    axis: ndarray


def _observed(data: Standardized, outputs: ndarray) -> _Observed:
    n, d = data.x.shape
    entries, known = [data.y[:, outputs]], [np.ones(n, bool)]
    if data.t is not None and data.t_weights is not None:
        for i in range(d):
            entries.append(data.t[i][:, outputs])
            known.append(data.t_weights[i][:, outputs[0]] > 0)
    axis = np.repeat(np.arange(len(entries)), n)
    index = np.flatnonzero(np.concatenate(known))
    return _Observed(data.x, index, np.concatenate(entries)[index], axis[index])


def patterns(data: Standardized) -> list[ndarray]:
    """Return groups of outputs whose partials are known at the same samples."""
    if data.t_weights is None:
        return [np.arange(data.y.shape[1])]
    known = data.t_weights > 0
    groups: dict[bytes, list[int]] = {}
    for output in range(data.y.shape[1]):
        groups.setdefault(known[:, :, output].tobytes(), []).append(output)
    return [np.array(group) for group in groups.values()]


def _blocks(
    a: ndarray, b: ndarray, lengths: ndarray, *, partials: tuple[bool, bool]
) -> tuple[ndarray, ndarray, ndarray]:
    """Return the covariance of values and scaled partials at a with those at b, and u and k."""
    d = len(lengths)
    u = ((a[:, None] - b[None]) / lengths).transpose(2, 0, 1)
    k = np.exp(-0.5 * (u * u).sum(0))
    rows, columns = (1 + d if each else 1 for each in partials)
    full = np.empty((rows, len(a), columns, len(b)))
    full[0, :, 0] = k
    ku = k * u
    if partials[1]:
        full[0, :, 1:] = ku.transpose(1, 0, 2)
    if partials[0]:
        full[1:, :, 0] = -ku
    if all(partials):
        for i in range(d):
            for j in range(i, d):
                full[1 + i, :, 1 + j] = full[1 + j, :, 1 + i] = -ku[i] * u[j]
            full[1 + i, :, 1 + i] += k
    return full.reshape(rows * len(a), columns * len(b)), u, k


def _likelihood(parameters: ndarray, observed: _Observed) -> tuple[float, ndarray]:
    """Return the negative logarithm of the marginal likelihood, and its gradient.

    Args:
        parameters: Logarithms of D length scales, then of the noise of values and of scaled partials.
        observed: What is known.
    """
    d = observed.x.shape[1]
    lengths, noise = np.exp(parameters[:d]), np.exp(parameters[d:])
    index, axis = observed.index, observed.axis
    with_partials = bool((axis > 0).any())
    full, u, k = _blocks(observed.x, observed.x, lengths, partials=(with_partials, with_partials))
    covariance = full[np.ix_(index, index)]
    covariance[np.diag_indices(len(index))] += np.where(axis > 0, noise[1], noise[0])
    z = observed.z * np.concatenate([[1.0], lengths])[axis][:, None]
    try:
        factor = linalg.cholesky(covariance, lower=True, check_finite=False)
    except linalg.LinAlgError:
        return 1e12, np.zeros_like(parameters)
    inverse, _ = linalg.lapack.dpotri(factor, lower=1)
    inverse = np.tril(inverse) + np.tril(inverse, -1).T
    h = (axis == 0).astype(np.float64)
    ih = inverse @ h
    mean = (ih @ z) / (h @ ih)
    r = z - h[:, None] * mean
    alpha = inverse @ r
    quadratic = np.maximum((r * alpha).sum(0), 1e-300)
    m, outputs = z.shape
    counts = np.bincount(axis, minlength=1 + d)[1:]
    value = 0.5 * float((m * np.log(quadratic / m)).sum()) + outputs * float(np.log(np.diag(factor)).sum())
    value -= outputs * float(counts @ parameters[:d])
    # d value = ½ Σ weights · dK, and what the scaled partials add
    share = m / quadratic
    weights = outputs * inverse - (alpha * share) @ alpha.T
    gradient = np.empty_like(parameters)
    flat = np.zeros((full.shape[0], full.shape[1]))
    flat[np.ix_(index, index)] = weights
    rows = 1 + d if with_partials else 1
    n = len(observed.x)
    spread = flat.reshape(rows, n, rows, n)
    total = (spread * full.reshape(rows, n, rows, n)).sum((0, 2))
    for i in range(d):
        change = float((total * u[i] ** 2).sum())
        if with_partials:
            own = full.reshape(rows, n, rows, n)
            # the factor uᵢ of each entry of row or column i changes by −uᵢ; δᵢᵢ k does not
            change -= float((spread[1 + i] * own[1 + i]).sum()) + float((spread[:, :, 1 + i] * own[:, :, 1 + i]).sum())
            change += 2 * float((spread[1 + i, :, 1 + i] * k).sum())
        added = (share * (z * alpha)[axis == 1 + i]).sum()
        gradient[i] = 0.5 * change + float(added) - outputs * counts[i]
    diagonal = np.diag(weights)
    gradient[d] = 0.5 * noise[0] * diagonal[axis == 0].sum()
    gradient[d + 1] = 0.5 * noise[1] * diagonal[axis > 0].sum()
    return value, gradient


@dataclass(frozen=True, eq=False)
class _Conditioned:
    """Outputs with the same pattern, conditioned on what is known of them."""

    outputs: ndarray
    observed: _Observed
    lengths: ndarray
    factor: ndarray
    alpha: ndarray
    mean: ndarray
    variance: ndarray


@dataclass(frozen=True, eq=False)
class GaussianProcess:
    """Outputs conditioned on values and partials, in standardized units.

    Example:
        >>> x = np.linspace(-1, 1, 5)[:, None]
        >>> weights = np.full((5, 1), 0.2)
        >>> gp = fit_gaussian_process(Standardized(x, np.sin(2 * x), 2 * np.cos(2 * x)[None], weights, weights[None]))
        >>> y, j, std = gp(np.array([[0.3]]), jacobian=True, std=True)
        >>> bool(abs(y[0, 0] - np.sin(0.6)) < 1e-3)
        True
    """

    groups: tuple[_Conditioned, ...]
    parameters: tuple[ndarray, ...]

    def __call__(
        self, x: Inputs, *, jacobian: bool = True, std: bool = False
    ) -> tuple[Values, Float[ndarray, "sample out input"] | None, Values | None]:
        """Return means of the values and, if wanted, of the Jacobian, and standard deviations of the values."""
        outputs = sum(len(group.outputs) for group in self.groups)
        n, d = x.shape
        y = np.empty((n, outputs))
        j = np.empty((n, outputs, d)) if jacobian else None
        deviation = np.empty((n, outputs)) if std else None
        for group in self.groups:
            rows = max(1, _CHUNK // ((1 + d) * len(group.observed.index) * (1 + d)))
            for start in range(0, n, rows):
                part = slice(start, start + rows)
                views = (None if each is None else each[part] for each in (j, deviation))
                self._predict(group, x[part], y[part], *views)
        return y, j, deviation

    def _predict(
        self, group: _Conditioned, x: Inputs, y: ndarray, j: ndarray | None, deviation: ndarray | None
    ) -> None:
        observed, outputs = group.observed, group.outputs
        with_partials = bool((observed.axis > 0).any())
        full, _, _ = _blocks(x, observed.x, group.lengths, partials=(j is not None, with_partials))
        cross = full[:, observed.index]
        means = cross @ group.alpha
        n, d = x.shape
        y[:, outputs] = means[:n] + group.mean
        if j is not None:
            partials = means[n:].reshape(d, n, len(outputs)) / group.lengths[:, None, None]
            j[:, outputs] = partials.transpose(1, 2, 0)
        if deviation is not None:
            h = (observed.axis == 0).astype(np.float64)
            solved = linalg.solve_triangular(group.factor, cross[:n].T, lower=True, check_finite=False)
            of_h = linalg.solve_triangular(group.factor, h, lower=True, check_finite=False)
            left = np.maximum(1 - (solved**2).sum(0), 0) + (1 - of_h @ solved) ** 2 / (of_h @ of_h)
            deviation[:, outputs] = np.sqrt(left[:, None] * group.variance)


def fit_gaussian_process(data: Standardized, *, seed: int = 0, parameters: tuple[ndarray, ...] = ()) -> GaussianProcess:
    """Return the process with the most likely length scales and noise.

    They are searched on at most `_SEARCHED` values and partials, drawn at random, of all outputs of a pattern together.

    Args:
        data: The samples, in standardized units.
        seed: Of the draw.
        parameters: Those of a process before; they are not searched then.
    """
    groups, searched = [], []
    d = data.x.shape[1]
    for number, outputs in enumerate(patterns(data)):
        if parameters:
            best = parameters[number]
        else:
            observed = _observed(data, outputs)
            count = max(8, int(len(data) * _SEARCHED / max(len(observed.index), 1)))
            if count < len(data):
                observed = _observed(data.rows(np.random.default_rng(seed).permutation(len(data))[:count]), outputs)
            bounds = [tuple(np.log(_LENGTHS))] * d + [tuple(np.log(_NOISE))] * 2
            results = []
            for length in (1.0, 4.0):
                start = np.r_[np.full(d, np.log(length * np.sqrt(d) / 2 + 0.5)), np.log(1e-6), np.log(1e-6)]
                options = {"maxfun": _EVALUATIONS, "maxiter": _EVALUATIONS}
                results.append(
                    minimize(_likelihood, start, (observed,), "L-BFGS-B", jac=True, bounds=bounds, options=options)
                )
            best = min(results, key=lambda result: float(result.fun)).x
        searched.append(best)
        groups.append(_condition(_observed(data, outputs), outputs, best))
    return GaussianProcess(tuple(groups), tuple(searched))


def _condition(observed: _Observed, outputs: ndarray, parameters: ndarray) -> _Conditioned:
    d = observed.x.shape[1]
    lengths, noise = np.exp(parameters[:d]), np.exp(parameters[d:])
    with_partials = bool((observed.axis > 0).any())
    full, _, _ = _blocks(observed.x, observed.x, lengths, partials=(with_partials, with_partials))
    covariance = full[np.ix_(observed.index, observed.index)]
    while True:
        covariance[np.diag_indices(len(covariance))] += np.where(observed.axis > 0, noise[1], noise[0])
        try:
            factor = linalg.cholesky(covariance, lower=True, check_finite=False)
            break
        except linalg.LinAlgError:
            noise = 10 * noise
    z = observed.z * np.concatenate([[1.0], lengths])[observed.axis][:, None]
    h = (observed.axis == 0).astype(np.float64)
    ih = linalg.cho_solve((factor, True), h, check_finite=False)
    mean = (ih @ z) / (h @ ih)
    r = z - h[:, None] * mean
    alpha = linalg.cho_solve((factor, True), r, check_finite=False)
    variance = (r * alpha).sum(0) / len(z)
    variance *= _calibration(observed, factor, alpha, variance) ** 2
    return _Conditioned(outputs, observed, lengths, factor, alpha, mean, variance)


def _calibration(observed: _Observed, factor: ndarray, alpha: ndarray, variance: ndarray) -> ndarray:
    """Return what makes standard deviations such that 90 % of the samples, each left out, lie in their 90 % interval.

    A sample is left out with all its partials. Its residual and variance follow from its block of the inverse. That
    variance includes the noise, which a value at a new point has not, so the factor is at least 1.
    """
    n, d = observed.x.shape
    sample, ratios = observed.index % n, []
    for each in np.random.default_rng(0).permutation(n)[: max(10, _LEFT_OUT // (1 + d))]:
        block = np.flatnonzero(sample == each)
        unit = np.zeros((len(sample), len(block)))
        unit[block, np.arange(len(block))] = 1
        solved = linalg.solve_triangular(factor, unit, lower=True, check_finite=False)
        covariance = linalg.pinvh(solved.T @ solved)
        ratios.append(np.abs(covariance[0] @ alpha[block]) / np.sqrt(np.maximum(covariance[0, 0] * variance, 1e-300)))
    return np.asarray(np.maximum(np.quantile(ratios, 0.9, axis=0) / QUANTILE_95, 1.0))


def conditions_on(data: Standardized) -> int:
    """Return how many values and partials of one output are known, at most."""
    known: Bool[ndarray, "..."] | None = None if data.t_weights is None else data.t_weights > 0
    return len(data) + (0 if known is None else int(known.sum((0, 1)).max()))


def held_out_loss(data: Standardized, seed: int) -> float | None:
    """Return the loss on the samples that `Standardized.split` holds out; None if there are too few or too many."""
    parts = data.split(seed)
    if parts is None or conditions_on(data) > LARGEST:
        return None
    y, j, _ = fit_gaussian_process(parts[1], seed=seed)(parts[0].x, jacobian=data.t is not None)
    return parts[0].loss_of(y, None if j is None else j.transpose(2, 0, 1))


def with_free_samples(
    data: Standardized, process: GaussianProcess, seed: int, count: int | None = None
) -> Standardized:
    """Return the samples and, beside them, points of a Sobol sequence in their box where the process is the teacher.

    Args:
        data: The samples.
        process: The process, conditioned on them.
        seed: Of the sequence.
        count: How many points; as many as take `_FREE` values and partials if None.
    """
    d = data.x.shape[1]
    count = max(1, _FREE // (1 + d)) if count is None else count
    low, high = data.x.min(0), data.x.max(0)
    unit = qmc.Sobol(d, seed=seed).random_base2(int(np.ceil(np.log2(max(count, 2)))))[:count]
    x = low + unit * (high - low)
    y, j, _ = process(x, jacobian=True)
    assert j is not None
    return data.joined(x, y, j.transpose(2, 0, 1).copy())
