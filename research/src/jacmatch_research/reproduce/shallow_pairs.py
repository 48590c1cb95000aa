"""Pairs of small networks on the plane and the points at which a statement about them is measured."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from jacmatch.errors import unknown_name

REACH = 7.5
"""Noise beyond this number of standard deviations has a probability of 10⁻¹² and is left out where there are kinks."""


@dataclass(frozen=True)
class Nodes:
    """Standard normal noise z for each point, or one for all, and weights, which have the sum 1."""

    z: Float[Tensor, "point node 2"]
    weights: Float[Tensor, "point node"]


def hermite(count: int) -> Nodes:
    """Gauss–Hermite nodes, count², for functions that are smooth."""
    nodes, weights = _normal(count)
    return Nodes(torch.cartesian_prod(nodes, nodes)[None], torch.outer(weights, weights).flatten()[None])


def kinked(offsets: Float[Tensor, "point kink"], normals: Float[Tensor, "kink 2"], count: int) -> Nodes:
    """Nodes for functions of z and of −z that have a kink where offset + normal · z = 0 and are smooth elsewhere.

    z = s n + t n', n the normal of the nearest kink. The outer integral, over s, is divided at that kink and where two
    other kinks meet; the inner one, over t, at the other kinks. Offsets are signed, in standard deviations of the
    noise, and unit normals point in the direction in which they increase. Each piece has `count` nodes, and at most 2.5
    standard deviations.
    """
    order = offsets.abs().argsort(1)
    near = int((offsets.abs() < REACH).sum(1).max())
    if not near:
        return hermite(2 * count)
    distance, direction = offsets.gather(1, order[:, :near]), normals[order[:, :near]]
    n = direction[:, 0]
    across = torch.stack((-n[:, 1], n[:, 0]), 1)
    along_n = (direction[:, 1:] * n[:, None]).sum(2).repeat(1, 2)
    along_t = (direction[:, 1:] * across[:, None]).sum(2).repeat(1, 2)
    others = torch.cat((distance[:, 1:], -distance[:, 1:]), 1)  # the kinks of the function of −z as well
    outer = torch.cat((distance[:, :1], -distance[:, :1], _meetings(others, along_n, along_t)), 1)
    s, s_weights = _pieces(outer, count)
    if near > 1:
        # a kink is crossed at t = −(offset + s n·normal) / (n'·normal)
        t, t_weights = _pieces(-(others[:, None] + s[:, :, None] * along_n[:, None]) / along_t[:, None], count)
    else:  # along the only kink all is smooth
        t, t_weights = (part.expand(*s.shape, -1) for part in _normal(2 * count))
    z = s[:, :, None, None] * n[:, None, None] + t[..., None] * across[:, None, None]
    weights = (s_weights[:, :, None] * t_weights).flatten(1)
    return Nodes(z.flatten(1, 2), weights / weights.sum(1, keepdim=True))


def segments(cuts: Float[Tensor, "*row cut"], count: int) -> tuple[Tensor, Tensor]:
    """Gauss–Legendre nodes and weights between neighboring cuts, which ascend."""
    nodes, weights = (torch.tensor(part) for part in np.polynomial.legendre.leggauss(count))
    length = cuts.diff(dim=-1)[..., None]
    inside = cuts[..., :-1, None] + length * (nodes + 1) / 2
    return inside.flatten(-2), (length * weights / 2).flatten(-2)


def _pieces(cuts: Float[Tensor, "*row cut"], count: int) -> tuple[Tensor, Tensor]:
    """Nodes on the line, divided at the cuts and at fixed points, with weights that contain the normal density."""
    fixed = torch.linspace(-REACH, REACH, 7, dtype=cuts.dtype)
    every = torch.cat((cuts.nan_to_num(REACH).clamp(-REACH, REACH), fixed.expand(*cuts.shape[:-1], -1)), -1)
    nodes, weights = segments(every.sort(-1).values, count)
    return nodes, weights * torch.exp(-nodes.square() / 2)


def _normal(count: int) -> tuple[Tensor, Tensor]:
    """Gauss–Hermite nodes and weights of a standard normal on the line."""
    nodes, weights = (torch.tensor(part) for part in np.polynomial.hermite_e.hermegauss(count))
    return nodes, weights / weights.sum()


def _meetings(
    offsets: Float[Tensor, "point line"], along_n: Float[Tensor, "point line"], along_t: Float[Tensor, "point line"]
) -> Float[Tensor, "point pair"]:
    """Where two lines offset + along_n s + along_t t = 0 meet, as s; not finite for parallel ones."""
    i, j = torch.triu_indices(offsets.shape[1], offsets.shape[1], 1)
    determinant = along_n[:, i] * along_t[:, j] - along_n[:, j] * along_t[:, i]
    return (offsets[:, j] * along_t[:, i] - offsets[:, i] * along_t[:, j]) / determinant


Function = Callable[[Tensor], Tensor]
OUTPUTS, FAR, LENGTH = 3, 2.2, 3.0
_GAP = 0.3  # between two kinks on the line over which is averaged


@dataclass(frozen=True)
class Shallow:
    """A network with one hidden layer, y ↦ V a(Wy + b) + c, on points of any number of leading dimensions."""

    w: Float[Tensor, "unit 2"]
    b: Float[Tensor, "unit"]
    v: Float[Tensor, "out unit"]
    c: Float[Tensor, "out"]
    activation: Function

    def __call__(self, y: Float[Tensor, "*point 2"]) -> Float[Tensor, "*point out"]:
        """The outputs."""
        return self.activation(y @ self.w.T + self.b) @ self.v.T + self.c

    @staticmethod
    def draw(units: int, activation: Function, generator: torch.Generator) -> "Shallow":
        """A random network in float64."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        w, b, v, c = normal(units, 2), normal(units), normal(OUTPUTS, units), normal(OUTPUTS)
        return Shallow(w, b, v / units**0.5, c / 2, activation)


