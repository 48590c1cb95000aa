"""The pose as the inverse of a network from pose to joints, which is smooth where the pose by joints is singular."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.jacobian import jacobian

_PATH, _NEWTON, _LAST, _LONGEST = 8, 3, 6, 0.3  # targets on the way, steps for each and for the last, largest step


class Inverse(nn.Module):
    """q ↦ y with f(y) = q for a network f, by Newton's method from `start`; its Jacobian is that of f, inverted.

    The targets go from f(start) to q on a straight line, each solved from the one before. The last step is
    y + J⁻¹(q − f(y)) with y and J constant, so that automatic differentiation gives J⁻¹ and nothing of the iteration.
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
            for _ in range(_LAST if number == _PATH else _NEWTON):
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
