"""The statements about noise and Jacobians: a mean under noise, and the second-order term of the statement.

Each says that a mean over noise ξ ~ N(0, σ²I) is a value without noise, plus σ² times a term of derivatives, plus
an expansion error. The losses are those of `jacmatch.losses`, the derivatives those of `jacmatch.jacobian`; second
derivatives, where a statement needs them, are Jacobians of Jacobians.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jacmatch import losses
from jacmatch.jacobian import jacobian
from jacmatch_research.reproduce.shallow_pairs import Function, Location, Nodes

LABEL = 0
"""The class of every point."""


@dataclass(frozen=True)
class Setting:
    """Two networks at points x, and their derivatives there; `side` as in `Location`.

    The student takes points, or several positions around each point.
    """

    student: Function
    teacher: Function
    x: Float[Tensor, "point 2"]
    side: Float[Tensor, "point 2"] | None = None

    @staticmethod
    def at(location: Location, x: Float[Tensor, "point 2"]) -> "Setting":
        """The pair at some points of a location."""
        return Setting(location.student, location.teacher, x, location.side)

    def agreeing(self) -> "Setting":
        """The student shifted by a constant at each point, so that its values equal the teacher's there."""
        shift = (self.teacher(self.x) - self.student(self.x)).detach()
        student = self.student

        def moved(y: Tensor) -> Tensor:
            return student(y) + shift.view(len(shift), *[1] * (y.dim() - 2), -1)

        return replace(self, student=moved)

    def rows(self, function: Function) -> Float[Tensor, "point row 2"]:
        """The Jacobian; on a kink the mean of both sides."""
        return self._of_sides(lambda x: jacobian(function, x)[1])

    def laplacians(self, function: Function) -> Float[Tensor, "point row"]:
        """Traces of the second derivatives, without the contribution of kinks; on a kink the mean of both sides."""
        return self._of_sides(laplacian_of(function))

    def _of_sides(self, derivative: Function) -> Tensor:
        if self.side is None:
            return derivative(self.x).detach()
        return (derivative(self.x + self.side) + derivative(self.x - self.side)).detach() / 2

    @property
    def p(self) -> Function:
        """The teacher's probabilities."""
        return lambda y: self.teacher(y).softmax(-1)

    @property
    def q(self) -> Function:
        """The student's probabilities."""
        return lambda y: self.student(y).softmax(-1)


Loss = Callable[[Setting, Tensor], Tensor]
"""A loss at positions around each point, (point, position, 2) → (point, position)."""


def euclidean(at: Setting, jump: Float[Tensor, "point out"]) -> Float[Tensor, "point"]:
    """Σ_k κ_k²."""
    return jump.square().sum(1)


def half_variance(at: Setting, jump: Float[Tensor, "point out"]) -> Float[Tensor, "point"]:
    """½ Σ_k p_k (κ_k − Σ_j p_j κ_j)², the second order of KL in the logits."""
    p = at.p(at.x)
    return 0.5 * (p * (jump - (p * jump).sum(1, keepdim=True)).square()).sum(1)


@dataclass(frozen=True)
class Statement:
    """A statement.

    Attributes:
        name: Name in the table.
        family: Targets of the student.
        printed: The order of the expansion error as printed in the paper.
        increase: The increase under noise, from the setting, the noise and its weights.
        term: The alleged coefficient of σ².
        loss: The averaged loss; None where it is not a mean of one loss.
        agreeing: Whether the student has the teacher's values at each point.
        at_kinks: If the loss itself has no kink, the contribution of a kink of the logits, as factors of ‖κ‖², with κ
            the jump of their derivatives: the factor of σ³ times the density of kinks in an average over points, and of
            σ² on the kink.
        metric: ‖κ‖² in the norm of the loss.
        fourth: The coefficient of σ⁴, for a statement without a loss.
    """

    name: str
    family: str
    printed: str
    increase: Callable[[Setting, Nodes, float], Tensor]
    term: Callable[[Setting], Tensor]
    loss: Loss | None = None
    agreeing: bool = False
    at_kinks: tuple[float, float] | None = None
    metric: Callable[[Setting, Tensor], Tensor] = euclidean
    fourth: Callable[[Setting], Tensor] | None = None


def rows_of(function: Function) -> Function:
    """The rows of the function's Jacobian as a function, (batch, 2) → (batch, row · 2).

    A zero times a power of the input is added, so that the derivatives of a linear function still depend on the input
    in autograd.
    """
    return lambda x: jacobian(function, x)[1].flatten(1) + 0 * x.pow(4).sum(1, keepdim=True)


