"""Inverse kinematics by damped least squares, with given poses and Jacobians; and animations of arms."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from jacmatch.jacobian import jacobian
from jacmatch_research.systems.kinematics.chain import Chain, rotation_vector

Pose = tuple[Tensor, Tensor]
"""Positions (pose, 3) and rotations (pose, 3, 3)."""
Known = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Joint angles to positions, rotations and geometric Jacobians (pose, 6, joint)."""
LENGTH = 0.5
"""Length in meters that counts as a radian."""
NEAR = (1e-3, 2e-3)
"""Errors up to which a target is reached: one millimeter, and two milliradians."""
_SHORTEST, _LONGEST = 1e-3, 0.3  # damping where the error is 0, and the largest step of a joint in radians


@dataclass(frozen=True)
class Solved:
    """The last joint angles of an inverse kinematics, its steps, and whether the errors are at most `NEAR`."""

    q: Float[Tensor, "pose joint"]
    iterations: Int[Tensor, "pose"]
    reached: Bool[Tensor, "pose"]


def exact(chain: Chain) -> Known:
    """The chain's own poses and Jacobians."""
    return lambda q: (*chain.pose(q), chain.jacobian(q))


def of_student(student: nn.Module) -> Known:
    """Poses and Jacobians of a network with the outputs of `Chain.outputs`.

    Its nine entries of R are replaced by the nearest rotation; ω of joint i is the skew part of ∂R/∂qᵢ Rᵀ.
    """

    def known(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        predicted, j_geometric = (each.detach().double() for each in jacobian(student, q.float()))
        rotation = nearest_rotation(predicted[:, 3:].reshape(-1, 3, 3))
        turned = torch.einsum("baci,bdc->biad", j_geometric[:, 3:].reshape(len(q), 3, 3, -1), rotation)
        odd = (turned - turned.mT) / 2
        omega = torch.stack((odd[..., 2, 1], odd[..., 0, 2], odd[..., 1, 0]), 1)
        return predicted[:, :3], rotation, torch.cat((j_geometric[:, :3], omega), 1)

    return known


def exact_poses(chain: Chain, driving: Known) -> Known:
    """The chain's poses, as a sensor would measure them, with other Jacobians."""
    return lambda q: (*chain.pose(q), driving(q)[2])


def nearest_rotation(matrix: Float[Tensor, "pose 3 3"]) -> Float[Tensor, "pose 3 3"]:
    """The rotation nearest to each matrix (polar decomposition)."""
    u, _, vt = torch.linalg.svd(matrix)
    sign = torch.det(u @ vt)
    nearest: Tensor = torch.cat((u[..., :2], u[..., 2:] * sign[..., None, None]), -1) @ vt
    return nearest


def errors(pose: Pose, target: Pose) -> Float[Tensor, "pose 6"]:
    """The error with respect to the target: p* − p, and the rotation vector of R* Rᵀ."""
    return torch.cat((target[0] - pose[0], rotation_vector(target[1] @ pose[1].mT)), 1)


def is_near(missing: Float[Tensor, "pose 6"]) -> Bool[Tensor, "pose"]:
    """Whether the errors are at most `NEAR`."""
    near: Tensor = (missing[:, :3].norm(dim=1) <= NEAR[0]) & (missing[:, 3:].norm(dim=1) <= NEAR[1])
    return near


def damped_step(
    j_geometric: Float[Tensor, "pose 6 joint"], missing: Float[Tensor, "pose 6"]
) -> Float[Tensor, "pose joint"]:
    """The step Jᵀ(JJᵀ + λ²)⁻¹ e in units of `LENGTH` and radians, no joint by more than 0.3.

    λ² = 10⁻³·½eᵀe + 10⁻⁶: small near the target, and larger where the error is large.

    References:
        Sugihara 2011, IEEE Trans. Robotics 27(5), 984-991 (damping by the error).
    """
    unit = torch.tensor([1 / LENGTH] * 3 + [1.0] * 3, dtype=j_geometric.dtype)
    j, e = j_geometric * unit[:, None], missing * unit
    damping = 1e-3 * e.square().sum(1) / 2 + _SHORTEST**2
    normal = j @ j.mT + damping[:, None, None] * torch.eye(6, dtype=j.dtype)
    step: Tensor = (j.mT @ torch.linalg.solve(normal, e[..., None]))[..., 0]
    step = step * (_LONGEST / step.abs().amax(1, keepdim=True).clamp_min(_LONGEST))
    return step


def solve(
    known: Known,
    target: Pose,
    start: Float[Tensor, "pose joint"],
    limits: tuple[Float[Tensor, "joint"], Float[Tensor, "joint"]],
    *,
    iterations: int = 60,
) -> Solved:
    """Joint angles at which the driving poses are at the target, from a start, in at most `iterations` steps.

    Steps are clipped at the limits.
    """
    q = start.clone()
    count = torch.zeros(len(q), dtype=torch.int64)
    running = torch.ones(len(q), dtype=torch.bool)
    for step in range(iterations + 1):
        rows = running.nonzero()[:, 0]
        if not len(rows):
            break
        position, rotation, j_geometric = known(q[rows])
        missing = errors((position, rotation), (target[0][rows], target[1][rows]))
        near = is_near(missing)
        running[rows[near]] = False
        if step == iterations:
            break
        rows, j_geometric, missing = rows[~near], j_geometric[~near], missing[~near]
        q[rows] = torch.clamp(q[rows] + damped_step(j_geometric, missing), *limits)
        count[rows] += 1
    return Solved(q, count, ~running)


def animate(
    chain: Chain,
    known: Known,
    keys: Float[Tensor, "key animation joint"],
    *,
    cold: Float[Tensor, "joint"] | None = None,
    share: float | int = 1.0,
    frames: int = 40,
    iterations: int = 60,
) -> dict[str, Float[Tensor, "animation"]]:
    """Move from key 0 to key 1 by joints, on to the pose of key 2 by inverse kinematics, and to key 3 by joints.

    Each frame of the second part is solved from the one before (or from `cold`), and the third part begins at the last
    joint angles of the second. The path between the poses of keys 1 and 2 is that of the hand when its joints move
    between them, so it is within reach.

    Returns:
        For each animation, the largest joint step in radians at the switch to inverse kinematics (`into`), at the
        switch back (`back`), in the forward parts (`usual`), and `inside` the inverse part. `off` is the distance of
        the hand from its path in meters. `fold` is the smallest singular value of the exact Jacobian in the inverse
        part, in units of `LENGTH` and radians.
    """
    first = eased(keys[0], keys[1], frames)
    path = torch.cat((keys[1][None], eased(keys[1], keys[2], frames)))
    solved = [first[-1]]
    off, limits = [], chain.limits(share)
    for frame in path:
        target = chain.pose(frame)
        start = solved[-1] if cold is None else cold.expand_as(solved[-1])
        solved.append(solve(known, target, start, limits, iterations=iterations).q)
        off.append(errors(chain.pose(solved[-1]), target)[:, :3].norm(dim=1))
    inverse = torch.stack(solved)
    last = torch.cat((inverse[-1:], eased(inverse[-1], keys[3], frames)))
    steps = _largest(inverse)
    forward = torch.cat((_largest(first), _largest(last)))
    return {
        "into": steps[0],
        "back": _largest(last)[0],
        "usual": forward.amax(0),
        "inside": steps[1:].amax(0),
        "off": torch.stack(off).amax(0),
        "fold": folds(chain, inverse),
    }


def eased(start: Tensor, end: Tensor, frames: int) -> Float[Tensor, "frame animation joint"]:
    """From start (left out) to end, slow at both ends: 3s² − 2s³."""
    s = torch.arange(1, frames + 1, dtype=start.dtype)[:, None, None] / frames
    return start + (3 * s**2 - 2 * s**3) * (end - start)


def folds(chain: Chain, q: Float[Tensor, "frame animation joint"]) -> Float[Tensor, "animation"]:
    """The smallest singular value of the exact Jacobian over the frames."""
    unit = torch.tensor([1 / LENGTH] * 3 + [1.0] * 3, dtype=q.dtype)[:, None]
    values: Tensor = torch.linalg.svdvals(chain.jacobian(q.flatten(0, 1)) * unit)[:, -1]
    return values.reshape(q.shape[:2]).amin(0)


def _largest(q: Tensor) -> Tensor:
    """The largest joint step between neighboring frames."""
    return q.diff(dim=0).abs().amax(-1)
