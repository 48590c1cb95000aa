"""A Gaussian process conditioned on values and partials: a model for few samples, and a teacher of networks.

The prior is a constant plus a process with the kernel k = Π gᵢ(uᵢ), g(u) = (exp(−½ u²) + w)/(1 + w) and uᵢ = (xᵢ −
xᵢ′)/ℓᵢ. With constants wᵢ = 0 it is the squared exponential kernel; with large constants, the process is a sum of
functions of few inputs. Its derivatives have closed covariances: cov(f, ℓᵢ ∂ᵢ′f) = −k aᵢ, cov(ℓᵢ ∂ᵢf, ℓⱼ ∂ⱼ′f) = −k aᵢ
aⱼ for i ≠ j and k bᵢ for i = j, where a = g′/g and b = −g″/g. Length scales, constants and noise maximize the marginal
likelihood, whose gradient is explicit; the mean and the variance of each output are profiled.

References:
    Rasmussen & Williams 2006, sections 2.7, 5.4.1 and 9.4; Duvenaud, Nickisch & Rasmussen 2011, arXiv 1112.4394 (sums).
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy import linalg
from scipy.optimize import minimize
from scipy.stats import qmc

from jacmatch.surrogates.perceptron import Inputs, Values
from jacmatch.surrogates.solver import Fit, Standardized

LARGEST = 6000
"""Maximum number of values and partials of one output."""
INVERTED = 2000
"""Maximum number of these for which the inverse covariance is computed, to find wrong partials."""
EXACT = 1e-8
"""Held-out loss, about 0.01 % of the standard deviation, below which "auto" tries no network beside the process."""
QUANTILE_95 = 1.6449
"""95 % quantile of the standard normal distribution: half the length of a 90 % interval."""
_LEFT_OUT = 600  # entries of the samples that are left out to calibrate standard deviations
_STAGES = ((400, 60), (1000, 12))  # values and partials, and evaluations, of the stages of the search
_CONSTANTS = (1e-4, 1e2)  # the lowest stands for 0
_CACHED = 2**13  # entries of a matrix that stays in the cache
_TINY = 1e-300
_NOISE = (1e-12, 1.0)  # variance of the noise, as a share of that of the process; below, rounding errors grow
_LENGTHS = (1e-2, 1e3)
_CHUNK = 2**22  # entries of a covariance with new points
_FEWEST = 10  # samples among which wrong partials are looked for
_WRONG = 8.0  # residual of a sample over the median: geometric mean of that as it is and in standard deviations
_SMALL = 0.05  # residual over the root mean square of the partials below which it is ignored
_WIDE = 10.0  # ratio of largest and smallest value from which on the logarithm is tried
_COMPARED = 1500  # values and partials on which both are compared
_BETTER = 0.8  # held-out loss with logarithms over that without
_FREE = 2400  # values and partials of one output at the points where a network learns from a process


@dataclass(frozen=True, eq=False)
class _Observed:
    """Known values and partials of outputs with the same pattern."""

    x: Inputs  # inputs
    index: ndarray  # which of the (1 + D) N entries, values first, are known
    z: ndarray  # known entries of each output, (M, K); partials not yet scaled
    axis: ndarray  # of each entry, 0 for a value and 1 + i for a partial by input i


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


@dataclass(frozen=True, eq=False)
class _Factors:
    """The kernel between points, k = Π gᵢ(uᵢ), and what its derivatives need."""

    u: ndarray  # scaled differences (xᵢ − xᵢ′)/ℓᵢ, input first
    share: ndarray  # share ρᵢ of the squared exponential in gᵢ
    k: ndarray  # the kernel
    first: ndarray  # gᵢ′/gᵢ = −uᵢ ρᵢ
    second: ndarray  # −gᵢ″/gᵢ = (1 − uᵢ²) ρᵢ

    def covariance(self, *, partials: tuple[bool, bool]) -> ndarray:
        """Return the covariance of values and, where wanted, scaled partials of rows and columns."""
        d, n, m = self.u.shape
        rows, columns = (1 + d if each else 1 for each in partials)
        full = np.empty((rows, n, columns, m))
        full[0, :, 0] = self.k
        first = self.k * self.first
        if partials[1]:
            full[0, :, 1:] = -first.transpose(1, 0, 2)
        if partials[0]:
            full[1:, :, 0] = first
        if all(partials):
            for i in range(d):
                for j in range(i):
                    full[1 + i, :, 1 + j] = full[1 + j, :, 1 + i] = -first[i] * self.first[j]
                full[1 + i, :, 1 + i] = self.k * self.second[i]
        return full.reshape(rows * n, columns * m)


def _factors(a: ndarray, b: ndarray, lengths: ndarray, constants: ndarray) -> _Factors:
    """Return the kernel between the points a and b."""
    u = ((a[:, None] - b[None]) / lengths).transpose(2, 0, 1)
    w = constants[:, None, None]
    e = np.exp(-0.5 * u * u)
    share = np.divide(e, e + w, out=np.ones_like(e), where=w > 0)
    k = ((e + w) / (1 + w)).prod(0)
    return _Factors(u, share, k, -u * share, (1 - u * u) * share)


def _unpacked(parameters: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """Return length scales, constants and noise: their logarithms are the parameters."""
    d = (len(parameters) - 2) // 2
    whole = np.exp(parameters)
    return whole[:d], whole[d : 2 * d], whole[2 * d :]


def _likelihood(parameters: ndarray, observed: _Observed) -> tuple[float, ndarray]:
    """Return −log marginal likelihood and its gradient w.r.t. log length scales, constants and noise."""
    d, n = observed.x.shape[1], len(observed.x)
    lengths, constants, noise = _unpacked(parameters)
    index, axis = observed.index, observed.axis
    with_partials = bool((axis > 0).any())
    factors = _factors(observed.x, observed.x, lengths, constants)
    full = factors.covariance(partials=(with_partials, with_partials))
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
    flat = np.zeros(full.shape)
    flat[np.ix_(index, index)] = weights
    rows = 1 + d if with_partials else 1
    spread, full = flat.reshape(rows, n, rows, n), full.reshape(rows, n, rows, n)
    total = np.einsum("pnqm,pnqm->nm", spread, full)
    of_constants = np.tensordot(1 - factors.share, total) - constants / (1 + constants) * total.sum()
    gradient = 0.5 * np.r_[np.tensordot(factors.u**2 * factors.share, total), of_constants, 0, 0]
    for i in range(d) if with_partials else ():
        u, rho, g = factors.u[i], factors.share[i], factors.first[i]
        rest, square = rho * (1 - rho), factors.u[i] ** 2
        # of the factor's first and second derivative: by the length scale, by the constant
        changes = (
            (u * (rho - rest * square), 2 * square * rho + (1 - square) * rest * square),
            (u * rest, (square - 1) * rest),
        )
        own = spread[1 + i]
        mixed = own[:, 0] - np.einsum("jnm,njm->nm", factors.first, own[:, 1:]) + g * own[:, 1 + i]
        for which, (first, second) in enumerate(changes):
            change = (factors.k * (2 * first * mixed + second * own[:, 1 + i])).sum()
            gradient[which * d + i] += 0.5 * float(change)
        gradient[i] += float((share * (z * alpha)[axis == 1 + i]).sum()) - outputs * counts[i]
    diagonal = np.diag(weights)
    gradient[2 * d] = 0.5 * noise[0] * diagonal[axis == 0].sum()
    gradient[2 * d + 1] = 0.5 * noise[1] * diagonal[axis > 0].sum()
    return value, gradient


@dataclass(frozen=True, eq=False)
class _Conditioned:
    """Outputs with the same pattern, conditioned on their known values and partials."""

    outputs: ndarray
    observed: _Observed
    lengths: ndarray
    constants: ndarray
    factor: ndarray
    weights: ndarray  # of the covariance with each value and scaled partial, (1 + D, N, K); 0 where it is not known
    mean: ndarray
    variance: ndarray

    def __call__(self, x: Inputs, *, jacobian: bool) -> tuple[Values, Float[ndarray, "sample out input"] | None]:
        """Return means of the values and, if wanted, of the Jacobian."""
        (n, d), k = x.shape, len(self.outputs)
        y, j = np.empty((n, k)), np.empty((n, k, d)) if jacobian else None
        evaluate = self._mixed if self.constants.any() else self._exponential
        rows = max(16, _CACHED // len(self.observed.x))
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            evaluate(x[part], y[part], None if j is None else j[part])
        return y + self.mean, None if j is None else j / self.lengths

    def _exponential(self, x: Inputs, y: Values, j: ndarray | None) -> None:
        """Write Σₙ k (aₙ + u bₙ) and its derivative by matrix products; the constants are 0."""
        a, b = x / self.lengths, self.observed.x / self.lengths
        k = a @ b.T
        k -= 0.5 * (a * a).sum(1)[:, None]
        k -= 0.5 * (b * b).sum(1)
        np.exp(k, out=k)
        for output in range(y.shape[1]):
            of_values, of_partials = self.weights[0, :, output], self.weights[1:, :, output]
            each = a @ of_partials
            each += of_values - (of_partials * b.T).sum(0)
            each *= k
            y[:, output] = each.sum(1)
            if j is not None:
                j[:, output] = each @ b - y[:, output, None] * a + k @ of_partials.T

    def _mixed(self, x: Inputs, y: Values, j: ndarray | None) -> None:
        """Write the same for any constants, factor by factor, in arrays that stay in the cache."""
        (n, d), m = x.shape, len(self.observed.x)
        u, shares, firsts = np.empty((3, d, n, m))
        k, some = np.full((n, m), 1 / (1 + self.constants).prod()), np.empty((n, m))
        a, b = x / self.lengths, self.observed.x / self.lengths
        for i, (w, share) in enumerate(zip(self.constants, shares, strict=True)):
            np.subtract(a[:, i, None], b[:, i], out=u[i])
            np.multiply(u[i], -0.5 * u[i], out=some)
            np.exp(some, out=share)
            np.add(share, w, out=some)
            k *= some
            share /= np.maximum(some, _TINY, out=some)
            np.multiply(u[i], share, out=firsts[i])  # −g′/g
        for output in range(y.shape[1]):
            weights = self.weights[:, :, output]
            each = weights[0] + np.zeros((n, 1))
            for i in range(d):
                each += np.multiply(firsts[i], weights[1 + i], out=some)
            each *= k
            y[:, output] = each.sum(1)
            for i in range(0 if j is None else d):
                np.subtract(firsts[i], u[i], out=some)
                some *= firsts[i]
                some += shares[i]  # (g′² − g g″)/g²
                some *= k
                j[:, output, i] = some @ weights[1 + i] - np.einsum("nm,nm->n", firsts[i], each)  # type: ignore[index]

    def deviation(self, x: Inputs) -> Values:
        """Return standard deviations of the values."""
        axis = self.observed.axis
        factors = _factors(x, self.observed.x, self.lengths, self.constants)
        cross = factors.covariance(partials=(False, bool((axis > 0).any())))[:, self.observed.index]
        solved, of_h = (
            linalg.solve_triangular(self.factor, each, lower=True, check_finite=False)
            for each in (cross.T, (axis == 0).astype(np.float64))
        )
        left = np.maximum(1 - (solved**2).sum(0), 0) + (1 - of_h @ solved) ** 2 / (of_h @ of_h)
        return np.asarray(np.sqrt(left[:, None] * self.variance))


@dataclass(frozen=True, eq=False)
class GaussianProcess:
    """Outputs conditioned on values and partials, in standardized units."""

    groups: tuple[_Conditioned, ...]
    parameters: tuple[ndarray, ...]
    logs: "Logs | None" = None  # outputs whose logarithm is conditioned

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
            y[:, group.outputs], partials = group(x, jacobian=jacobian)
            if j is not None:
                j[:, group.outputs] = partials
            rows = max(1, _CHUNK // len(group.observed.index))
            for start in range(0, n if deviation is not None else 0, rows):
                part = slice(start, start + rows)
                deviation[part, group.outputs] = group.deviation(x[part])  # type: ignore[index]
        if self.logs is not None:
            y, factor = self.logs.values(y)
            j = None if j is None else j * factor[:, :, None]
            deviation = None if deviation is None else deviation * abs(factor)
        return y, j, deviation


@dataclass(frozen=True, eq=False)
class Logs:
    """Outputs of one sign that are learned as logarithms, u = log |y − y₀|."""

    zero: ndarray  # y₀, the raw 0 in standardized units
    sign: ndarray  # of an output; 0: it is learned as it is

    @staticmethod
    def of(y: Values, zero: ndarray) -> "Logs | None":
        """Return the logarithms of outputs of a wide range, if any."""
        low, high = (y - zero).min(0), (y - zero).max(0)
        sign = np.where(low > 0, high > _WIDE * low, 0.0) - np.where(high < 0, low < _WIDE * high, 0.0)
        return Logs(zero, sign) if sign.any() else None

    def values(self, u: Values) -> tuple[Values, Values]:
        """Return y and ∂y/∂u."""
        some = np.abs(self.sign)
        factor = self.sign * np.exp(some * u)
        return (1 - some) * u + some * self.zero + factor, 1 - some + factor

    def learned(self, data: Standardized) -> Standardized:
        """Return the samples with u instead of y."""
        some = np.abs(self.sign)
        off = 1 - some + some * (data.y - self.zero)
        y = (1 - some) * data.y + np.log(np.abs(off))
        return replace(data, y=y, t=None if data.t is None else data.t / off)


def select_process(data: Standardized, seed: int, zero: ndarray | None = None) -> tuple[GaussianProcess, float | None]:
    """Return the process of values or, given the raw `zero`, of logarithms, by held-out loss, and this loss."""
    process = fit_gaussian_process(data, seed=seed)
    loss = held_out_loss(data, seed, process)
    if zero is not None and loss is not None and loss > EXACT and (logs := Logs.of(data.y, zero)) is not None:
        count = len(data) * _COMPARED // conditions_on(data)
        some = data if count >= len(data) else data.rows(np.random.default_rng(seed).permutation(len(data))[:count])
        other = replace(fit_gaussian_process(logs.learned(some), seed=seed), logs=logs)
        before, after = loss if some is data else held_out_loss(some, seed), held_out_loss(some, seed, other)
        if before is not None and after is not None and after < _BETTER * before:
            other = other if some is data else replace(fit_gaussian_process(logs.learned(data), seed=seed), logs=logs)
            return other, held_out_loss(data, seed, other)
    return process, loss


def fit_gaussian_process(
    data: Standardized, *, seed: int = 0, parameters: tuple[ndarray, ...] = (), calibrated: bool = True
) -> GaussianProcess:
    """Return the process with the most likely length scales, constants and noise.

    They are searched on randomly drawn samples, together for outputs with one pattern: with several starts on few of
    them, then from the best on more. `parameters` of an earlier process are used without a search.
    """
    searched = list(parameters)
    for outputs in () if parameters else patterns(data):
        observed = _observed(data, outputs)
        best = [_start(data.x.shape[1], length, constant) for length in (1.0, 4.0) for constant in (1e-3, 1.0)]
        for entries, evaluations in _STAGES:
            count = max(8, int(len(data) * entries / max(len(observed.index), 1)))
            if count < len(data):
                chosen = np.random.default_rng(seed).permutation(len(data))[:count]
                some = _observed(data.rows(chosen), outputs)
            else:
                some = observed
            best = [min((_search(start, some, evaluations) for start in best), key=lambda each: each[1])[0]]
            if count >= len(data):
                break
        d = data.x.shape[1]
        best[0][d : 2 * d][best[0][d : 2 * d] < np.log(1.01 * _CONSTANTS[0])] = -np.inf
        searched.append(best[0])
    groups = [
        _condition(_observed(data, outputs), outputs, each, calibrated)
        for outputs, each in zip(patterns(data), searched, strict=True)
    ]
    return GaussianProcess(tuple(groups), tuple(searched))


def _start(d: int, length: float, constant: float) -> ndarray:
    """Return parameters from which a search starts."""
    return np.asarray(np.log(np.r_[np.full(d, length * np.sqrt(d) / 2 + 0.5), np.full(d, constant), 1e-6, 1e-6]))


def _search(start: ndarray, observed: _Observed, evaluations: int) -> tuple[ndarray, float]:
    """Return the parameters that a search ends at, and their loss."""
    d = observed.x.shape[1]
    bounds = [tuple(np.log(each)) for each in [_LENGTHS] * d + [_CONSTANTS] * d + [_NOISE] * 2]
    options = {"maxfun": evaluations, "maxiter": evaluations}
    result = minimize(_likelihood, start, (observed,), "L-BFGS-B", jac=True, bounds=bounds, options=options)
    return result.x, float(result.fun)


def _condition(observed: _Observed, outputs: ndarray, parameters: ndarray, calibrated: bool) -> _Conditioned:
    lengths, constants, noise = _unpacked(parameters)
    with_partials = bool((observed.axis > 0).any())
    factors = _factors(observed.x, observed.x, lengths, constants)
    covariance = factors.covariance(partials=(with_partials, with_partials))[np.ix_(observed.index, observed.index)]
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
    if calibrated:
        variance *= _calibration(observed, factor, alpha, variance) ** 2
    (n, d), k = observed.x.shape, len(outputs)
    weights = np.zeros(((1 + d) * n, k))
    weights[observed.index] = alpha
    return _Conditioned(outputs, observed, lengths, constants, factor, weights.reshape(1 + d, n, k), mean, variance)


def _calibration(observed: _Observed, factor: ndarray, alpha: ndarray, variance: ndarray) -> ndarray:
    """Return the factor of standard deviations with which 90 % of left-out samples lie in their 90 % interval.

    Their variance includes the noise, which is absent at a new point, so the factor is at least 1.
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


