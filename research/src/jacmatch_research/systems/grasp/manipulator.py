"""The hand as a parallel manipulator: two equations for each leg, A ẋ = B q̇, and the pose as an implicit function.

Of leg i, with contact c, knuckle b, knee k and the normal n of its plane: n·(c − b) = 0, and |c − k|² = l². They
contain no tips, no forces and no knee angle, and share only the positions of the joints with `hand`.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from jacmatch.errors import InputError
from jacmatch.jacobian import jacobian
from jacmatch_research.systems.grasp.hand import FINGERS, Hand, ObjectPose
from jacmatch_research.systems.kinematics.chain import rotation_vector, skew

_HOMOTOPY, _NEWTON, _CLOSED = 16, 5, 1e-12
_FARTHEST, _LOOKS, _HALVINGS = 1.5, 200, 50


def constraints(hand: Hand, object_pose: ObjectPose, driven: Float[Tensor, "grasp 6"]) -> Float[Tensor, "grasp 6"]:
    """F(x, q), in units of a length: n·(c − b) and (|c − k|² − l²)/2l for each leg; 0 where the legs are closed."""
    base, knee, _, normal = _legs(hand, driven)
    contact = hand.contacts(object_pose)
    plane = (normal * (contact - base)).sum(-1)
    length = ((contact - knee).square().sum(-1) - hand.distal**2) / (2 * hand.distal)
    return torch.stack((plane, length), -1).flatten(1)


def matrices(
    hand: Hand, object_pose: ObjectPose, driven: Float[Tensor, "grasp 6"]
) -> tuple[Float[Tensor, "grasp 6 6"], Float[Tensor, "grasp 6 6"]]:
    """Return A and B of A ẋ = B q̇: derivatives of F w.r.t. the object's twist, and minus those w.r.t. the joints."""
    base, knee, aside, normal = _legs(hand, driven)
    contact = hand.contacts(object_pose)
    arm, leg = contact - object_pose.p[:, None], (contact - knee) / hand.distal
    lines = torch.stack((normal, leg), 2)
    moments = torch.linalg.cross(arm[:, :, None].expand_as(lines), lines)
    a = torch.cat((lines, moments), -1).flatten(1, 2)
    b = torch.zeros(len(driven), FINGERS, 2, FINGERS, 2, dtype=driven.dtype)
    first = torch.linalg.cross(aside, knee - base)
    second = torch.linalg.cross(normal, knee - base)
    for i in range(FINGERS):
        b[:, i, 0, i, 0] = -(torch.linalg.cross(aside, normal) * (contact - base)).sum(-1)[:, i]
        b[:, i, 1, i, 0] = (leg * first).sum(-1)[:, i]
        b[:, i, 1, i, 1] = (leg * second).sum(-1)[:, i]
    return a, b.flatten(3, 4).flatten(1, 2)


def by_manipulator(hand: Hand, object_pose: ObjectPose, driven: Float[Tensor, "grasp 6"]) -> Float[Tensor, "grasp 6 6"]:
    """A⁻¹B, from velocities of the driven joints to twists of the object; τ = (A⁻¹B)ᵀw by duality.

    Raises:
        torch.linalg.LinAlgError: a grasp is exactly singular.
    """
    a, b = matrices(hand, object_pose, driven)
    twists: Tensor = torch.linalg.solve(a, b)
    return twists


def regularity(hand: Hand, object_pose: ObjectPose, driven: Float[Tensor, "grasp 6"]) -> Float[Tensor, "grasp"]:
    """The smallest singular value of A, its moments in units of the grip's radius; 0 at a singular grasp."""
    a, _ = matrices(hand, object_pose, driven)
    unit = torch.tensor([1.0] * 3 + [1 / hand.grip] * 3, dtype=a.dtype)
    values: Tensor = torch.linalg.svdvals(a * unit)
    return values[:, -1]


