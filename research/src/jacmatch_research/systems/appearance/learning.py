"""A network that predicts the result of the derivative-free fitter, which is a black box, in one pass.

Derivatives are antithetic differences along directions in which windows vary: the change of a window under a small
change of the pose. The fitter's result jumps where it reaches another minimum, so the difference with half the step is
compared with that of the whole step.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacmatch.datasets import Split
from jacmatch.jacobian import jvp_products
from jacmatch.objectives import GradientShare, LossWeights, Terms
from jacmatch.objectives.terms import jacobian_term, output_term
from jacmatch.teachers import BlackBoxTeacher, Question
from jacmatch.training import Training, fit
from jacmatch_research.systems.appearance.faces import Array, Faces
from jacmatch_research.systems.appearance.model import REACH, UNIT, WINDOW, Model, by_newuoa, composed, pose_of, windows
from jacmatch_research.systems.second_order import minimize_by_lbfgs

SPREAD = (0.5, 0.5, 1.0, 1.0)
"""Standard deviations of the first guess of scale, rotation and position, in tenths, for training windows."""
_STEP = 0.5  # step of a difference, as a share of these
_REFUSED = 1.5  # a fit whose cost exceeds this multiple of the median has failed, and is not used for training
_JUMPED = 4.0  # a derivative above this multiple of the median is left out
_DECAYS = (1e3, 1e2, 1e1, 1.0)  # weight decays of the second-order solver, toward the fixed Jacobian


class Glance(nn.Module):
    """Parameters of a fit after a few steps on a window: p₀ = 0 and pₖ₊₁ = pₖ + Aₖ g(pₖ), with affine maps A.

    g(p) is the texture at p less the mean texture. Each step samples the window at the parameters of the previous step,
    so the function is far from affine. It can be differentiated with respect to the window.
    """

    mean: Tensor
    modes: Tensor
    texture: Tensor

    def __init__(self, model: Model, *, looks: int = 3, dropout: float = 0.0, update: Array | None = None) -> None:
        """Build the network for a model of appearance; `dropout` is the share of the texture that is left out.

        If `update` is R (parameter, pixel) of a fixed Jacobian, the maps are initialized as its steps p ← p − R r(p),
        otherwise as 0.
        """
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(model.weights @ model.mean).float())
        self.register_buffer("modes", torch.from_numpy(model.weights @ model.modes).float())
        self.register_buffer("texture", torch.from_numpy(model.texture).float())
        self.dropout = nn.Dropout(dropout)
        self.parameters_of_fit = model.parameters
        self.maps = nn.ModuleList(nn.Linear(len(model.texture), model.parameters) for _ in range(looks))
        for weight in self.maps.parameters():
            nn.init.zeros_(weight)
        if update is not None:
            unexplained = update - (update @ model.textures.T) @ model.textures
            with torch.no_grad():
                for weight in self.maps.parameters():
                    if weight.ndim == 2:
                        weight.copy_(torch.from_numpy(-unexplained))

    def forward(self, x: Float[Tensor, "window pixel"]) -> Float[Tensor, "window parameter"]:
        """Parameters for windows (window, WINDOW²)."""
        return self.after_each(x)[:, -self.parameters_of_fit :]

    def after_each(self, x: Float[Tensor, "window pixel"]) -> Float[Tensor, "window answer"]:
        """The parameters after each step, concatenated."""
        p = x.new_zeros(len(x), self.parameters_of_fit)
        answers = []
        for each in self.maps:
            p = p + each(self.dropout(self.sampled(x, p) - self.texture))
            answers.append(p)
        return torch.cat(answers, 1)

    def sampled(self, x: Float[Tensor, "window pixel"], p: Float[Tensor, "window parameter"]) -> Tensor:
        """The texture (window, pixel) at parameters p, as `Model.sampled` has it."""
        plain = self.mean + torch.tensordot(p[:, 4:], self.modes, 1)
        real, turned, right, down = (UNIT * p[:, :4]).T[..., None]
        across = (1 + real) * plain[..., 0] - turned * plain[..., 1] + right
        along = turned * plain[..., 0] + (1 + real) * plain[..., 1] + down
        scale, last = (WINDOW - 1) / (2 * REACH), WINDOW - 1.001
        u, v = (((each + REACH) * scale).clamp(0, last) for each in (across, along))
        left, top = u.detach().floor(), v.detach().floor()
        at = (top * WINDOW + left).long()
        corners = [x.gather(1, at + step) for step in (0, 1, WINDOW, WINDOW + 1)]
        u, v = u - left, v - top
        upper, lower = (one + u * (other - one) for one, other in (corners[:2], corners[2:]))
        g = upper + v * (lower - upper)
        g = g - g.mean(1, keepdim=True)
        scaled: Tensor = g / (g.square().mean(1, keepdim=True) + 1e-8).sqrt()
        return scaled


@dataclass(frozen=True)
class Lesson:
    """Windows (window, pixel), the fitter's parameters for them, and the number of its calls, with failed fits.

    Directions (direction, window, pixel) and the differences along them are empty without derivatives.
    """

    x: Float[Tensor, "window pixel"]
    y: Float[Tensor, "window parameter"]
    directions: Float[Tensor, "direction window pixel"]
    derivatives: Float[Tensor, "direction window parameter"]
    fits: int


def lesson(
    model: Model, shown: Faces, *, directions: int, seed: int, known: dict[bytes, Array] | None = None
) -> Lesson:
    """Run the fitter on windows around each face, and on `directions` antithetic pairs for each window.

    Fits that cost more than 1.5 times the median are left out, and derivatives longer than 4 times the median are zero
    with their directions: there the fitter has failed or jumped. A face's window does not depend on the number of
    faces. Results in `known` are not computed again, and new results are added to it.
    """
    random = np.random.default_rng(seed)
    poses = displaced(model, shown, random.normal(0, SPREAD, (len(shown), 4)))
    x = _flat(windows(shown.images, poses))
    black_box = BlackBoxTeacher(fitter(model, known), arrays="numpy")
    along = torch.zeros(0, *x.shape)
    if directions:
        sides = []
        for _ in range(directions):
            change = _STEP * random.normal(0, SPREAD, (len(shown), 4))
            up, down = (_flat(windows(shown.images, _changed(poses, sign * change))) for sign in (1, -1))
            sides.append((up - down) / 2)
        along = torch.stack(sides)
        answer = black_box.answer(x, Question(tangents=along, step=1.0))
    else:
        answer = black_box.answer(x)
    y = answer.outputs
    derivatives = torch.zeros(0, *y.shape, dtype=y.dtype) if answer.products is None else answer.products
    if directions:
        long = derivatives.norm(dim=2) > _JUMPED * derivatives.norm(dim=2).median()
        along, derivatives = (each.masked_fill(long[..., None], 0.0) for each in (along, derivatives))
    cost = model.cost(x.double().numpy().reshape(-1, WINDOW, WINDOW), y.double().numpy())
    good = torch.from_numpy(cost <= _REFUSED * np.median(cost))
    return Lesson(x[good], y[good].float(), along[:, good], derivatives[:, good].float(), len(x) * (1 + 2 * directions))


def fitter(model: Model, known: dict[bytes, Array] | None = None) -> Any:
    """NEWUOA as a function of a batch of windows (window, pixel); results in `known` are not computed again."""
    known = {} if known is None else known

    def answer(x: Array) -> Array:
        for window in x:
            if (key := window.tobytes()) not in known:
                known[key] = by_newuoa(model, window.reshape(1, WINDOW, WINDOW).astype(float)).p[0]
        return np.stack([known[window.tobytes()] for window in x])

    return answer


def jumps(model: Model, examples: Lesson, count: int) -> float:
    """Share of derivatives that halving the step changes by more than half of their length: the fitter jumps there."""
    x, along, whole = examples.x[:count], examples.directions[:, :count], examples.derivatives[:, :count]
    black_box = BlackBoxTeacher(fitter(model), arrays="numpy")
    half = black_box.answer(x, Question(tangents=along, step=0.5)).products
    assert half is not None
    apart = (half.float() - whole).norm(dim=2)
    return float((apart > 0.5 * whole.norm(dim=2)).float().mean())


def distilled(
    model: Model,
    examples: Lesson,
    *,
    share: float,
    steps: int,
    seed: int,
    update: Array | None = None,
    evaluations: int = 0,
) -> Glance:
    """Train a student on the fitter's results; derivatives make up `share` of the gradient norm where there are any.

    With `evaluations` the second-order solver trains, on values alone and without dropout.
    """
    if evaluations:
        student = Glance(model, update=update).double()
        values, x, y = AlongDirections(student, examples, 0.0).eval(), examples.x.double(), examples.y.double()
        minimize_by_lbfgs(
            student,
            lambda ids: values(x[ids], y[ids], ids=ids)["loss"],
            len(x),
            evaluations=evaluations,
            seed=seed,
            decays=_DECAYS,
        )
        return student.float().eval()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        student = Glance(model, dropout=0.5, update=update)
    objective = AlongDirections(student, examples, share if len(examples.directions) else 0.0)
    settings = Training(steps=steps, batch_size=50, lr=1e-3, optimizer="adamw", weight_decay=1.0)
    fit(objective, Split(examples.x, examples.y), settings, seed=seed)
    return student.eval()


class AlongDirections(nn.Module):
    """Loss of values and derivatives along directions u after each step: means of Σₖ(ŷₖ − yₖ)² + w Σₖ((Ĵu)ₖ − sₖ)²."""

    def __init__(self, student: Glance, examples: Lesson, share: float) -> None:
        """Store the directions and derivatives of a training set, and their share of the gradient norm."""
        super().__init__()
        self.student, self.calls = student, 0
        self.known = (examples.directions, examples.derivatives)
        self.loss_weights = LossWeights(
            {"values": 1.0, "jacobians": GradientShare(share)} if share else {"values": 1.0}
        )

    def forward(
        self,
        x: Float[Tensor, "window pixel"],
        y: Float[Tensor, "window parameter"],
        *,
        ids: Int[Tensor, "window"],
        **_: Any,
    ) -> Terms:
        """The terms of a batch."""
        terms = {}
        looks = len(self.student.maps)
        if "jacobians" in self.loss_weights.weights:
            directions, derivatives = (each[:, ids] for each in self.known)
            results = jvp_products(self.student.after_each, x, directions, engine="forward")
            outputs = results.outputs
            terms["jacobians"] = jacobian_term("squared", results.products, derivatives.repeat(1, 1, looks))
        else:
            outputs = self.student.after_each(x)
        terms["values"] = output_term("squared", outputs, y.repeat(1, looks), 1.0)
        learns = self.training and torch.is_grad_enabled()  # a call without gradients uses up no measurement
        if learns and self.calls % 100 == 0:
            self.loss_weights.measure(terms, [*self.student.parameters()])
        self.calls += learns
        weighted = self.loss_weights.weigh(terms)
        total = torch.stack(list(weighted.values())).sum()
        return Terms({"loss": total, **weighted}, outputs, y, terms, dict(self.loss_weights.shares))


def seen(student: nn.Module, images: Array, poses: Array) -> Array:
    """The student's prediction for images: parameters relative to the poses of the windows."""
    with torch.no_grad():
        results: Array = student(_flat(windows(images, poses))).double().numpy()
    return results


def displaced(model: Model, shown: Faces, change: Array) -> Array:
    """Poses of faces that differ from the true ones by `change` (face, 4), in tenths of the unit of their frame."""
    return _changed(pose_of(model, shown.landmarks), change)


def _changed(poses: Array, change: Array) -> Array:
    return composed(change, poses)


def _flat(shown: Array) -> Tensor:
    return torch.from_numpy(shown.reshape(len(shown), -1)).float()
