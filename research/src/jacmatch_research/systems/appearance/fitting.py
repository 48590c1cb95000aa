"""Fitting a model to windows: with one Jacobian for all images, and without derivatives by Powell's NEWUOA."""

from dataclasses import dataclass

import numpy as np

from jacmatch.errors import UnsupportedError
from jacmatch_research.systems.appearance.faces import Array, Faces
from jacmatch_research.systems.appearance.model import Model, pose_of, windows

_DISPLACED = (-1.0, -0.5, 0.5, 1.0)
"""By how much each parameter is changed to learn the Jacobian, in its unit."""


@dataclass(frozen=True)
class Fit:
    """Parameters of fits (face, parameter), and how often the image was sampled for each (face,)."""

    p: Array
    evaluations: Array


def fixed_jacobian(model: Model, train: Faces) -> Array:
    """R (parameter, pixel) = (JᵀJ)⁻¹Jᵀ with J the residual's derivative, the mean over all training images.

    J is measured: each parameter is displaced from where it is right, to either side (Cootes, Edwards & Taylor 2001).
    """
    poses = pose_of(model, train.landmarks)
    shown = windows(train.images, poses)
    true = shape_numbers(model, train.landmarks, poses)
    columns = []
    for number in range(model.parameters):
        partials = []
        for size in _DISPLACED:
            moved = true.copy()
            moved[:, number] += size
            partials.append((model.residual(shown, moved) - model.residual(shown, true)).mean(0) / size)
        columns.append(np.mean(partials, 0))
    return np.linalg.pinv(np.stack(columns, 1))


def shape_numbers(model: Model, landmarks: Array, poses: Array) -> Array:
    """The parameters (face, parameter) of landmarks in windows at `poses` that are their own: pose 0, and the shape."""
    real, turned = poses[:, 0], poses[:, 1]
    size = real**2 + turned**2
    away = landmarks - poses[:, None, 2:]
    x = (real[:, None] * away[..., 0] + turned[:, None] * away[..., 1]) / size[:, None]
    y = (real[:, None] * away[..., 1] - turned[:, None] * away[..., 0]) / size[:, None]
    own = (np.stack((x, y), -1) - model.mean).reshape(len(landmarks), -1)
    flat = model.modes.reshape(len(model.modes), -1)
    numbers = own @ flat.T / np.square(flat).sum(1)
    return np.concatenate((np.zeros((len(landmarks), 4)), numbers), 1)


def by_fixed_jacobian(model: Model, update: Array, shown: Array, *, iterations: int = 30) -> Fit:
    """Iterates p ← p − k R r(p), k the first of 1, ½ and ¼ that lowers the cost; a face that no step helps is done."""
    p = np.zeros((len(shown), model.parameters))
    cost = model.cost(shown, p)
    evaluations = np.ones(len(shown), int)
    going = np.ones(len(shown), bool)
    for _ in range(iterations):
        step = model.residual(shown, p) @ update.T
        open_ = going.copy()
        for k in (1.0, 0.5, 0.25):
            if not open_.any():
                break
            candidate = p[open_] - k * step[open_]
            new_cost = model.cost(shown[open_], candidate)
            evaluations[open_] += 1
            better = new_cost < cost[open_] - 1e-9
            where = np.flatnonzero(open_)[better]
            p[where], cost[where] = candidate[better], new_cost[better]
            open_[where] = False
        going &= ~open_
        if not going.any():
            break
    return Fit(p, evaluations)


def by_newuoa(model: Model, shown: Array, *, most: int = 1000, tolerance: float = 1e-3) -> Fit:
    """The minimum of the cost for each window, by NEWUOA (Powell 2006) from p = 0 with first steps of one unit.

    At most `most` evaluations for each; the tolerance is that of the parameters, in their units.

    Raises:
        UnsupportedError: nlopt is not installed.
    """
    try:
        import nlopt
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "Fitting without derivatives needs the extra appearance: the package nlopt is not installed. "
            "Run: pip install 'jacmatch-research[appearance]'."
        ) from error
    results, counts = [], []
    for window in shown:
        cost = model.cost_of(window)
        search = nlopt.opt(nlopt.LN_NEWUOA, model.parameters)
        search.set_min_objective(lambda p, gradient, cost=cost: cost(p))
        search.set_initial_step(np.ones(model.parameters))
        search.set_xtol_abs(np.full(model.parameters, tolerance))
        search.set_maxeval(most)
        results.append(search.optimize(np.zeros(model.parameters)))
        counts.append(search.get_numevals())
    return Fit(np.array(results).reshape(-1, model.parameters), np.array(counts, int))
