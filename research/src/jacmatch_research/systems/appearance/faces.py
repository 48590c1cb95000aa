"""Drawn faces with 31 landmarks, instead of photographs: no package has more than five photographs with landmarks.

A face is a set of points in space: an elliptic jaw, brows, eyes, nose and mouth, whose sizes vary between faces
(identity) and whose brows, lids and mouth move (expression). It is turned (yaw, pitch), projected, and drawn with soft
edges under light from a random side, with random contrast, gaze, background and pixel noise. Landmarks are a non-linear
function of eleven numbers, and images of some thirty: a linear model of shape or texture is an approximation, as with
photographs.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any
"""A numpy array; shapes are in the docstrings."""
SIDE = 64
"""Side of an image in pixels."""
LANDMARKS = 31
_RADIUS = 16.0  # half a face's width in pixels, on average
_JAW, _LEFT_BROW, _RIGHT_BROW = slice(0, 9), slice(9, 12), slice(12, 15)
LEFT_EYE, RIGHT_EYE = slice(15, 19), slice(19, 23)
_NOSE, _MOUTH = slice(23, 27), slice(27, 31)


@dataclass(frozen=True)
class Faces:
    """Images (face, SIDE, SIDE), values about [0, 1], and their landmarks (face, LANDMARKS, 2).

    Landmarks are in pixels, x to the right and y down; pixel centers have integer coordinates.
    """

    images: Array
    landmarks: Array

    def __len__(self) -> int:
        return len(self.images)

    @property
    def eye_distance(self) -> Array:
        """Distance between the centers of the eyes of each face, in pixels."""
        left, right = (self.landmarks[:, eye].mean(1) for eye in (LEFT_EYE, RIGHT_EYE))
        return np.linalg.norm(right - left, axis=1)


def faces(count: int, seed: int) -> Faces:
    """Return `count` faces; each depends only on the seed and its number.

    Example:
        >>> faces(2, seed=0).landmarks.shape
        (2, 31, 2)
    """
    drawn = [_face(np.random.default_rng((seed, number))) for number in range(count)]
    return Faces(np.stack([image for image, _ in drawn]), np.stack([landmarks for _, landmarks in drawn]))


def _face(random: np.random.Generator) -> tuple[Array, Array]:
    points = _turned(_solid(random), np.deg2rad(random.normal(0, (12, 6))))
    angle = np.deg2rad(random.normal(0, 6))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    center = (SIDE - 1) / 2 + random.normal(0, 2, 2)
    landmarks = _RADIUS * random.normal(1, 0.08) * points @ turn.T + center
    return _drawn(landmarks, random), landmarks


def _solid(random: np.random.Generator) -> Array:
    """Landmarks in space (x right, y down, z to the viewer), half a face's width being 1."""
    width, height, spacing, lid, brow, mouth, opening, smile, nose = random.normal(0, 1, 9)
    w, h = 1 + 0.06 * width, 1 + 0.06 * height
    theta = np.deg2rad(np.linspace(-100, 100, 9))
    jaw = np.stack((w * np.sin(theta), 0.15 + 1.2 * h * np.cos(theta), -0.6 * np.sin(theta) ** 2), 1)
    at, up = 0.42 * (1 + 0.1 * spacing), -0.18 * h
    eye = 0.08 * np.exp(0.25 * lid) * np.array([[0, 0], [0, -1], [0, 0], [0, 1.0]])
    eye = eye + 0.17 * np.array([[-1, 0], [0, 0], [1, 0], [0, 0.0]])
    raised = up - 0.24 - 0.05 * brow
    arch = np.array([[-0.2, 0.03], [0, -0.04], [0.2, 0.03]])
    m, o = 0.32 * (1 + 0.12 * mouth), 0.1 * np.exp(0.3 * opening)
    lips = np.array([[-m, 0.78 - 0.05 * smile], [0, 0.78 - o], [m, 0.78 - 0.05 * smile], [0, 0.78 + o]])
    tip = 0.36 * (1 + 0.12 * nose)
    parts = [
        jaw,
        *(_at_depth(arch + np.array([side * at, raised]), 0.15) for side in (-1, 1)),
        *(_at_depth(eye + np.array([side * at, up]), 0.1) for side in (-1, 1)),
        np.array([[0, up, 0.25], [-0.15, tip + 0.08, 0.25], [0, tip, 0.5], [0.15, tip + 0.08, 0.25]]),
        _at_depth(lips * (1, h), 0.2),
    ]
    return np.concatenate(parts)


