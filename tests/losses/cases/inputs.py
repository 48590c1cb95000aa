"""Inputs of the losses, and changes of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from .row import BATCH, Inputs


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def simplex(*shape: int) -> Tensor:
    """Probabilities, none of them near 0."""
    return (0.5 * normal(*shape)).softmax(-1)


def twice(make: Callable[[], Tensor]) -> Inputs:
    tensor = make()
    return tensor, tensor.clone()


def rows() -> Tensor:
    return normal(BATCH, 4, 1, 2, 3)


def logits() -> Tensor:
    return normal(BATCH, 5)


def answers() -> Tensor:
    return normal(4, BATCH, 5)


def maps() -> Tensor:
    return normal(BATCH, 3, 2).square() + 0.1


def labels() -> Tensor:
    return torch.tensor([2, 0, 3])


def dead(which: str) -> Inputs:
    """Rows of which the first is zero in the student, the teacher or both; of the third sample all are."""
    student, teacher = rows(), rows()
    for name, tensor in (("student", student), ("teacher", teacher)):
        if which in (name, "both"):
            tensor[:, 0] = 0
            tensor[2] = 0
    return student, teacher


def dead_rows() -> dict[str, Callable[[], Inputs]]:
    return {which: (lambda which=which: dead(which)) for which in ("student", "teacher", "both")}


def dead_maps() -> dict[str, Callable[[], Inputs]]:
    def one(which: str) -> Inputs:
        return tuple(tensor[:, 0, 0] for tensor in dead(which))

    return {which: (lambda which=which: one(which)) for which in ("student", "teacher", "both")}


def saturated() -> tuple[Tensor, Tensor]:
    """Rows ∇q and q of a classifier of which one class has underflowed to q = 0, ∇q = 0."""
    q, gradients = simplex(BATCH, 4), rows()
    q[:, 1], gradients[:, 1] = 0, 0
    return gradients, q


def replaced(position: int, change: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Inputs]:
    """A change of one of the inputs."""
    return lambda inputs: (*inputs[:position], change(inputs[position]), *inputs[position + 1 :])


def swapped(inputs: Inputs) -> Inputs:
    return inputs[1], inputs[0], *inputs[2:]


def shifted_logits(inputs: Inputs) -> Inputs:
    return inputs[0] + normal(BATCH, 1), inputs[1] + normal(BATCH, 1)


def common_rotation(inputs: Inputs) -> Inputs:
    """All rows rotated by one orthogonal matrix of input space."""
    turn = torch.linalg.qr(normal(6, 6)).Q
    return tuple(tensor if tensor.ndim < 5 else (tensor.flatten(2) @ turn).reshape(tensor.shape) for tensor in inputs)


def scaled(factor: float, *positions: int) -> Callable[[Inputs], Inputs]:
    return lambda inputs: tuple(factor * x if i in positions else x for i, x in enumerate(inputs))


def common_shift_of_rows(inputs: Inputs) -> Inputs:
    """The same vector added to all rows of a sample, as a shift of all logits does."""
    return inputs[0] + normal(BATCH, 1, 1, 2, 3), *inputs[1:]


def fewer_rows(tensor: Tensor) -> Tensor:
    return tensor[:, :-1]


def one_sample(tensor: Tensor) -> Tensor:
    """The first sample alone: torch would broadcast it to all."""
    return tensor[:1]


def no_row_dimension(inputs: Inputs) -> Inputs:
    return tuple(tensor.flatten(1).sum(1) if tensor.is_floating_point() else tensor for tensor in inputs)


def unlike_pair(name: str) -> dict[str, Callable[[Inputs], Inputs]]:
    equal = f"`student` and `teacher` of `{name}` must have equal shapes. Got .* and .*Nothing is broadcast"
    return {
        equal: replaced(1, fewer_rows),
        f"`teacher` of `{name}` must have equal": replaced(1, one_sample),
    }