def pose(hand: Hand, driven: Float[Tensor, "grasp 6"]) -> tuple[ObjectPose, Bool[Tensor, "grasp"]]:
    """Follow the object by Newton's method while the joints move from rest in a straight line; return pose and success.

    The equations have several solutions (assembly modes). The solution that is followed from rest is lost if A becomes
    singular on the way: its determinant then changes sign, or the legs no longer close.
    """
    rest = hand.rest()
    start = hand.joints(rest)[..., :2].flatten(1)
    p, r = rest.p.expand(len(driven), 3), rest.r.expand(len(driven), 3, 3)
    retained = torch.ones(len(driven), dtype=torch.bool)
    side = torch.linalg.det(matrices(hand, rest, start)[0]).sign()
    for step in range(1, _HOMOTOPY + 1):
        q = start + step / _HOMOTOPY * (driven - start)
        for _ in range(_NEWTON):
            a, _ = matrices(hand, ObjectPose(p, r), q)
            twist, _ = torch.linalg.solve_ex(a, -constraints(hand, ObjectPose(p, r), q)[..., None])
            twist = torch.where(retained[:, None], torch.nan_to_num(twist[..., 0], posinf=0.0, neginf=0.0), 0.0)
            p, r = p + twist[:, :3], rotation(twist[:, 3:]) @ r
        closed = constraints(hand, ObjectPose(p, r), q).abs().amax(1) <= _CLOSED
        retained = retained & closed & (torch.linalg.det(matrices(hand, ObjectPose(p, r), q)[0]).sign() == side)
    return ObjectPose(p, r), retained


def coordinates(hand: Hand, object_pose: ObjectPose) -> Float[Tensor, "grasp 6"]:
    """The outputs of a student: the object's center relative to rest in meters, and its rotation vector φ."""
    return torch.cat((object_pose.p - hand.rest().p, rotation_vector(object_pose.r)), 1)


def twist_of(y: Float[Tensor, "grasp 6"]) -> Float[Tensor, "grasp 6 6"]:
    """T(y) with (v, ω) = T ẏ: 1 for the center, the left Jacobian of SO(3) at φ for the rotation vector.

    L(φ) = 1 + (1 − cos|φ|)/|φ|² [φ]ₓ + (|φ| − sin|φ|)/|φ|³ [φ]ₓ².
    """
    phi = y[:, 3:]
    angle = phi.norm(dim=1)[:, None, None].clamp_min(1e-4)  # below, the coefficients are constant to 1e-9
    k = skew(phi)
    left = torch.eye(3, dtype=y.dtype) + (1 - angle.cos()) / angle**2 * k + (angle - angle.sin()) / angle**3 * (k @ k)
    whole = torch.eye(6, dtype=y.dtype).repeat(len(y), 1, 1)
    whole[:, 3:, 3:] = left
    return whole


def pose_jacobian(hand: Hand, object_pose: ObjectPose, driven: Float[Tensor, "grasp 6"]) -> Float[Tensor, "grasp 6 6"]:
    """The Jacobian of `coordinates` w.r.t. the driven joints, T⁻¹A⁻¹B, without differentiating Newton's iteration."""
    results: Tensor = torch.linalg.solve(
        twist_of(coordinates(hand, object_pose)), by_manipulator(hand, object_pose, driven)
    )
    return results


def rotation(vector: Float[Tensor, "grasp 3"]) -> Float[Tensor, "grasp 3 3"]:
    """The rotation about each vector by an angle equal to its length (Rodrigues)."""
    matrices: Tensor = torch.linalg.matrix_exp(skew(vector))
    return matrices


def drawn(hand: Hand, count: int, seed: int, reach: float | int, least: float | int = 0.0) -> Float[Tensor, "grasp 6"]:
    """Driven joints, uniform within ±reach radians of rest, whose legs close with at least this `regularity`."""
    generator = torch.Generator().manual_seed(seed)
    rest = hand.joints(hand.rest())[..., :2].flatten(1)
    results: list[Tensor] = []
    while sum(map(len, results)) < count:
        q = rest + reach * (2 * torch.rand(count, 6, generator=generator, dtype=torch.float64) - 1)
        object_pose, closed = pose(hand, q)
        outward = (hand.joints(object_pose)[..., :2].flatten(1) - q).abs().amax(1) < 1e-6  # outwards, as at rest
        results.append(q[closed & outward & (regularity(hand, object_pose, q) >= least)])
    return torch.cat(results)[:count]


