"""An active appearance model: principal components of shape and of shape-free texture, and the residual of a fit.

Cootes, Edwards & Taylor, IEEE PAMI 23 (2001) 681; the texture is projected out (Matthews & Baker, IJCV 60 (2004) 135).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jacmatch.errors import UnsupportedError
from jacmatch_research.systems.appearance.faces import Array, Faces

WINDOW = 40
"""Side of a window, in its own pixels."""
REACH = 1.9
"""Half the side of a window in units of the mean shape, in which the eyes are about 0.84 apart."""
UNIT = 0.1
"""Unit of the four numbers of a pose."""
_EXPLAINED = 0.95  # share of the variance that shape modes and texture modes explain
_TEXTURE_SIDE = 22  # number of grid points of the texture across a face
_PRIOR = 0.02  # weight of the squared shape numbers in units of their standard deviations


@dataclass(frozen=True)
class Model:
    """A model in the frame of its mean shape: centered, and of half a face's width about 1.

    The parameters of a fit are p = (a, b, t, s) with a, b and the shift t in tenths: its landmarks are (1 + a, b)·(mean
    + Σ modeₖ sₖ) + t, where (1 + a, b) is a complex factor, which scales and rotates.

    Attributes:
        mean: (landmark, 2).
        modes: (shape mode, landmark, 2), each with the length of one standard deviation.
        weights: (pixel, landmark): where the texture's pixels are, as averages of three landmarks.
        texture: (pixel,), the mean of normalized textures.
        textures: (texture mode, pixel), orthonormal.
    """

    mean: Array
    modes: Array
    weights: Array
    texture: Array
    textures: Array

    @property
    def parameters(self) -> int:
        """The number of parameters of a fit."""
        return 4 + len(self.modes)

    def shape(self, p: Array) -> Array:
        """Landmarks (…, landmark, 2) in the frame of the mean shape for parameters (…, parameter)."""
        plain = self.mean + np.tensordot(p[..., 4:], self.modes, 1)
        return _moved(plain, UNIT * p[..., :4] + (1.0, 0, 0, 0))

    def residual(self, windows: Array, p: Array) -> Array:
        """The part of the texture (face, pixel) at these parameters that the texture modes cannot represent."""
        g = self.sampled(windows, p) - self.texture
        return g - (g @ self.textures.T) @ self.textures

    def sampled(self, windows: Array, p: Array) -> Array:
        """The texture (face, pixel) of windows (face, WINDOW, WINDOW), of mean 0 and variance 1."""
        positions = self.weights @ self.shape(p)
        g = bilinear(windows, (positions + REACH) * ((WINDOW - 1) / (2 * REACH)))
        g = g - g.mean(1, keepdims=True)
        return g / (g.std(1, keepdims=True) + 1e-6)

    def cost(self, windows: Array, p: Array) -> Array:
        """Mean squared residual, and a prior that keeps shapes likely, for each face: (face,)."""
        return np.square(self.residual(windows, p)).mean(1) + _PRIOR * np.square(p[:, 4:]).mean(1)

    def cost_of(self, window: Array) -> Callable[[Array], float]:
        """`cost` of one window as a function of its parameters (parameter,), ten times as fast."""
        center = (WINDOW - 1) / 2
        unit = center / REACH
        mean, modes = (
            np.ascontiguousarray(self.weights @ each).view(complex)[..., 0] for each in (self.mean, self.modes)
        )
        flat, last, count = np.ascontiguousarray(window).ravel(), WINDOW - 1.000001, len(self.texture)
        modes, explained = np.ascontiguousarray(modes), np.ascontiguousarray(self.textures)

        def cost(p: Array) -> float:
            own = unit * (1 + UNIT * complex(p[0], p[1]))
            z = own * (mean + p[4:] @ modes) + (unit * UNIT * complex(p[2], p[3]) + complex(center, center))
            x, y = np.minimum(np.maximum(z.real, 0), last), np.minimum(np.maximum(z.imag, 0), last)
            left, top = x.astype(int), y.astype(int)
            u, v, at = x - left, y - top, top * WINDOW + left
            upper, lower = flat[at], flat[at + WINDOW]
            upper = upper + u * (flat[at + 1] - upper)
            lower = lower + u * (flat[at + WINDOW + 1] - lower)
            g = upper + v * (lower - upper)
            g = g - g.mean()
            g = g / (np.sqrt(g @ g / count) + 1e-6) - self.texture
            known = explained @ g
            shape = p[4:]
            return float((g @ g - known @ known) / count + _PRIOR * (shape @ shape) / len(shape))

        return cost


def build(train: Faces) -> Model:
    """The model of these faces: shapes aligned by Procrustes' method, 95 % of the variance of shape and of texture."""
    from scipy.spatial import Delaunay

    shapes = _aligned(train.landmarks)
    mean = shapes.mean(0)
    modes = _components(shapes.reshape(len(shapes), -1), scaled=True)
    low, high = mean.min(0), mean.max(0)
    axes = (np.linspace(low[axis], high[axis], _TEXTURE_SIDE) for axis in (0, 1))
    grid = np.stack(np.meshgrid(*axes), -1).reshape(-1, 2)
    mesh = Delaunay(mean)
    triangle = mesh.find_simplex(grid)
    grid, triangle = grid[triangle >= 0], triangle[triangle >= 0]
    transform = mesh.transform[triangle]
    two = np.einsum("nij,nj->ni", transform[:, :2], grid - transform[:, 2])
    weights = np.zeros((len(grid), len(mean)))
    np.put_along_axis(weights, mesh.simplices[triangle], np.column_stack((two, 1 - two.sum(1))), 1)
    g = bilinear(train.images, weights @ train.landmarks)
    g = g - g.mean(1, keepdims=True)
    g = g / (g.std(1, keepdims=True) + 1e-6)
    return Model(mean, modes.reshape(len(modes), *mean.shape), weights, g.mean(0), _components(g, scaled=False))


