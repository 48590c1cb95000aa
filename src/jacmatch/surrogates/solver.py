"""Second-order fit of a small network to values and partials: L-BFGS in float64 over the whole data set.

The loss is ½ (mean squared error of the values + λ · mean over samples of the summed squared error of the partials) + ½
α ‖weights‖², in standardized units. α and the activation are selected by values *and* partials of held-out samples; the
selected network is then fitted to all samples.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from scipy.optimize import minimize

from jacmatch.surrogates.perceptron import Cotangents, Inputs, Parameters, Perceptron, Tangents, Values

DECAYS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
"""Weight decays that are tried."""
_BEGINS = 1e-5  # the decay tried first
_HISTORY = 50  # pairs of L-BFGS
_WORK = 6e10  # floating-point operations of a whole fit: about 6 s on one core
_MOST, _FEWEST = 4000, 200  # evaluations of the last fit
_CLEARLY = 0.8  # ratio of held-out losses by which a stronger decay must be better
_NOISY = 1e-3  # held-out loss above which the samples are taken to have noise
_FEW = 300  # evaluations for a decay below which there is one start only
_WORSE = 1.5  # held-out loss over the best one at which a path of decays ends
_VISITED = 4  # weight decays that a start usually visits

OnProgress = Callable[[int, int, float], None]
"""Called with the evaluations so far, those planned and the loss."""


@dataclass(frozen=True, eq=False)
class Standardized:
    """Samples in standardized units, with a weight for each value and partial."""

    x: Inputs  # inputs
    y: Values  # values
    t: Tangents | None  # partials, 0 where unknown; None where none are known
    y_weights: Values  # weights of the squared errors of the values, which sum to 1
    t_weights: Tangents | None  # weights of the squared errors of the partials, 0 where unknown
    u: Cotangents | None = None  # cotangents, if t has projections uᵀ ∂y/∂x instead of partials of each output

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, which: Int[ndarray, "chosen"]) -> "Standardized":
        """Return some of the samples, with weights scaled up by the fraction that is left out."""
        part = self.y_weights[which]
        scale = 1 / max(float(part.sum()), 1e-300)
        t, weights = self.t, self.t_weights
        if t is not None and weights is not None:
            t, weights = t[:, which], weights[:, which] * scale
        u = None if self.u is None else self.u[which]
        return Standardized(self.x[which], self.y[which], t, part * scale, weights, u)

    def loss(self, net: Perceptron, theta: Parameters) -> float:
        """Return the loss without weight decay."""
        y, t, _ = net.forward(theta, self.x, jacobian=self.t is not None, cotangents=self.u)
        return self.loss_of(y, t)

    def loss_of(self, y: Values, t: Tangents | None) -> float:
        """Return the loss of predictions at the samples."""
        value = 0.5 * float((self.y_weights * (y - self.y) ** 2).sum())
        if self.t is not None:
            value += 0.5 * float((self.t_weights * (t - self.t) ** 2).sum())
        return value

    def split(self, seed: int) -> tuple["Standardized", "Standardized"] | None:
        """Return a random fifth of the samples and the others; None if there are too few to hold any out."""
        count = len(self) // 5
        if count < 2:
            return None
        order = np.random.default_rng(seed).permutation(len(self))
        return self.rows(order[:count]), self.rows(order[count:])

    def joined(self, x: Inputs, y: Values, t: Tangents) -> "Standardized":
        """Return these samples joined with others of equal weight; λ is 1 if no partials are known."""
        n, k = len(self) + len(x), y.shape[1]
        share = len(self) / n
        of_partials = 1.0 if self.t_weights is None else float(self.t_weights.sum()) / len(t)
        own_t = np.zeros((len(t), len(self), k)) if self.t is None else self.t
        own_weights = np.zeros_like(own_t) if self.t_weights is None else self.t_weights
        return Standardized(
            np.concatenate([self.x, x]),
            np.concatenate([self.y, y]),
            np.concatenate([own_t, t], 1),
            np.concatenate([self.y_weights * share, np.full(y.shape, 1 / (n * k))]),
            np.concatenate([own_weights * share, np.full(t.shape, of_partials / (n * k))], 1),
        )

    def loss_and_gradient(self, net: Perceptron, theta: Parameters) -> tuple[float, Parameters]:
        """Return the loss without weight decay, and its gradient."""
        y, t, steps = net.forward(theta, self.x, jacobian=self.t is not None, cotangents=self.u)
        off = y - self.y
        dy, dt = self.y_weights * off, None
        value = 0.5 * float((dy * off).sum())
        if self.t is not None:
            off = t - self.t
            dt = self.t_weights * off
            value += 0.5 * float((dt * off).sum())
        return value, net.parameter_gradient(theta, steps, dy, dt, self.u)


def minimize_loss(
    data: Standardized,
    net: Perceptron,
    theta: Parameters,
    decay: float,
    evaluations: int,
    on_evaluation: Callable[[float], None] | None = None,
) -> tuple[Parameters, float, int]:
    """Return parameters, loss with weight decay and evaluations of L-BFGS; its last search may exceed the number."""
    decays = decay * net.is_weight

    def evaluate(parameters: Parameters) -> tuple[float, Parameters]:
        loss, gradient = data.loss_and_gradient(net, parameters)
        loss += 0.5 * float(decays @ (parameters * parameters))
        if on_evaluation is not None:
            on_evaluation(loss)
        return loss, gradient + decays * parameters

    options = {"maxcor": _HISTORY, "maxfun": evaluations, "maxiter": evaluations, "ftol": 1e-15, "gtol": 1e-11}
    result = minimize(evaluate, theta, jac=True, method="L-BFGS-B", options=options)
    return result.x, float(result.fun), int(result.nfev)


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted network."""

    net: Perceptron  # its layout
    theta: Parameters  # its parameters
    decay: float  # the weight decay that was selected
    loss: float  # loss over all samples, decay included
    held_out: float | None  # the loss on held-out samples by which it was selected; None where nothing was held out
    evaluations: int  # evaluations of loss and gradient in all
    candidates: list[dict[str, object]] = field(default_factory=list)  # decay and held-out loss of all that were tried


