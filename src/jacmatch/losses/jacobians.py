"""Losses on Jacobians: how the rows of a student's Jacobian are compared with the teacher's.

The squared form is `jacmatch.losses.squared_error`; here are the forms that need more than a sum of squares.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from jacmatch.errors import InputError
from jacmatch.losses.outputs import equal_shapes, precise


def squared_row_norms(rows: Float[Tensor, "batch row *input"]) -> Float[Tensor, "batch row"]:
    """Return ‖a_r‖² for each row."""
    return flat_rows(rows).square().sum(2)


def flat_rows(rows: Float[Tensor, "batch row *input"]) -> Float[Tensor, "batch row entry"]:
    """Return each row as a vector, in float32 or float64."""
    return precise(rows.flatten(2) if rows.ndim > 2 else rows.unsqueeze(2))


def one_per_row(caller: str, rows: Tensor, **numbers: Tensor) -> None:
    """Reject tensors without exactly one number for each row."""
    for name, tensor in numbers.items():
        if tensor.shape != rows.shape[:2]:
            rule = f"`{name}` of `{caller}` must have one number for each row, shape {tuple(rows.shape[:2])}."
            do = "Give values of the same classes, in the order of the rows."
            raise InputError(rule, got=tuple(tensor.shape), do=do)


def positive_eps(caller: str, eps: float) -> None:
    """Reject an eps that does not prevent 0/0 for a row of zeros."""
    if not eps > 0:
        rule = f"`eps` of `{caller}` must be above 0, else a row of zeros has no gradient."
        raise InputError(rule, got=eps, do="Omit it for the default.")


def units_and_norms(
    rows: Float[Tensor, "batch row *input"], eps: float
) -> tuple[Float[Tensor, "batch row entry"], Float[Tensor, "batch row"]]:
    """Return directions and norms of the rows, each row extended by one entry, √eps.

    Unlike ‖a‖ + eps or √(‖a‖² + eps) alone: no extended row is zero, and all vector identities hold exactly.
    """
    longer = pad(flat_rows(rows), (0, 1), value=math.sqrt(eps))
    norms: Tensor = torch.linalg.vector_norm(longer, dim=2)
    return longer / norms.unsqueeze(2), norms


def relative_error(
    student: Float[Tensor, "batch row *input"], teacher: Float[Tensor, "batch row *input"], eps: float = 1e-6
) -> Float[Tensor, "batch"]:
    """Return the squared error over the teacher's squared norm, Σ_r‖S_r − T_r‖² / (Σ_r‖T_r‖² + eps), per sample.

    It is dimensionless: a student with zero derivatives gets 1. So the same weight suits different networks, input
    scales and readouts. Unlike with `normalized_error`, the student also learns the size of the derivatives. The rows
    of a sample share one denominator, so a small row has little weight.

    Args:
        student: Rows of the student's Jacobian.
        teacher: The same rows of the teacher's.
        eps: Added to the teacher's squared norm, in its unit. Where the teacher's derivatives are zero, it determines
            the loss of the student's derivatives.

    Raises:
        InputError: The shapes differ, or eps is not above 0.

    Example:
        >>> relative_error(torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[2.0, 0.0]]]))
        tensor([0.2500])
    """
    equal_shapes("relative_error", student=student, teacher=teacher)
    positive_eps("relative_error", eps)
    return squared_row_norms(student - teacher).sum(1) / (squared_row_norms(teacher).sum(1) + eps)


def bounded_error(
    student: Float[Tensor, "batch row *input"], teacher: Float[Tensor, "batch row *input"], eps: float = 1e-6
) -> Float[Tensor, "batch"]:
    """Return the bounded relative error r / (1 + r) = d / (d + t) per sample, in [0, 1).

    r is `relative_error`, d = Σ_r‖S_r − T_r‖² and t = Σ_r‖T_r‖² + eps. Near the teacher it equals the relative error,
    and a student with zero derivatives gets ½. The loss of a sample is at most 1, even if the teacher's derivatives are
    tiny or the student's are huge, as in a small last batch under BatchNorm. The gradient of r is multiplied by 1 / (1
    + r)², so such samples contribute almost no gradient.

    The ratio is not linear in d and t. So its mean over random products is not the loss of the full Jacobian: it is a
    biased estimate, whose bias falls with the number of products. `relative`, in `Distillation`, is always unbiased.

    Args:
        student: Rows of the student's Jacobian.
        teacher: The same rows of the teacher's.
        eps: Added to the teacher's squared norm, in its unit.

    Raises:
        InputError: The shapes differ, or eps is not above 0.

    References:
        The bounded function is that of Geman and McClure, "Bayesian image analysis", 1985.

    Example:
        >>> bounded_error(torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[2.0, 0.0]]]))
        tensor([0.2000])
    """
    equal_shapes("bounded_error", student=student, teacher=teacher)
    positive_eps("bounded_error", eps)
    error = squared_row_norms(student - teacher).sum(1)
    return error / (error + squared_row_norms(teacher).sum(1) + eps)


def normalized_error(
    student: Float[Tensor, "batch row *input"], teacher: Float[Tensor, "batch row *input"], eps: float = 1e-8
) -> Float[Tensor, "batch"]:
    """Return the paper's normalized loss, ‖a/‖a‖ − b/‖b‖‖² = 2(1 − cos(a, b)), as the mean over rows a = S_r, b = T_r.

    It lies in [0, 4] and compares directions only: it is heuristic (not derived from noise), ignores the size of the
    derivatives, and therefore does not transfer robustness. Use it where the scale is arbitrary, as with attention
    maps. `direction_and_magnitude` includes the norms.

    A row of zeros has no direction. Therefore one more entry, √eps, is appended to both a and b: every formula is
    exact for the extended rows, the gradient is at most 2/√eps, and two rows of zeros are equal.

    Args:
        student: Rows of the student's Jacobian.
        teacher: The same rows of the teacher's.
        eps: Square of a norm that counts as small; rows with much smaller norms have almost no effect.

    Raises:
        InputError: The shapes differ, or eps is not above 0.

    References:
        Paper's form: Srinivas & Fleuret 2018, arXiv:1803.00443, Eq. 10 (there for the Jacobian of the attention map's
        largest pixel); "Local Affine Approximators" uses it on CIFAR-10. Neither has an eps.

    Example:
        >>> normalized_error(torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]]))
        tensor([2.])
    """
    equal_shapes("normalized_error", student=student, teacher=teacher)
    positive_eps("normalized_error", eps)
    student_units, _ = units_and_norms(student, eps)
    teacher_units, _ = units_and_norms(teacher, eps)
    return (student_units - teacher_units).square().sum(2).mean(1)


def direction_and_magnitude(
    student: Float[Tensor, "batch row *input"], teacher: Float[Tensor, "batch row *input"], eps: float = 1e-8
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """Return the two parts of the squared error: the cost of different directions, and that of different norms.

        ‖a − b‖²  =  ‖a‖‖b‖ · ‖a/‖a‖ − b/‖b‖‖²  +  (‖a‖ − ‖b‖)²,   summed over rows a = S_r, b = T_r

    So their sum is `squared_error`, and separate weights for them interpolate between it and `normalized_error`. As
    there, √eps is appended to each row; the sum is the squared error for any eps.

    Args:
        student: Rows of the student's Jacobian.
        teacher: The same rows of the teacher's.
        eps: Square of a norm that counts as small.

    Returns:
        The direction part and the magnitude part, each (batch,) and at least 0.

    Raises:
        InputError: The shapes differ, or eps is not above 0.

    References:
        Combines two losses of Srinivas & Fleuret 2018, arXiv:1803.00443: squared (Prop 1) and normalized (Eq. 10).

    Example:
        >>> direction, magnitude = direction_and_magnitude(torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 4.0]]]))
        >>> print(f"{direction.item():.4f} + {magnitude.item():.4f}")
        24.0000 + 1.0000
    """
    equal_shapes("direction_and_magnitude", student=student, teacher=teacher)
    positive_eps("direction_and_magnitude", eps)
    student_units, student_norms = units_and_norms(student, eps)
    teacher_units, teacher_norms = units_and_norms(teacher, eps)
    # Not 2(‖a‖‖b‖ − a·b): for a ≈ b in float32, that difference of large numbers has no correct digits.
    apart = (student_units - teacher_units).square().sum(2)
    return (student_norms * teacher_norms * apart).sum(1), (student_norms - teacher_norms).square().sum(1)


def fisher(
    student: Float[Tensor, "batch row *input"],
    teacher: Float[Tensor, "batch row *input"],
    probabilities: Float[Tensor, "batch row"],
) -> Float[Tensor, "batch"]:
    """Return the Fisher distance of two classifiers, Σ_i p_i ‖∇log q_i − ∇log p_i‖², i = 1…K, ∇ with respect to x.

    It is the Jacobian term for soft targets: with p the teacher and q the student,

        E_ξ KL(p‖q)(x+ξ)  =  KL(p‖q) + σ²/2 · (F + R) + O(σ⁴),   ξ ~ N(0, σ²I)

    with R = Σ_i [Δp_i log(p_i/q_i) − (p_i/q_i) Δq_i], which is 0 where the values agree, q = p. F is at least 0, is 0
    only where the rows agree, is invariant to constants added to all logits, and has no 1/q. With a temperature τ,
    both logits are divided by τ; the factor τ² of `hinton_kl` applies to this term as well.

    Args:
        student: Rows ∇log q_i of the student's log-probabilities.
        teacher: Rows ∇log p_i of the teacher's.
        probabilities: The teacher's p, at the same temperature.

    Raises:
        InputError: The shapes differ, or the probabilities are not one for each row.

    References:
        Corrected form of Srinivas & Fleuret 2018, arXiv:1803.00443, Eq. 2, which is `paper_cross_entropy`.

    Example:
        >>> student, teacher = torch.zeros(1, 2, 2), torch.tensor([[[1.0, 0.0], [0.0, -3.0]]])
        >>> fisher(student, teacher, torch.tensor([[0.75, 0.25]]))
        tensor([3.])
    """
    equal_shapes("fisher", student=student, teacher=teacher)
    one_per_row("fisher", student, probabilities=probabilities)
    return (probabilities * squared_row_norms(student - teacher)).sum(1)


def paper_cross_entropy(
    student: Float[Tensor, "batch row *input"],
    teacher: Float[Tensor, "batch row *input"],
    student_probabilities: Float[Tensor, "batch row"],
) -> Float[Tensor, "batch"]:
    """Return the paper's Jacobian term for soft targets, −Σ_i ∇p_i·∇q_i / q_i, i = 1…K; its weight there is σ².

    Paper's form, for comparison only: **use `fisher` instead.** The expansion behind it keeps log q to first order
    only and so loses +½ Σ_i p_i‖∇q_i‖²/q_i², a term of the same order in σ and also in first derivatives. The rest is
    linear in ∇q: it is unbounded below as ∇q grows along ∇p, and 1/q makes it large where the student is confident.
    With the lost term, the sum is ½ `fisher` up to a constant that does not depend on the student.

    Args:
        student: Rows ∇q_i of the student's probabilities (not of their logarithms).
        teacher: Rows ∇p_i of the teacher's probabilities.
        student_probabilities: q.

    Raises:
        InputError: The shapes differ, or the probabilities are not one for each row.

    References:
        Srinivas & Fleuret 2018, arXiv:1803.00443, Eq. 2.

    Example:
        >>> rows, q = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]]), torch.tensor([[0.5, 0.5]])
        >>> paper_cross_entropy(rows, rows, q), paper_cross_entropy(9 * rows, rows, q)
        (tensor([-4.]), tensor([-36.]))
    """
    equal_shapes("paper_cross_entropy", student=student, teacher=teacher)
    one_per_row("paper_cross_entropy", student, student_probabilities=student_probabilities)
    products = (flat_rows(student) * flat_rows(teacher)).sum(2)
    return -(products / above_zero(student_probabilities)).sum(1)


def above_zero(probabilities: Float[Tensor, "batch row"]) -> Float[Tensor, "batch row"]:
    """Return the probabilities q, clamped to at least the smallest normal number.

    A q that underflows to 0 has ∇q = 0 too; their quotient then is 0, with gradient, and not NaN.
    """
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny)