def laplacian_of(function: Function) -> Function:
    """The function's Laplacian as a function, (batch, 2) → (batch, row)."""

    def laplacian(x: Tensor) -> Tensor:
        second = jacobian(rows_of(function), x)[1]
        return second.view(len(x), -1, 2, 2).diagonal(dim1=2, dim2=3).sum(2)

    return laplacian


def _around(at: Setting, nodes: Nodes, sigma: float, sign: int = 1) -> Float[Tensor, "point node 2"]:
    return at.x[:, None] + sign * sigma * nodes.z


def _flat(values: Float[Tensor, "point place out"]) -> Float[Tensor, "sample out"]:
    return values.flatten(0, 1)


def squared_outputs(at: Setting, y: Float[Tensor, "point place 2"]) -> Float[Tensor, "point place"]:
    """The paper's loss at noisy inputs, one draw for each position."""
    student, teacher = (_flat(f(y))[None] for f in (at.student, at.teacher))
    return losses.noise_distillation(student, teacher).view(y.shape[:2])


def squared_labels(at: Setting, y: Float[Tensor, "point place 2"]) -> Float[Tensor, "point place"]:
    """Squared error with the one-hot label."""
    student = _flat(at.student(y))
    return losses.squared_error(student, one_hot(student)).view(y.shape[:2])


def soft_cross_entropy(at: Setting, y: Float[Tensor, "point place 2"]) -> Float[Tensor, "point place"]:
    """Cross-entropy with the teacher's probabilities at the same position."""
    return losses.cross_entropy(_flat(at.student(y)), _flat(at.p(y))).view(y.shape[:2])


def kl(at: Setting, y: Float[Tensor, "point place 2"]) -> Float[Tensor, "point place"]:
    """KL(p‖q) at the same position."""
    return losses.hinton_kl(_flat(at.student(y)), _flat(at.teacher(y))).view(y.shape[:2])


def label_cross_entropy(at: Setting, y: Float[Tensor, "point place 2"]) -> Float[Tensor, "point place"]:
    """Cross-entropy with the label."""
    student = _flat(at.student(y))
    return losses.cross_entropy(student, labels(student)).view(y.shape[:2])


def labels(outputs: Float[Tensor, "sample out"]) -> Tensor:
    """The class of each sample."""
    return torch.full((len(outputs),), LABEL)


def one_hot(outputs: Float[Tensor, "sample out"]) -> Float[Tensor, "sample out"]:
    """The classes as vectors."""
    return torch.nn.functional.one_hot(labels(outputs), outputs.shape[1]).to(outputs)


def of_loss(loss: Loss) -> Callable[[Setting, Nodes, float], Tensor]:
    """E loss(x + ξ) − loss(x)."""

    def increase(at: Setting, nodes: Nodes, sigma: float) -> Tensor:
        return (nodes.weights * (loss(at, _around(at, nodes, sigma)) - loss(at, at.x[:, None]))).sum(1)

    return increase


def variance(at: Setting, nodes: Nodes, sigma: float) -> Float[Tensor, "point"]:
    """The mean of `centered_variance` over all pairs of draws.

    For two independent draws, it is twice the mean for one draw and the mean of all draws.
    """
    y = _around(at, nodes, sigma)
    pairs = []
    for function in (at.student, at.teacher):
        values = function(y)
        mean = (nodes.weights[..., None] * values).sum(1, keepdim=True)
        pairs.append(torch.stack((_flat(values), _flat(mean.expand_as(values)))))
    return 2 * (nodes.weights * losses.centered_variance(pairs[0], pairs[1]).view(y.shape[:2])).sum(1)


def antithetic(at: Setting, nodes: Nodes, sigma: float) -> Float[Tensor, "point"]:
    """The mean of `antithetic` over draws."""
    plus, minus = _around(at, nodes, sigma), _around(at, nodes, sigma, -1)
    values = [_flat(f(y))[None] for y in (plus, minus) for f in (at.student, at.teacher)]
    return (nodes.weights * losses.antithetic(*values).view(plus.shape[:2])).sum(1)


def jacobian_distance(at: Setting) -> Float[Tensor, "point"]:
    """Σ_i ‖∇S_i − ∇T_i‖²."""
    return losses.squared_error(at.rows(at.student), at.rows(at.teacher))