@dataclass(frozen=True)
class Kinks:
    """Kinks that noise reaches: a point on each, and the unit vector across it.

    For an average over a line, the point is where the line crosses the kink, and `density` is that of the points there,
    per unit of distance from the kink.
    """

    points: Float[Tensor, "kink 2"]
    normals: Float[Tensor, "kink 2"]
    density: Float[Tensor, "kink"]


@dataclass(frozen=True)
class Location:
    """The points at which a pair is evaluated, with weights whose sum is 1, and the kinks within reach of the noise.

    `side` is a small step from a point on a kink across it; there, derivatives are means of both sides.
    """

    student: Shallow
    teacher: Shallow
    x: Float[Tensor, "point 2"]
    weights: Float[Tensor, "point"]
    kinks: Kinks | None = None
    side: Float[Tensor, "point 2"] | None = None

    def nodes(self, x: Float[Tensor, "point 2"], sigma: float, *, fine: bool = False) -> Nodes:
        """The quadrature nodes of the noise, in standard deviations, for some of the points; `fine` uses more nodes."""
        if self.kinks is None:
            return hermite(40 if fine else 32)
        w = torch.cat((self.student.w, self.teacher.w))
        size = w.norm(dim=1)
        offsets = (x @ w.T + torch.cat((self.student.b, self.teacher.b))) / size / sigma
        count = 7 if self.side is None else 12  # many points, or one
        return kinked(offsets, w / size[:, None], count + 2 * fine)


def location(column: str, seed: int, sigma: float) -> Location:
    """The pair and the points of a column; only the points of an average depend on σ."""
    if column not in COLUMNS:
        raise unknown_name("A column of `reproduce propositions`", column, COLUMNS)
    return COLUMNS[column](torch.Generator().manual_seed(1000 + seed), sigma)


def _smooth(generator: torch.Generator, sigma: float) -> Location:
    student = Shallow.draw(6, functional.softplus, generator)
    return _at_a_point(student, Shallow.draw(6, torch.tanh, generator), generator)


def _linear(generator: torch.Generator, sigma: float) -> Location:
    student, teacher = (Shallow.draw(3, lambda y: y, generator) for _ in range(2))
    return _at_a_point(student, teacher, generator)


def _inside(generator: torch.Generator, sigma: float) -> Location:
    """ReLU networks, every kink at least `FAR` away."""
    student, teacher = (Shallow.draw(units, torch.relu, generator) for units in (4, 5))
    at = _at_a_point(student, teacher, generator)
    return replace(at, student=_moved(student, at.x), teacher=_moved(teacher, at.x))