def _legs(hand: Hand, driven: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Knuckles, knees, first axes and normals of the legs."""
    q = driven.reshape(-1, FINGERS, 2)
    at = hand.points(torch.cat((q, torch.zeros_like(q[..., :1])), -1))
    return at.base, at.knee, at.aside, at.bend


def toward_singular(
    hand: Hand, count: int, seed: int, shares: tuple[float, ...]
) -> tuple[ObjectPose, Float[Tensor, "grasp 6"]]:
    """Grasps on the way to singular ones: poses and driven joints, (direction, share) flattened.

    The object moves from rest in random directions (a radian counts as the grip's radius) until det A changes its sign,
    by bisection. Directions in which it gets out of reach earlier are left out. Shares are fractions of this path,
    below 1.

    Raises:
        InputError: too few directions end at a singular grasp.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(20 * count, 6, generator=generator, dtype=torch.float64)
    direction = direction / direction.norm(dim=1, keepdim=True)
    side = _side(hand, 0 * direction)
    ways = torch.linspace(0, _FARTHEST, _LOOKS, dtype=torch.float64)
    sides = torch.stack([_side(hand, way * direction) for way in ways])
    first = (sides != side).double().argmax(0)  # NaN where out of reach, which is neither side
    ends = (first > 0) & (sides.gather(0, first[None])[0] == -side)
    if int(ends.sum()) < count:
        raise InputError("`count` of `toward_singular` is more than the directions found.", got=count)
    direction, first = direction[ends][:count], first[ends][:count]
    near, far = ways[first - 1], ways[first]
    for _ in range(_HALVINGS):
        middle = (near + far) / 2
        before = _side(hand, middle[:, None] * direction) == side[0]
        near, far = torch.where(before, middle, near), torch.where(before, far, middle)
    offsets = torch.stack([share * near[:, None] * direction for share in shares], 1).flatten(0, 1)
    object_pose = _moved(hand, offsets)
    return object_pose, hand.joints(object_pose)[..., :2].flatten(1)


def _moved(hand: Hand, offsets: Tensor) -> ObjectPose:
    """Rest moved by offsets whose rotations are in units of the grip's radius."""
    return ObjectPose(hand.rest().p + hand.grip * offsets[:, :3], rotation(offsets[:, 3:]))


def _side(hand: Hand, offsets: Tensor) -> Tensor:
    """The sign of det A, NaN where the object is out of reach."""
    object_pose = _moved(hand, offsets)
    q = hand.joints(object_pose)
    sign = torch.linalg.det(matrices(hand, object_pose, q[..., :2].flatten(1).nan_to_num())[0]).sign()
    return torch.where(q.isnan().flatten(1).any(1), math.nan, sign)


_PATH, _STEPS, _LAST, _LONGEST = 8, 3, 6, 0.3  # intermediate targets, steps for each and for the last, largest step


class Inverse(nn.Module):
    """q ↦ y with f(y) = q for a network f, by Newton's method from `start`; its Jacobian is that of f, inverted.

    Intermediate targets lie on a straight line from f(start) to q; each is solved from the solution of the previous
    one. The last step is y + J⁻¹(q − f(y)) with y and J constant, so that automatic differentiation gives J⁻¹ and does
    not differentiate the iteration.
    """

    def __init__(self, network: nn.Module, start: Float[Tensor, "coordinate"]) -> None:
        super().__init__()
        self.network, self.start = network.double(), start.double()

    def forward(self, q: Float[Tensor, "grasp joint"]) -> Float[Tensor, "grasp coordinate"]:
        """Coordinates of the pose."""
        goal = q.detach().double()
        y = self.start.expand(len(goal), -1)
        first = self._linearized(y)[0]
        for number in range(1, _PATH + 1):
            target = first + number / _PATH * (goal - first)
            for _ in range(_LAST if number == _PATH else _STEPS):
                reached, j = self._linearized(y)
                step = torch.linalg.solve(j, (target - reached)[..., None])[..., 0]
                y = y + step * (_LONGEST / step.abs().amax(1, keepdim=True).clamp_min(_LONGEST))
        reached, j = self._linearized(y)
        solution: Tensor = y + torch.linalg.solve(j, (q.double() - reached)[..., None])[..., 0]
        return solution.to(q.dtype)

    def _linearized(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(y) and the Jacobian of f at y, as constants."""
        reached, j = jacobian(self.network, y)
        return reached.detach(), j.detach()