def gradient_times_third(at: Setting) -> Float[Tensor, "point"]:
    """Σ_i ∇δ_i·∇Δδ_i, the antithetic pair's coefficient of σ⁴."""
    difference = _difference(at)
    return (at.rows(difference) * at.rows(laplacian_of(difference))).sum((1, 2))


def variance_fourth(at: Setting) -> Float[Tensor, "point"]:
    """Σ_i (½ ‖H_i‖²_F + ∇δ_i·∇Δδ_i), the variance's coefficient of σ⁴."""
    second = at.rows(rows_of(_difference(at)))
    return 0.5 * second.square().sum((1, 2)) + gradient_times_third(at)


def _difference(at: Setting) -> Function:
    return lambda y: at.student(y) - at.teacher(y)


def equation_2(at: Setting) -> Float[Tensor, "point"]:
    """−Σ_i ∇p_i·∇q_i / q_i."""
    return losses.paper_cross_entropy(at.rows(at.q), at.rows(at.p), at.q(at.x))


def lost_square(at: Setting) -> Float[Tensor, "point"]:
    """½ Σ_i p_i ‖∇q_i‖² / q_i²."""
    q = at.q(at.x)
    return losses.label_cross_entropy(at.rows(at.q), q, torch.zeros_like(q), at.p(at.x), 1.0)


def whole_soft_term(at: Setting) -> Float[Tensor, "point"]:
    """Equation 2, the lost square, and −½ Σ_i (Δp_i log q_i + p_i Δq_i / q_i)."""
    q, p = at.q(at.x), at.p(at.x)
    curvature = -0.5 * (at.laplacians(at.p) * q.log() + p * at.laplacians(at.q) / q).sum(1)
    return equation_2(at) + lost_square(at) + curvature


def half_fisher(at: Setting) -> Float[Tensor, "point"]:
    """½ Σ_i p_i ‖∇log q_i − ∇log p_i‖²."""
    student, teacher = at.rows(lambda y: at.q(y).log()), at.rows(lambda y: at.p(y).log())
    return 0.5 * losses.fisher(student, teacher, at.p(at.x))


def label_norm(at: Setting) -> Float[Tensor, "point"]:
    """Σ_i ‖∇S_i‖²."""
    return losses.paper_label_squared(at.rows(at.student), 1.0)


def equation_3(at: Setting) -> Float[Tensor, "point"]:
    """Σ_i y_i ‖∇q_i‖² / q_i²."""
    q = at.q(at.x)
    return losses.paper_label_cross_entropy(at.rows(at.q), q, labels(q), 1.0)


def whole_label_term(at: Setting) -> Float[Tensor, "point"]:
    """½ Σ_i y_i (‖∇q_i‖² / q_i² − Δq_i / q_i)."""
    q = at.q(at.x)
    return losses.label_cross_entropy(at.rows(at.q), q, at.laplacians(at.q), labels(q), 1.0)


def closed_form(at: Setting) -> Float[Tensor, "point"]:
    """½ Σ_i q_i ‖∇z_i − Σ_j q_j ∇z_j‖²."""
    return losses.piecewise_linear_cross_entropy(at.rows(at.student), at.q(at.x), 1.0)


ROUNDING = 5e-9
"""Relative error of the quadrature, at most."""
_CHUNK = 24  # points at once
_NOTHING = 1e-9  # relative size of a coefficient that counts as zero


@dataclass(frozen=True)
class Leading:
    """The leading order of an expansion error by theory, `coefficient` · σ^`order`; None if the statement is exact."""

    order: int | None
    coefficient: float


def expansion_error(statement: Statement, location: Location, sigma: float, *, fine: bool = False) -> float:
    """Mean over the points of the increase under noise, minus σ² times the term."""
    total = 0.0
    for rows in torch.split(torch.arange(len(location.x)), _CHUNK):
        at = _setting(statement, location, location.x[rows])
        added = statement.increase(at, location.nodes(at.x, sigma, fine=fine), sigma)
        total += float(location.weights[rows] @ (added - sigma**2 * statement.term(at)).detach())
    return total


def size_of_term(statement: Statement, location: Location) -> float:
    """Mean over the points of the term's magnitude, the coefficient of σ²."""
    return float(location.weights @ statement.term(_setting(statement, location, location.x)).abs())


