"""Noise forms: the Jacobian term from values at noisy inputs alone, without any input derivative.

With δ = student − teacher and noise ξ ~ N(0, σ²I), three averages over draws of ξ contain σ² Σ_i ‖∇δ_i‖²:

    E[δ(x+ξ)²]                   =  δ² + σ²(‖∇δ‖² + δ Δδ) + O(σ⁴)                `noise_distillation`, the paper's
    Var[δ(x+ξ)]                  =  σ²‖∇δ‖² + σ⁴(½‖H‖²_F + ∇δ·∇Δδ) + O(σ⁶)       `centered_variance`
    E[((δ(x+ξ) − δ(x−ξ))/2)²]    =  σ²‖∇δ‖² + σ⁴ ∇δ·∇Δδ + O(σ⁶)                  `antithetic`

The first also contains δ Δδ, of the same order as the Jacobian term, and the error δ² of the outputs; the other two do
not. All need only forward passes, so any teacher can be used, even one that is not a torch module. Divide the last two
by σ² to compare them with `squared_error` of Jacobians.
"""

from jaxtyping import Float
from torch import Tensor

from jacmatch.errors import InputError
from jacmatch.losses.outputs import equal_shapes


def at_least(caller: str, draws: int, tensor: Tensor) -> None:
    """Reject tensors that are not (noise, batch, out) with enough draws."""
    if tensor.ndim != 3 or len(tensor) < draws:
        raise InputError(
            f"`student` and `teacher` of `{caller}` must have shape (noise, batch, out) with at least {draws} "
            f"draw{'s' if draws > 1 else ''} of noise.",
            got=tuple(tensor.shape),
            do="Stack the outputs of each draw along a new first dimension.",
        )


def noise_distillation(
    student: Float[Tensor, "noise batch out"], teacher: Float[Tensor, "noise batch out"]
) -> Float[Tensor, "batch"]:
    """Return the squared error at noisy inputs, the mean over draws n of Σ_i (S_i(x+ξ_n) − T_i(x+ξ_n))², i = 1…K.

    Paper's form of the link between noise and Jacobians: the paper says Σδ² + σ² Σ‖∇δ‖² + O(σ⁴). The actual
    remainder is σ² Σ_i δ_i Δδ_i + O(σ⁴), as large as the Jacobian term wherever the student does not yet fit the
    teacher. For the Jacobian term itself use `antithetic` or `centered_variance`.

    Args:
        student: The student's outputs for each draw of noise.
        teacher: The teacher's outputs at the same noisy inputs.

    Raises:
        InputError: The shapes differ, or are not (noise, batch, out).

    References:
        Srinivas & Fleuret 2018, arXiv:1803.00443, Prop 1, left-hand side.

    Example:
        >>> import torch
        >>> noise_distillation(torch.tensor([[[1.0]], [[3.0]]]), torch.zeros(2, 1, 1))
        tensor([5.])
    """
    equal_shapes("noise_distillation", student=student, teacher=teacher)
    at_least("noise_distillation", 1, student)
    return (student - teacher).square().sum(2).mean(0)


def centered_variance(
    student: Float[Tensor, "noise batch out"], teacher: Float[Tensor, "noise batch out"]
) -> Float[Tensor, "batch"]:
    """Return the variance over draws n of the difference at noisy inputs, Σ_i Σ_n (δ_in − δ̄_i)² / (N − 1), N ≥ 2.

    Corrected form: its mean is σ² Σ_i ‖∇δ_i‖² + O(σ⁴) for any smooth pair of networks, without bias from N. The
    remainder is σ⁴ Σ_i (½‖H_i‖²_F + ∇δ_i·∇Δδ_i), H the second derivatives of δ. Near a kink of a ReLU network the even
    part of the kink remains; `antithetic` cancels that too. Unlike the other two it does not depend on δ itself: a
    constant difference gives a loss of 0.

    Args:
        student: The student's outputs for each of N ≥ 2 draws of noise.
        teacher: The teacher's outputs at the same noisy inputs.

    Raises:
        InputError: The shapes differ, are not (noise, batch, out), or there is only one draw.

    References:
        Corrected form of Srinivas & Fleuret 2018, arXiv:1803.00443, Prop 1.

    Example:
        >>> import torch
        >>> centered_variance(torch.tensor([[[1.0]], [[3.0]]]), torch.zeros(2, 1, 1))
        tensor([2.])
    """
    equal_shapes("centered_variance", student=student, teacher=teacher)
    at_least("centered_variance", 2, student)
    return (student - teacher).var(0, correction=1).sum(1)


def antithetic(
    student_plus: Float[Tensor, "noise batch out"],
    teacher_plus: Float[Tensor, "noise batch out"],
    student_minus: Float[Tensor, "noise batch out"],
    teacher_minus: Float[Tensor, "noise batch out"],
) -> Float[Tensor, "batch"]:
    """Return the mean over draws n of Σ_i ((δ_i(x+ξ_n) − δ_i(x−ξ_n))/2)², i = 1…K.

    Corrected form: its mean is σ² Σ_i ‖∇δ_i‖² + σ⁴ Σ_i ∇δ_i·∇Δδ_i + O(σ⁶), with no second derivative, and the even
    part of a ReLU kink cancels. It is a finite difference in a Gaussian direction: a product Jv computed from values.
    In float32 the subtraction loses digits: keep σ well above 10⁻³ of the input's scale.

    Args:
        student_plus: The student's outputs at x + ξ_n.
        teacher_plus: The teacher's outputs at x + ξ_n.
        student_minus: The student's outputs at x − ξ_n, with the same ξ_n.
        teacher_minus: The teacher's outputs at x − ξ_n.

    Raises:
        InputError: The shapes differ, or are not (noise, batch, out).

    References:
        Corrected form of Srinivas & Fleuret 2018, arXiv:1803.00443, Prop 1.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1, 1, 1)
        >>> antithetic(torch.tensor([[[3.0]]]), zero, torch.tensor([[[1.0]]]), zero)
        tensor([1.])
    """
    equal_shapes(
        "antithetic",
        student_plus=student_plus,
        teacher_plus=teacher_plus,
        student_minus=student_minus,
        teacher_minus=teacher_minus,
    )
    at_least("antithetic", 1, student_plus)
    difference = (student_plus - student_minus) - (teacher_plus - teacher_minus)
    return (0.5 * difference).square().sum(2).mean(0)
