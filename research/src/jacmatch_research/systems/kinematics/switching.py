"""An animated arm that goes over from forward to inverse kinematics and back.

In the first part the joints move along a given curve (forward). Then the hand follows a path in space (inverse), each
frame solved from the one before. Then joints move again, from wherever they are.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jacmatch_research.systems.kinematics.chain import Chain
from jacmatch_research.systems.kinematics.inverse import LENGTH, Known, errors, solve

FRAMES = 40
"""Of each of the three parts."""


@dataclass(frozen=True)
class Motion:
    """What animations looked like, a number for each; joints in radians.

    Attributes:
        into: Largest joint step at the frame where inverse kinematics takes over.
        back: The same where forward kinematics takes over again.
        usual: Largest joint step of the forward parts.
        inside: Largest joint step between two frames of the inverse part.
        off: Largest distance of the hand from its path, in metres.
        fold: Smallest singular value of the exact Jacobian in the inverse part, in units of `LENGTH` and radians.
    """

    into: Float[Tensor, "animation"]
    back: Float[Tensor, "animation"]
    usual: Float[Tensor, "animation"]
    inside: Float[Tensor, "animation"]
    off: Float[Tensor, "animation"]
    fold: Float[Tensor, "animation"]


def animate(
    chain: Chain,
    known: Known,
    keys: Float[Tensor, "key animation joint"],
    *,
    cold: Float[Tensor, "joint"] | None = None,
    share: float | int = 1.0,
    frames: int = FRAMES,
    iterations: int = 60,
) -> Motion:
    """Moves from key 0 to key 1 by joints, on to the pose of key 2 by inverse kinematics, and to key 3 by joints.

    The path between the poses of keys 1 and 2 is that of the hand when its joints move between them: within reach.

    Args:
        chain: The arm.
        known: Poses and Jacobians that drive the inverse part.
        keys: Joint angles of four moments, for each animation.
        cold: Where each frame of the inverse part is solved from; the frame before it if None.
        share: Of the joint ranges that may be used.
        frames: Of each of the three parts.
        iterations: Of inverse kinematics for a frame, at most.
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
    return Motion(
        steps[0], _largest(last)[0], forward.amax(0), steps[1:].amax(0), torch.stack(off).amax(0), folds(chain, inverse)
    )


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