def leading(statement: Statement, location: Location) -> Leading:
    """The order and the coefficient of the expansion error's first term that is not zero.

    With g the loss, E g(x+ξ) = g + σ²/2 Δg + σ⁴/8 ΔΔg + …; a kink adds σ²/2 times the jump of g's derivative across it
    times the density of points. At a point on the kink, it adds σ/√(2π) times the jump.
    """
    at = _setting(statement, location, location.x)
    scale = size_of_term(statement, location)
    jumps, logit_jumps = _jumps(statement, location)
    if location.kinks is not None and location.side is not None and float(jumps.abs().max()) > _NOTHING * scale:
        return Leading(1, float(jumps.sum()) / math.sqrt(2 * math.pi))
    if location.side is None:
        second = float(location.weights @ _second_order(statement, at))
        if location.kinks is not None:
            second += float(location.kinks.density @ jumps) / 2
        if abs(second) > _NOTHING * scale:
            return Leading(2, second)
    if location.kinks is not None:
        assert statement.at_kinks is not None, statement.name
        average, on_it = statement.at_kinks
        factor, order = (average, 3) if location.side is None else (on_it, 2)
        coefficient = factor * float(location.kinks.density @ logit_jumps)
        return Leading(order, coefficient) if factor else Leading(None, 0.0)
    fourth = float(location.weights @ _fourth_order(statement, at))
    return Leading(4, fourth) if abs(fourth) > _NOTHING * scale else Leading(None, 0.0)


def _setting(statement: Statement, location: Location, x: Float[Tensor, "point 2"]) -> Setting:
    at = Setting.at(location, x)
    return at.agreeing() if statement.agreeing else at


def _second_order(statement: Statement, at: Setting) -> Float[Tensor, "point"]:
    """½ Δg less the term."""
    if statement.loss is None:
        return torch.zeros(len(at.x), dtype=at.x.dtype)
    return at.laplacians(_loss_at(statement, at))[:, 0] / 2 - statement.term(at)


def _fourth_order(statement: Statement, at: Setting) -> Float[Tensor, "point"]:
    """⅛ ΔΔg, or the coefficient of a form that is not a mean of one loss."""
    if statement.fourth is not None:
        return statement.fourth(at)
    return at.laplacians(laplacian_of(_loss_at(statement, at)))[:, 0] / 8


def _loss_at(statement: Statement, at: Setting) -> Callable[[Tensor], Tensor]:
    assert statement.loss is not None
    loss = statement.loss
    return lambda x: loss(at, x[:, None])


def _jumps(statement: Statement, location: Location) -> tuple[Float[Tensor, "kink"], Float[Tensor, "kink"]]:
    """Jumps of derivatives at each kink: of the loss, and of the difference of logits, squared in the metric."""
    if location.kinks is None:
        nothing = torch.zeros(0, dtype=location.x.dtype)
        return nothing, nothing
    at = _setting(statement, location, location.kinks.points)
    normals = location.kinks.normals

    def jump(function: Callable[[Tensor], Tensor]) -> Tensor:
        over, before = (jacobian(function, at.x + sign * 1e-7 * normals)[1] for sign in (1, -1))
        return ((over - before) * normals[:, None]).sum(2).detach()

    jumps = jump(lambda x: at.student(x) - at.teacher(x))
    own = (
        torch.zeros(len(normals), dtype=location.x.dtype)
        if statement.loss is None
        else jump(_loss_at(statement, at))[:, 0]
    )
    # a derivative that is continuous differs by 10⁻⁷ as well
    return torch.where(own.abs() > 1e-5, own, 0.0), statement.metric(at, jumps)


def order_of(sigmas: Sequence[float], errors: Sequence[float], term: float) -> float | None:
    """The order of convergence, d log |error| / d log σ at the three smallest σ; None if the statement is exact.

    `sigmas` descend. An expansion error below `ROUNDING` times the term (the coefficient of σ²) is regarded as the
    error of the quadrature.
    """
    points = [(s, r) for s, r in zip(sigmas, errors, strict=True) if abs(r) > ROUNDING * term * s**2][-3:]
    if len(points) < 2:
        return None
    x, y = [math.log(s) for s, _ in points], [math.log(abs(r)) for _, r in points]
    return float(np.polyfit(x, y, 1)[0])


def limit(sigmas: Sequence[float], errors: Sequence[float], order: int, following: int) -> float:
    """The coefficient of σ^`order`, from the two smallest σ, when the next order is `following`."""
    (coarse, far), (fine, near) = ((s, r / s**order) for s, r in list(zip(sigmas, errors, strict=True))[-2:])
    ratio = (coarse / fine) ** (following - order)
    return (ratio * near - far) / (ratio - 1)