def wrong_partials(process: GaussianProcess) -> list[str]:
    """Return a line about the sample whose partials disagree most with what everything else predicts, if clearly.

    The residual, both absolute and in standard deviations, must be far above the median, that of the value must not:
    it is also large at a kink.
    """
    lines = []
    for group in process.groups:
        axis, (n, d) = group.observed.axis, group.observed.x.shape
        if len(axis) > INVERTED or n < _FEWEST or not (axis > 0).any():
            continue
        sample = group.observed.index % n
        inverse = linalg.cho_solve((group.factor, True), np.eye(len(axis)), check_finite=False)
        alpha = group.weights.reshape((1 + d) * n, -1)[group.observed.index]
        far, sizes, values = np.full((3, n, alpha.shape[1]), np.nan)
        for row in np.unique(sample[axis > 0]):
            block = np.flatnonzero(sample == row)  # the value first
            residual = linalg.pinvh(inverse[np.ix_(block, block)]) @ alpha[block]
            far[row] = np.sqrt((alpha[block] * residual).mean(0))
            sizes[row] = np.sqrt(((residual[1:] / group.lengths[axis[block[1:]] - 1, None]) ** 2).sum(0))
            values[row] = np.abs(residual[0])
        typical = np.sqrt((group.observed.z[axis > 0] ** 2).sum(0) / np.isfinite(sizes[:, 0]).sum())
        usual, times, value = (each / np.maximum(np.nanmedian(each, 0), _TINY) for each in (far, sizes, values))
        score = np.where(sizes > _SMALL * typical, np.sqrt(usual * times) / np.maximum(value, 1.0), 0.0)
        row, k = divmod(int(score.argmax()), score.shape[1])
        if score[row, k] > _WRONG:
            which = f"the partials of output {group.outputs[k]} in row {row} disagree with all other samples"
            lines.append(f"{which} {times[row, k]:.0f} times as much as usual: the largest disagreement of all.")
    return lines