def _at_depth(points: Array, depth: float) -> Array:
    return np.concatenate((points, np.full((len(points), 1), depth)), 1)


def _turned(points: Array, angles: Array) -> Array:
    """Rotate points about the vertical and the horizontal axis, and project them along z."""
    (cy, cp), (sy, sp) = np.cos(angles), np.sin(angles)
    x, y, z = points.T
    x, z = cy * x + sy * z, cy * z - sy * x
    return np.stack((x, cp * y - sp * z), 1)


def _drawn(landmarks: Array, random: np.random.Generator) -> Array:
    """The image (SIDE, SIDE) of a face with these landmarks."""
    grid = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), -1).astype(float)
    image = _background(grid, random)
    jaw = landmarks[_JAW]
    middle = (jaw[0] + jaw[-1]) / 2
    crown = [middle + (middle - jaw[4]) * 0.75 + share * (jaw[-1] - jaw[0]) for share in (0.3, 0.0, -0.3)]
    light = random.normal(0, 0.15, 2)
    skin = random.uniform(0.55, 0.8) * (1 + (grid - middle) @ light / _RADIUS)
    image = _over(image, skin, _inside(grid, np.concatenate((jaw, crown))))
    dark = random.uniform(0.1, 0.3)
    gaze = random.normal(0, 0.8, 2) * (1, 0.3)
    for eye, brow in ((LEFT_EYE, _LEFT_BROW), (RIGHT_EYE, _RIGHT_BROW)):
        opened = _inside(grid, landmarks[eye])
        image = _over(image, 0.9, opened)
        iris = np.linalg.norm(grid - landmarks[eye].mean(0) - gaze, axis=-1)
        image = _over(image, dark, opened * _soft(1.6 - iris))
        image = _over(image, dark, _soft(0.7 - _distance(grid, landmarks[brow])))
    bridge, left, tip, right = landmarks[_NOSE]
    image = image - 0.12 * _soft(0.5 - _distance(grid, np.stack((left, tip, right))))
    image = image + 0.06 * _soft(0.8 - _distance(grid, np.stack((bridge, tip))))
    image = _over(image, random.uniform(0.3, 0.5), _inside(grid, landmarks[_MOUTH]))
    return image + random.normal(0, 0.02, image.shape)


def _background(grid: Array, random: np.random.Generator) -> Array:
    """Four waves of random direction, length and phase about a random gray."""
    image = np.full((SIDE, SIDE), random.uniform(0.2, 0.6))
    for _ in range(4):
        wave = random.normal(0, 2 * np.pi / 25, 2)
        image += 0.06 * np.cos(grid @ wave + random.uniform(0, 2 * np.pi))
    return image


def _over(image: Array, color: Any, mask: Array) -> Array:
    return image + mask * (color - image)


def _soft(depth: Array) -> Array:
    """1 inside, 0 outside, with an edge of a pixel or two."""
    return 1 / (1 + np.exp(-np.clip(2.5 * depth, -40, 40)))


def _inside(grid: Array, corners: Array) -> Array:
    """A soft mask of the star-shaped curve through the corners, in order."""
    center = corners.mean(0)
    away = corners - center
    angles, radii = np.arctan2(away[:, 1], away[:, 0]), np.linalg.norm(away, axis=1)
    order = np.argsort(angles)
    apart = grid - center
    edge = np.interp(np.arctan2(apart[..., 1], apart[..., 0]), angles[order], radii[order], period=2 * np.pi)
    return _soft(edge - np.linalg.norm(apart, axis=-1))


def _distance(grid: Array, line: Array) -> Array:
    """Distance of each pixel from a polyline."""
    best = np.full(grid.shape[:2], np.inf)
    for start, end in itertools.pairwise(line):
        along = end - start
        share = np.clip((grid - start) @ along / max(along @ along, 1e-12), 0, 1)
        best = np.minimum(best, np.linalg.norm(grid - start - share[..., None] * along, axis=-1))
    return best
