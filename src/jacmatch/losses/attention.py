"""Attention maps: where in the image the features of a layer are large, for networks of any width."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from jacmatch.errors import InputError
from jacmatch.losses.jacobians import normalized_error


def attention_map(
    features: Float[Tensor, "batch channel height width"], p: float = 2.0
) -> Float[Tensor, "batch height width"]:
    """Return the attention map of a layer, A = Σ_c |Z_c|^p, the sum over channels c.

    Maps of wide and narrow layers have the same shape, but each has an arbitrary scale. With p = 2 it is
    quadratic in the features, so it is not piecewise linear even in a ReLU network: for noise forms of its Jacobian use
    `antithetic`.

    Args:
        features: Z, a layer's output.
        p: p ≥ 1. Where features are exactly 0 the second derivative is finite only for p = 1 and p ≥ 2.

    Raises:
        InputError: The features are not (batch, channel, height, width), or p is below 1.

    References:
        Zagoruyko & Komodakis 2017, arXiv:1612.03928, activation-based attention, the sum of powers.

    Example:
        >>> import torch
        >>> attention_map(torch.tensor([[[[1.0, -2.0]], [[2.0, 0.0]]]]))
        tensor([[[5., 4.]]])
    """
    if features.ndim != 4:
        rule = "`features` of `attention_map` must have shape (batch, channel, height, width)."
        raise InputError(rule, got=tuple(features.shape), do="Choose a layer before the spatial pooling.")
    if not p >= 1:
        raise InputError("`p` of `attention_map` must be at least 1.", got=p, do="Omit it for the default, 2.")
    # An even power needs no |·|, for which autograd's second derivative at 0 is 0 (correct for p = 2: 2).
    magnitudes = features if p % 2 == 0 else features.abs()
    return magnitudes.pow(p).sum(1)


def match_sizes(
    student_map: Float[Tensor, "batch height width"], teacher_map: Float[Tensor, "batch height_t width_t"]
) -> tuple[Float[Tensor, "batch height_m width_m"], Float[Tensor, "batch height_m width_m"]]:
    """Return the student's and the teacher's map, both pooled to the smaller height and the smaller width of the two.

    The larger map is averaged over adaptive windows, so a pixel's Jacobian is the mean over its window. Maps of equal
    size are returned unchanged.

    Args:
        student_map: The student's map.
        teacher_map: The teacher's map, of any size.

    Raises:
        InputError: The maps are not (batch, height, width), or their batch sizes differ.

    Example:
        >>> import torch
        >>> student, teacher = match_sizes(torch.ones(1, 4, 4), torch.arange(4.0).reshape(1, 2, 2))
        >>> student.shape, teacher.shape
        (torch.Size([1, 2, 2]), torch.Size([1, 2, 2]))
    """
    if student_map.ndim != 3 or teacher_map.ndim != 3 or len(student_map) != len(teacher_map):
        rule = "`student_map` and `teacher_map` of `match_sizes` must be (batch, height, width), of equal batch sizes."
        do = "Give the maps of the same samples."
        raise InputError(rule, got=f"{tuple(student_map.shape)} and {tuple(teacher_map.shape)}", do=do)
    size = (min(student_map.shape[1], teacher_map.shape[1]), min(student_map.shape[2], teacher_map.shape[2]))
    return pooled(student_map, size), pooled(teacher_map, size)


def pooled(
    attention: Float[Tensor, "batch height width"], size: tuple[int, int]
) -> Float[Tensor, "batch height_m width_m"]:
    """Return the map averaged over windows to the size (height, width); unchanged if it has that size."""
    return attention if tuple(attention.shape[1:]) == size else adaptive_avg_pool2d(attention, size)


def attention_transfer(
    student_map: Float[Tensor, "batch height width"],
    teacher_map: Float[Tensor, "batch height width"],
    eps: float = 1e-8,
) -> Float[Tensor, "batch"]:
    """Return the squared distance of normalized maps, ‖A_S/‖A_S‖ − A_T/‖A_T‖‖² = 2(1 − cos(A_S, A_T)).

    The norm is over the pixels of one sample's map. The original uses the distance without the square; only the squared
    one has a gradient at equal maps. It is `normalized_error` of the map taken as one row, with the same eps.

    Args:
        student_map: The student's attention map.
        teacher_map: The teacher's, of the same size; see `match_sizes`.
        eps: Added to the squared norm of each map; a map whose squared norm is much smaller has almost no effect.

    Raises:
        InputError: The maps are not of equal shape (batch, height, width), or eps is not above 0.

    References:
        Zagoruyko & Komodakis 2017, arXiv:1612.03928, activation-based attention transfer.

    Example:
        >>> import torch
        >>> attention_transfer(torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]]))
        tensor([2.])
    """
    if student_map.shape != teacher_map.shape or student_map.ndim != 3:
        rule = "`student_map` and `teacher_map` of `attention_transfer` must have equal shapes (batch, height, width)."
        do = "Call `match_sizes` first."
        raise InputError(rule, got=f"{tuple(student_map.shape)} and {tuple(teacher_map.shape)}", do=do)
    return normalized_error(student_map.unsqueeze(1), teacher_map.unsqueeze(1), eps)
