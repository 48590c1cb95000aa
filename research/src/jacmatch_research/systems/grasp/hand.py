"""A hand of three fingers with two phalanges: where knuckles, knees and tips are, and the equations of a hand.

Every finger has a knuckle with two axes (aside, then flexion) and a knee: q = (q₁, q₂, q₃) for each. Its tip holds a
point of the object without slipping and may turn there (a point contact with friction). Meters and radians; a twist is
(v, ω) of the object's center, a wrench (f, m) there.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jacmatch.errors import InputError
from jacmatch_research.systems.kinematics.chain import skew

FINGERS = 3


@dataclass(frozen=True)
class ObjectPose:
    """Centers of the object, and its rotations from its own axes to those of the palm."""

    p: Float[Tensor, "grasp 3"]
    r: Float[Tensor, "grasp 3 3"]


@dataclass(frozen=True)
class Points:
    """Knuckles, knees and tips of the fingers, and the axes that they turn about.

    The first axis of a knuckle, `aside`, is along the palm's radius; `bend`, of knuckle and knee, is normal to the
    finger's plane.
    """

    base: Float[Tensor, "grasp 3 3"]
    knee: Float[Tensor, "grasp 3 3"]
    tip: Float[Tensor, "grasp 3 3"]
    aside: Float[Tensor, "grasp 3 3"]
    bend: Float[Tensor, "grasp 3 3"]


@dataclass(frozen=True)
class Hand:
    """Three fingers at equal angles on a round palm (z points away from it), and a ring of contacts on an object.

    The phalanges are as long as those of the Barrett hand (BH8 series: 70 mm and 58 mm); two axes in each knuckle are
    as in the Salisbury hand (Mason & Salisbury 1985). The radii on which knuckles (`palm`) and contacts (`grip`) lie,
    and the height of the object's center above the palm at rest, are our choice.
    """

    proximal: float = 0.070
    distal: float = 0.058
    palm: float = 0.050
    grip: float = 0.045
    height: float = 0.115

    def __post_init__(self) -> None:
        if min(self.proximal, self.distal, self.palm, self.grip, self.height) <= 0:
            raise InputError("Lengths of `Hand` must be above 0.", got=self)

    def rest(self) -> ObjectPose:
        """The object straight above the palm."""
        return ObjectPose(
            torch.tensor([[0.0, 0, self.height]], dtype=torch.float64), torch.eye(3, dtype=torch.float64)[None]
        )

    def contacts(self, object_pose: ObjectPose) -> Float[Tensor, "grasp 3 3"]:
        """Contact points on the object, in the palm's axes."""
        return object_pose.p[:, None] + self.grip * torch.einsum("gij,fj->gfi", object_pose.r, self._axes()[0])

    def points(self, q: Float[Tensor, "grasp 3 3"]) -> Points:
        """Points and axes of the fingers, by finger and joint."""
        radial, _, up = self._axes()
        c, s = q[..., :1].cos(), q[..., :1].sin()
        along = c * up + s * torch.linalg.cross(radial, up)  # the finger, when it is straight
        base = (self.palm * radial).expand(len(q), FINGERS, 3)
        aside = radial.expand_as(base)
        knee = base + self.proximal * _toward(along, aside, q[..., 1:2])
        tip = knee + self.distal * _toward(along, aside, q[..., 1:2] + q[..., 2:])
        return Points(base, knee, tip, aside, torch.linalg.cross(aside, along))

    def joints(self, object_pose: ObjectPose) -> Float[Tensor, "grasp 3 3"]:
        """The angles that bring the tips to the contacts, knees outwards; NaN where a contact is out of reach."""
        radial, tangent, up = self._axes()
        arm = self.contacts(object_pose) - self.palm * radial
        out, side, high = ((arm * axis).sum(-1) for axis in (radial, tangent, up))
        first = torch.atan2(-side, high)
        along, inward = torch.hypot(side, high), -out
        cosine = (along**2 + inward**2 - self.proximal**2 - self.distal**2) / (2 * self.proximal * self.distal)
        knee = torch.where(cosine.abs() <= 1, cosine, math.nan).acos()
        turned = torch.atan2(self.distal * knee.sin(), self.proximal + self.distal * knee.cos())
        return torch.stack((first, torch.atan2(inward, along) - turned, knee), -1)

    def hand_jacobian(self, q: Float[Tensor, "grasp 3 3"]) -> Float[Tensor, "grasp 9 9"]:
        """J_h, one block per finger: it maps the velocities of all nine joints to the velocities of the tips."""
        at = self.points(q)
        columns = (
            torch.linalg.cross(at.aside, at.tip - at.base),
            torch.linalg.cross(at.bend, at.tip - at.base),
            torch.linalg.cross(at.bend, at.tip - at.knee),
        )
        blocks = torch.stack(columns, -1)
        whole = torch.zeros(len(q), FINGERS, 3, FINGERS, 3, dtype=q.dtype)
        for finger in range(FINGERS):
            whole[:, finger, :, finger] = blocks[:, finger]
        return whole.flatten(3, 4).flatten(1, 2)

    def grasp_matrix(self, object_pose: ObjectPose) -> Float[Tensor, "grasp 6 9"]:
        """G: the wrench (f, Σ rᵢ × fᵢ) on the object by the forces at its contacts; Gᵀ gives their velocities."""
        arms = self.contacts(object_pose) - object_pose.p[:, None]
        forces = torch.eye(3, dtype=arms.dtype).expand(len(arms), FINGERS, 3, 3)
        return torch.cat((forces, skew(arms)), 2).transpose(1, 2).flatten(2, 3)

    def _axes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Outward, along the palm's edge, and up, at each finger."""
        angle = 2 * math.pi / FINGERS * torch.arange(FINGERS, dtype=torch.float64)
        zero = torch.zeros_like(angle)
        radial = torch.stack((angle.cos(), angle.sin(), zero), 1)
        tangent = torch.stack((-angle.sin(), angle.cos(), zero), 1)
        return radial, tangent, torch.stack((zero, zero, zero + 1), 1)