def conditions_on(data: Standardized) -> int:
    """Return how many values and partials of one output are known, at most."""
    known: Bool[ndarray, "..."] | None = None if data.t_weights is None else data.t_weights > 0
    return len(data) + (0 if known is None else int(known.sum((0, 1)).max()))


def held_out_loss(data: Standardized, seed: int, process: GaussianProcess | None = None) -> float | None:
    """Return the loss on the samples that `Standardized.split` holds out; None if there are too few or too many.

    The parameters are those of the process, which are searched if there is none.
    """
    parts = data.split(seed)
    if parts is None or conditions_on(data) > LARGEST:
        return None
    logs = None if process is None else process.logs
    rows = parts[1] if logs is None else logs.learned(parts[1])
    pairs = () if process is None else zip(process.groups, process.parameters, strict=True)
    known = {output: each for group, each in pairs for output in group.outputs}
    # without the held-out samples, more outputs may have the same pattern
    parameters = tuple(known[outputs[0]] for outputs in patterns(rows) if known)
    fitted = replace(fit_gaussian_process(rows, seed=seed, parameters=parameters, calibrated=False), logs=logs)
    y, j, _ = fitted(parts[0].x, jacobian=data.t is not None)
    return parts[0].loss_of(y, None if j is None else j.transpose(2, 0, 1))


def spread(low: ndarray, high: ndarray, count: int, seed: int) -> Inputs:
    """Return Sobol points of a box."""
    unit = qmc.Sobol(len(low), seed=seed).random_base2(int(np.ceil(np.log2(max(count, 2)))))[:count]
    return np.asarray(low + unit * (high - low))


def with_free_samples(
    data: Standardized, process: GaussianProcess, seed: int, count: int | None = None
) -> Standardized:
    """Return the samples together with Sobol points in their box, at which the process is the teacher."""
    count = max(1, _FREE // (1 + data.x.shape[1])) if count is None else count
    x = spread(data.x.min(0), data.x.max(0), count, seed)
    y, j, _ = process(x, jacobian=True)
    assert j is not None
    return data.joined(x, y, j.transpose(2, 0, 1).copy())


def distilled_loss(data: Standardized, process: GaussianProcess, fit: Fit, seed: int) -> float:
    """Return the loss of a network against the process, at other points than it learned from."""
    whole = with_free_samples(data, process, seed)
    new = whole.rows(np.arange(len(data), len(whole)))
    return (new if data.t is not None else replace(new, t=None, t_weights=None)).loss(fit.net, fit.theta)