def planned_evaluations(data: Standardized, net: Perceptron) -> int:
    """Return how many evaluations the last fit may take: about half of the work of a fit, and the same on each machine.

    One evaluation costs about 6 operations for each parameter, sample and tangent.
    """
    tangents = 1 + (0 if data.t is None else len(data.t))
    operations = 6 * net.count * len(data) * tangents + 1e5  # and the overhead of a call
    return int(np.clip(0.5 * _WORK / operations, _FEWEST, _MOST))


def too_large(samples: int, tangents: int, net: Perceptron) -> bool:
    """Return whether the fewest evaluations of L-BFGS would take more than about 30 s."""
    return _FEWEST * 6 * net.count * samples * (1 + tangents) > 5 * _WORK


def select(
    data: Standardized,
    validation: Standardized,
    net: Perceptron,
    theta: Parameters,
    decays: Sequence[float],
    evaluations: int,
    on_evaluation: Callable[[float], None] | None = None,
) -> Fit:
    """Follow a path of weight decays, and return the parameters with the lowest held-out loss.

    The path starts at a medium decay and goes both ways. Without noise, a stronger decay must be clearly better and a
    weaker one may be slightly worse: the last fit converges further.
    """
    middle = min(decays, key=lambda decay: abs(np.log(max(decay, 1e-30) / _BEGINS)))
    theta, loss, total = minimize_loss(data, net, theta, middle, evaluations, on_evaluation)
    first, lowest = theta, validation.loss(net, theta)
    best = Fit(net, theta, middle, loss, lowest, total)
    weaker = [decay for decay in decays if decay < middle]
    stronger = [decay for decay in decays[::-1] if decay > middle]
    for path in (weaker, stronger):
        theta = first
        for decay in path:
            theta, loss, count = minimize_loss(data, net, theta, decay, evaluations, on_evaluation)
            total += count
            score = validation.loss(net, theta)
            clearly = 1.0 if lowest > _NOISY else _CLEARLY if decay > middle else 1 / _CLEARLY
            if score < clearly * lowest:
                best, lowest = Fit(net, theta, decay, loss, score, total), score
            elif not score < _WORSE * lowest:
                break
    return replace(best, evaluations=total)


@dataclass(frozen=True, eq=False)
class Selection(Fit):
    """A network that was selected on held-out samples, before it is fitted to all."""

    last: int = 0  # evaluations of the last fit
    counter: Callable[[float], None] | None = None  # counts them

    def fit(self, data: Standardized) -> Fit:
        """Return the network after the last fit, to all samples."""
        theta, loss, used = minimize_loss(data, self.net, self.theta, self.decay, self.last, self.counter)
        return Fit(self.net, theta, self.decay, loss, self.held_out, self.evaluations + used, self.candidates)


def layouts(inputs: int, hidden: tuple[int, ...], outputs: int, activation: str) -> list[Perceptron]:
    """Return the network of an activation, or those that "auto" and "all" try.

    Sines are used in one hidden layer only: with two, the samples do not determine them well. One layer of sines
    represents products of sines and cosines.
    """
    if activation not in ("auto", "all") or not hidden:
        return [Perceptron((inputs, *hidden, outputs), activation if hidden else "silu")]
    nets = [Perceptron((inputs, *hidden, outputs), "silu"), Perceptron((inputs, sum(hidden), outputs), "sine")]
    others = ("tanh", "softplus") if activation == "all" else ()
    return nets + [Perceptron((inputs, *hidden, outputs), name) for name in others]


def select_network(
    data: Standardized,
    nets: Sequence[Perceptron],
    *,
    starts: int,
    decays: Sequence[float] = DECAYS,
    seed: int = 0,
    evaluations: int | None = None,
    initial: Parameters | None = None,
    on_progress: OnProgress | None = None,
) -> Selection:
    """Select layout, start and weight decay of a network on a fifth of the samples, which is held out."""
    last = planned_evaluations(data, nets[0]) if evaluations is None else evaluations
    visited = min(len(decays), _VISITED)
    if last < _FEW * visited * starts * len(nets):
        starts = 1
    beginnings = [
        (net, net.initial(seed + start) if initial is None else initial) for start in range(starts) for net in nets
    ]
    each = max(10, last // (len(beginnings) * visited))
    planned, done = last + each * len(beginnings) * visited, itertools.count(1)

    def counter(loss: float) -> None:
        if on_progress is not None:
            on_progress(min(next(done), planned), planned, loss)

    parts = data.split(seed)
    if parts is None:
        return Selection(*beginnings[0], decays[len(decays) // 2], 0.0, None, 0, [], last, counter)
    results = [select(parts[1], parts[0], net, theta, decays, each, counter) for net, theta in beginnings]
    best, total = min(results, key=lambda one: one.held_out or 0.0), sum(one.evaluations for one in results)
    candidates: list[dict[str, object]] = [
        {"activation": one.net.activation, "weight_decay": one.decay, "held_out": one.held_out} for one in results
    ]
    return Selection(best.net, best.theta, best.decay, best.loss, best.held_out, total, candidates, last, counter)
