"""Forward kinematics of a chain of revolute joints by Denavit and Hartenberg, with closed-form derivatives.

Lengths in meters, angles in radians. A pose is a position p and a rotation matrix R of the last frame in the base's.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jacmatch.errors import InputError

_NAMES = ("a", "d", "alpha", "lower", "upper")


@dataclass(frozen=True)
class Chain:
    """Revolute joints in series, in the standard convention: Tᵢ = Rot_z(qᵢ) Trans_z(dᵢ) Trans_x(aᵢ) Rot_x(αᵢ).

    For each joint: length, offset and twist of its link, and its limits.
    """

    a: tuple[float, ...]
    d: tuple[float, ...]
    alpha: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in _NAMES}
        if len(set(lengths.values())) > 1:
            raise InputError("`Chain` must have as many numbers of each kind as it has joints.", got=lengths)
        if any(low >= high for low, high in zip(self.lower, self.upper, strict=True)):
            raise InputError("`lower` of `Chain` must be below `upper`.", got=(self.lower, self.upper))

    @property
    def joints(self) -> int:
        """Number of joints."""
        return len(self.a)

    def limits(self, share: float | int = 1.0) -> tuple[Tensor, Tensor]:
        """Lower and upper limits, or those of the middle `share` of the range of each joint."""
        low, high = (torch.tensor(each, dtype=torch.float64) for each in (self.lower, self.upper))
        middle, half = (low + high) / 2, (high - low) / 2
        return middle - share * half, middle + share * half

    def drawn(self, count: int, seed: int, share: float | int = 1.0) -> Float[Tensor, "pose joint"]:
        """Joint angles, uniform between the limits."""
        generator = torch.Generator().manual_seed(seed)
        low, high = self.limits(share)
        return low + (high - low) * torch.rand(count, self.joints, generator=generator, dtype=torch.float64)

    def frames(self, q: Float[Tensor, "pose joint"]) -> Float[Tensor, "pose frame 4 4"]:
        """The base and the frame after each joint, as homogeneous matrices."""
        frame = torch.eye(4, dtype=q.dtype).expand(len(q), 4, 4)
        frames = [frame]
        for joint in range(self.joints):
            frame = frame @ self._link(q[:, joint], joint)
            frames.append(frame)
        return torch.stack(frames, 1)

    def pose(self, q: Float[Tensor, "pose joint"]) -> tuple[Float[Tensor, "pose 3"], Float[Tensor, "pose 3 3"]]:
        """Position and rotation of the last frame.

        Example:
            >>> position, _ = PUMA_560.pose(torch.zeros(1, 6, dtype=torch.float64))
            >>> [round(float(value), 5) for value in position[0]]
            [0.4521, -0.15005, 0.4318]
        """
        last = self.frames(q)[:, -1]
        return last[:, :3, 3], last[:, :3, :3]

    def jacobian(self, q: Float[Tensor, "pose joint"]) -> Float[Tensor, "pose 6 joint"]:
        """The geometric Jacobian: column i is (zᵢ × (p − pᵢ), zᵢ), linear and angular velocity per joint velocity."""
        frames = self.frames(q)
        axes, positions = frames[:, :-1, :3, 2], frames[:, :-1, :3, 3]
        arms = frames[:, -1:, :3, 3] - positions
        return torch.cat((torch.linalg.cross(axes, arms), axes), 2).mT

    def outputs(self, q: Float[Tensor, "pose joint"]) -> Float[Tensor, "pose 12"]:
        """The outputs that a student learns: p, and R row by row. They are continuous, unlike three angles."""
        position, rotation = self.pose(q)
        return torch.cat((position, rotation.flatten(1)), 1)

    def output_jacobian(self, q: Float[Tensor, "pose joint"]) -> Float[Tensor, "pose 12 joint"]:
        """The derivatives of `outputs`: ∂p/∂qᵢ = zᵢ × (p − pᵢ), ∂R/∂qᵢ = [zᵢ]ₓ R."""
        both = self.jacobian(q)
        turned = torch.einsum("biaj,bjc->baci", skew(both[:, 3:].mT), self.pose(q)[1])
        return torch.cat((both[:, :3], turned.flatten(1, 2)), 1)

    def _link(self, q: Tensor, joint: int) -> Tensor:
        ca, sa = math.cos(self.alpha[joint]), math.sin(self.alpha[joint])
        c, s, zero = q.cos(), q.sin(), torch.zeros_like(q)
        one = zero + 1
        a, d = self.a[joint], self.d[joint]
        rows = [c, -s * ca, s * sa, a * c, s, c * ca, -c * sa, a * s, zero, one * sa, one * ca, one * d]
        return torch.stack([*rows, zero, zero, zero, one], -1).reshape(-1, 4, 4)


def skew(vectors: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3 3"]:
    """[v]ₓ, the matrices with [v]ₓ u = v × u."""
    x, y, z = vectors.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), -1).reshape(*vectors.shape, 3)


def rotation_vector(rotation: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 3"]:
    """Axis times angle (0 to π) of a rotation; at π the axis is one of the two.

    Example:
        >>> rotation_vector(torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]))
        tensor([0.0000, 0.0000, 1.5708])
    """
    w = torch.stack(
        (
            rotation[..., 2, 1] - rotation[..., 1, 2],
            rotation[..., 0, 2] - rotation[..., 2, 0],
            rotation[..., 1, 0] - rotation[..., 0, 1],
        ),
        -1,
    )
    twice_sine = w.norm(dim=-1, keepdim=True)
    cosine = (rotation.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) - 1) / 2
    angle = torch.atan2(twice_sine / 2, cosine)
    plain = torch.where(twice_sine > 1e-12, angle / twice_sine.clamp_min(1e-12), 0.5) * w
    # Near half a turn the sine is inaccurate. The axis n is the largest column of (R + Rᵀ)/2 − cos·1 = (1 − cos)nnᵀ.
    both = (rotation + rotation.mT) / 2 - cosine[..., None] * torch.eye(3, dtype=rotation.dtype)
    column = both.norm(dim=-2).argmax(-1)
    axis = both.gather(-1, column[..., None, None].expand(*both.shape[:-1], 1))[..., 0]
    axis = axis / axis.norm(dim=-1, keepdim=True)
    sign = torch.where((axis * w).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    return torch.where(cosine < -0.99, angle * axis * sign, plain)


def _radians(*degrees: float | int) -> tuple[float, ...]:
    return tuple(math.radians(value) for value in degrees)


PUMA_560 = Chain(
    a=(0.0, 0.4318, 0.0203, 0.0, 0.0, 0.0),
    d=(0.0, 0.0, 0.15005, 0.4318, 0.0, 0.0),
    alpha=(math.pi / 2, 0.0, -math.pi / 2, math.pi / 2, -math.pi / 2, 0.0),
    lower=_radians(-160, -45, -225, -110, -100, -266),
    upper=_radians(160, 225, 45, 170, 100, 266),
)
"""The Unimation PUMA 560: table by Corke & Armstrong-Hélouvry, "A search for consensus among model parameters reported
for the PUMA 560 robot", ICRA 1994, with the limits of Corke's Robotics Toolbox (`mdl_puma560`)."""