def pose_of(model: Model, landmarks: Array) -> Array:
    """The similarity (scale·cos, scale·sin, x, y) that brings the mean shape nearest to landmarks (…, landmark, 2)."""
    center = landmarks.mean(-2, keepdims=True)
    away, mean = landmarks - center, model.mean - model.mean.mean(0)
    size = np.square(mean).sum()
    real = (away * mean).sum((-2, -1)) / size
    turned = (away[..., 1] * mean[:, 0] - away[..., 0] * mean[:, 1]).sum(-1) / size
    pose = np.concatenate((real[..., None], turned[..., None], center[..., 0, :]), -1)
    pose[..., 2:] -= _moved(model.mean.mean(0)[None], np.concatenate((pose[..., :2], 0 * pose[..., 2:]), -1))[..., 0, :]
    return pose


def windows(images: Array, poses: Array) -> Array:
    """Windows (face, WINDOW, WINDOW) of images, each in the frame of its pose (face, 4); one sampling of an image."""
    axis = np.linspace(-REACH, REACH, WINDOW)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    results = bilinear(images, _moved(np.broadcast_to(grid, (len(images), *grid.shape)), poses))
    return results.reshape(-1, WINDOW, WINDOW)


def in_image(shape: Array, poses: Array) -> Array:
    """Landmarks of a window's frame as landmarks of the image."""
    return _moved(shape, poses)


def composed(p: Array, poses: Array) -> Array:
    """Return poses in the image, given parameters p relative to `poses`."""
    own = UNIT * p[..., :4] + (1.0, 0, 0, 0)
    moved = _moved(own[..., None, 2:], poses)[..., 0, :]
    real = own[..., 0] * poses[..., 0] - own[..., 1] * poses[..., 1]
    turned = own[..., 0] * poses[..., 1] + own[..., 1] * poses[..., 0]
    return np.concatenate((real[..., None], turned[..., None], moved), -1)


def bilinear(images: Array, positions: Array) -> Array:
    """Values (image, point) at points (image, point, 2) by bilinear interpolation; clamped outside."""
    height, width = images.shape[1:]
    x, y = np.clip(positions[..., 0], 0, width - 1.000001), np.clip(positions[..., 1], 0, height - 1.000001)
    left, top = x.astype(int), y.astype(int)
    u, v = x - left, y - top
    flat = images.reshape(len(images), -1)
    at = top * width + left
    corners = [np.take_along_axis(flat, at + step, 1) for step in (0, 1, width, width + 1)]
    upper, lower = (1 - u) * corners[0] + u * corners[1], (1 - u) * corners[2] + u * corners[3]
    return (1 - v) * upper + v * lower


def _moved(points: Array, pose: Array) -> Array:
    """Points (…, point, 2) scaled, turned and shifted by poses (…, 4)."""
    real, turned = pose[..., None, 0], pose[..., None, 1]
    x, y = points[..., 0], points[..., 1]
    return np.stack((real * x - turned * y, turned * x + real * y), -1) + pose[..., None, 2:]


def _aligned(landmarks: Array) -> Array:
    """Align shapes in position, size and orientation to their mean, in three iterations."""
    shapes = landmarks - landmarks.mean(1, keepdims=True)
    shapes = shapes / (np.abs(shapes[:, [0, 8], 0]).mean(1)[:, None, None])
    mean = shapes.mean(0)
    for _ in range(3):
        real = (shapes * mean).sum((1, 2)) / np.square(shapes).sum((1, 2))
        turned = (shapes[..., 0] * mean[:, 1] - shapes[..., 1] * mean[:, 0]).sum(1) / np.square(shapes).sum((1, 2))
        shapes = _moved(shapes, np.stack((real, turned, 0 * real, 0 * real), 1))
        mean = shapes.mean(0)
    return shapes


def _components(rows: Array, *, scaled: bool) -> Array:
    """The principal components that make up 95 % of the variance, each of length 1 or of a standard deviation."""
    _, values, axes = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    count = int(np.searchsorted(np.cumsum(values**2) / np.sum(values**2), _EXPLAINED)) + 1
    return axes[:count] * (values[:count, None] / np.sqrt(len(rows) - 1) if scaled else 1.0)


_DISPLACED = (-1.0, -0.5, 0.5, 1.0)
"""Displacements of each parameter, in its unit, for the measurement of the Jacobian."""


@dataclass(frozen=True)
class Fit:
    """Parameters of fits (face, parameter), and the number of samplings of the image for each (face,)."""

    p: Array
    evaluations: Array


def fixed_jacobian(model: Model, train: Faces) -> Array:
    """R (parameter, pixel) = (JᵀJ)⁻¹Jᵀ with J the residual's derivative, the mean over all training images.

    J is measured by displacing each parameter from its true value to both sides (Cootes, Edwards & Taylor 2001).
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
    """The true parameters (face, parameter) of landmarks in windows at the true `poses`."""
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
    """Iterate p ← p − k R r(p), k the first of 1, ½ and ¼ that lowers the cost; a face ends if no step lowers it."""
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

    Each window gets at most `most` evaluations; the tolerance refers to the parameters, in their units.

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