def by_hand(hand: Hand, object_pose: ObjectPose, q: Float[Tensor, "grasp 3 3"]) -> Float[Tensor, "grasp 6 6"]:
    """Return the matrix from velocities of the six knuckle joints to twists, from Gᵀẋ = J_h q̇ without the knees.

    Raises:
        torch.linalg.LinAlgError: a grasp is exactly singular.
    """
    driven, knees = _parted(hand.hand_jacobian(q))
    unknown = torch.cat((hand.grasp_matrix(object_pose).mT, -knees), 2)
    results: Tensor = torch.linalg.solve(unknown, driven)
    return results[:, :6]


def torques_by_hand(
    hand: Hand, object_pose: ObjectPose, q: Float[Tensor, "grasp 3 3"], wrench: Float[Tensor, "grasp 6"]
) -> tuple[Float[Tensor, "grasp 6"], Float[Tensor, "grasp 9"]]:
    """Torques of the knuckle joints that give the object a wrench, w = G f and τ = J_hᵀ f, and the forces f.

    The knees are free, τ = 0 there, which makes f unique: nine equations for nine forces.
    """
    driven, knees = _parted(hand.hand_jacobian(q))
    equations = torch.cat((hand.grasp_matrix(object_pose), knees.mT), 1)
    given = torch.cat((wrench, torch.zeros(len(wrench), FINGERS, dtype=wrench.dtype)), 1)
    forces = torch.linalg.solve(equations, given[..., None])[..., 0]
    return torch.einsum("gfj,gf->gj", driven, forces), forces


def _parted(jacobian: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of the knuckles, two for each finger, and those of the knees."""
    columns = jacobian.reshape(len(jacobian), 9, FINGERS, 3)
    return columns[..., :2].flatten(2), columns[..., 2]


def _toward(along: Tensor, aside: Tensor, angle: Tensor) -> Tensor:
    """The direction of a phalanx that is rotated inwards by an angle."""
    return angle.cos() * along - angle.sin() * aside