def _on_a_kink(generator: torch.Generator, sigma: float) -> Location:
    """The same, but the point lies on one kink of the student, a large one."""
    at = _inside(generator, sigma)
    w, b, v = at.student.w, at.student.b.clone(), at.student.v.clone()
    b[0] = -(at.x[0] @ w[0])
    v[:, 0] *= 3
    normal = w[:1] / w[0].norm()
    kinks = Kinks(at.x, normal, torch.ones(1, dtype=torch.float64))
    return replace(at, student=replace(at.student, b=b, v=v), kinks=kinks, side=1e-7 * normal)


def _at_a_point(student: Shallow, teacher: Shallow, generator: torch.Generator) -> Location:
    x = torch.randn(1, 2, generator=generator, dtype=torch.float64)
    return Location(student, teacher, x, torch.ones(1, dtype=torch.float64))


def _moved(network: Shallow, x: Float[Tensor, "point 2"]) -> Shallow:
    """The network with other biases, so that no kink is nearer to x than `FAR`; the constant changes accordingly."""
    pre, size = (x @ network.w.T + network.b)[0], network.w.norm(dim=1)
    moved = replace(network, b=network.b + pre.sign() * FAR * size)
    return replace(moved, c=moved.c + (network(x) - moved(x))[0])


def _average(generator: torch.Generator, sigma: float) -> Location:
    """ReLU networks, all points of a line of length `LENGTH` that crosses three kinks, one at a time."""
    student, teacher, start, e = _line(generator.initial_seed())
    w = torch.cat((student.w, teacher.w))
    size, speed = w.norm(dim=1), w @ e
    at = -(w @ start + torch.cat((student.b, teacher.b))) / speed
    crossed = (at > 0) & (at < LENGTH)
    slant = (speed / size)[crossed].abs()
    t, weights = segments(_cuts(at[crossed], slant, sigma), 5)
    kinks = Kinks(start + at[crossed, None] * e, (w / size[:, None])[crossed], 1 / (LENGTH * slant))
    return Location(student, teacher, start + t[:, None] * e, weights / LENGTH, kinks)


@lru_cache(maxsize=16)
def _line(seed: int) -> tuple[Shallow, Shallow, Tensor, Tensor]:
    """Return student, teacher, start and direction of the line: the first for which all kinks are well separated."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        student, teacher = (Shallow.draw(units, torch.relu, generator) for units in (4, 5))
        e = torch.randn(2, generator=generator, dtype=torch.float64)
        e = e / e.norm()
        start = -e * LENGTH / 2 + 0.3 * torch.randn(2, generator=generator, dtype=torch.float64)
        if _is_clear(torch.cat((student.w, teacher.w)), torch.cat((student.b, teacher.b)), start, e):
            return student, teacher, start, e


def _is_clear(
    w: Float[Tensor, "unit 2"], b: Float[Tensor, "unit"], start: Float[Tensor, "2"], e: Float[Tensor, "2"]
) -> bool:
    """Whether three kinks are crossed, none at a small angle, near another or near an end of the line."""
    size, speed = w.norm(dim=1), w @ e
    offsets = w @ start + b
    ends = torch.minimum(offsets.abs(), (offsets + LENGTH * speed).abs()) / size
    at = -offsets / speed
    crossed = (at > 0) & (at < LENGTH)
    return (
        int(crossed.sum()) == 3
        and float((speed / size)[crossed].abs().min()) > 0.4
        and float(at[crossed].sort().values.diff().min()) > _GAP
        and float(ends.min()) > _GAP
    )


def _cuts(at: Float[Tensor, "crossing"], slant: Float[Tensor, "crossing"], sigma: float) -> Float[Tensor, "cut"]:
    """Return the cuts of the line: at kinks, close to them, and otherwise at each quarter."""
    steps = torch.tensor([0.0, 0.7, 1.5, 2.5, 4.0, 7.5], dtype=torch.float64)
    around = at[:, None] + torch.cat((-steps, steps)) * sigma / slant[:, None]
    even = torch.linspace(0, LENGTH, 13, dtype=torch.float64)
    return torch.cat((around.flatten().clamp(0, LENGTH), even)).sort().values


SMOOTH, LINEAR, INSIDE = "smooth", "linear", "ReLU, inside a region"
AVERAGE, ON_A_KINK = "ReLU, average over points", "ReLU, at a kink"

COLUMNS: dict[str, Callable[[torch.Generator, float], Location]] = {
    SMOOTH: _smooth,
    LINEAR: _linear,
    INSIDE: _inside,
    AVERAGE: _average,
    ON_A_KINK: _on_a_kink,
}
"""The columns by name."""
