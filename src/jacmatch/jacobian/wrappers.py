"""Wrappers for several processes around the student instead of the objective."""

import gc

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from jacmatch.errors import UnsupportedError


def in_several_processes() -> bool:
    """Return whether this is one of several processes of `torch.distributed`."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def check_wrapping(objective: nn.Module, student: nn.Module) -> None:
    """Reject a student that is wrapped in DistributedDataParallel without its objective; searches for it once.

    The passes of an objective bypass such a wrapper, so it would average only part of the gradient, if any.

    Raises:
        UnsupportedError: Several processes train, and a DistributedDataParallel contains parameters of the student
            without the objective.
    """
    if in_several_processes() and wraps_apart(objective, student):
        raise UnsupportedError(
            "DistributedDataParallel is around the student, not the objective: gradients of derivatives would not "
            "be averaged. Wrap the objective: DistributedDataParallel(objective), and call that."
        )


def wraps_apart(objective: nn.Module, student: nn.Module) -> bool:
    """Return whether a DistributedDataParallel contains parameters of the student but not the objective."""
    own = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    wrappers = [each for each in gc.get_objects() if type(each) is DistributedDataParallel]
    around = [wrapper for wrapper in wrappers if any(id(parameter) in own for parameter in wrapper.parameters())]
    return bool(around) and not any(objective is module for wrapper in around for module in wrapper.modules())
