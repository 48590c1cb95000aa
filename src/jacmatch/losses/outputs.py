"""Losses on outputs: against labels, and against a teacher's outputs."""

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from jacmatch.errors import InputError, class_axis

IGNORED = -100
"""The label of a position or sample that the cross-entropy leaves out, as in torch."""


def precise(x: Tensor) -> Tensor:
    """Return the tensor in float32, or unchanged if it is float64: 16 bits have too few digits for differences."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def equal_shapes(caller: str, **tensors: Tensor) -> None:
    """Reject tensors whose shapes differ, or that have no row dimension after the batch; torch would broadcast them."""
    names = " and ".join(f"`{name}`" for name in tensors)
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    if any(shape != shapes[0] for shape in shapes):
        rule = f"{names} of `{caller}` must have equal shapes."
        do = "Nothing is broadcast: give both for the same samples, rows and inputs."
        raise InputError(rule, got=" and ".join(map(str, shapes)), do=do)
    if len(shapes[0]) < 2:
        rule = f"{names} of `{caller}` must have a batch dimension and at least one more."
        raise InputError(rule, got=shapes[0], do="Reshape (batch,) to (batch, 1).")


def expected_under(
    caller: str,
    labels: Integer[Tensor, "batch *position"] | Float[Tensor, "batch *out"],
    costs: Float[Tensor, "batch *out"],
    axis: int = 1,
) -> Float[Tensor, "batch"]:
    """Return Σ_i y_i c_i per sample: the cost of the label's class, or its mean under probabilities.

    For dense outputs it is summed over the positions. A label of −100 has cost 0: an ignored position, or an unlabeled
    sample.
    """
    positions = costs.shape[:axis] + costs.shape[axis + 1 :]
    if labels.is_floating_point():
        if labels.shape == costs.shape:
            return (labels * costs.masked_fill(labels == 0, 0.0)).flatten(1).sum(1)  # also of a class with logit −∞
    elif labels.dtype != torch.bool and not labels.is_complex() and labels.shape == positions:
        # gather, not one_hot times costs: an impossible other class (cost ∞) must not give 0·∞.
        ignored = labels == IGNORED
        index = labels.long().masked_fill(ignored, 0)
        try:
            picked = costs.gather(axis, index.unsqueeze(axis)).squeeze(axis).masked_fill(ignored, 0.0)
        except RuntimeError as error:
            rule = f"`labels` of `{caller}` must be classes from 0 to {costs.shape[axis] - 1}, or {IGNORED}."
            raise InputError(rule, got="labels out of bounds") from error
        return picked if picked.dim() == 1 else picked.flatten(1).sum(1)
    raise InputError(
        f"`labels` of `{caller}` must be integers of shape {tuple(positions)} or probabilities of shape "
        f"{tuple(costs.shape)}.",
        got=f"{str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}",
        do="For regression use `squared_error`.",
    )


def cross_entropy(
    logits: Float[Tensor, "batch *out"],
    labels: Integer[Tensor, "batch *position"] | Float[Tensor, "batch *out"],
    class_dim: int | None = None,
) -> Float[Tensor, "batch"]:
    """Return the cross-entropy with labels, −Σ_i y_i log q_i with q = softmax(z), i = 1…K.

    For dense outputs it is summed over the positions; a label of −100 is left out, as in `torch.nn.CrossEntropyLoss`:
    the cost of an unlabeled sample is 0.

    Args:
        logits: z.
        labels: Class indices, or probabilities y such as those of mixed samples.
        class_dim: The dimension of the K classes; needed for more than two.

    Raises:
        InputError: The labels are neither integers (batch, *position) nor floats (batch, *out), or `class_dim` is
            missing or wrong.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
        >>> cross_entropy(logits, torch.tensor([0, 1]))
        tensor([0.6931, 0.6931])
        >>> cross_entropy(logits, torch.tensor([[0.5, 0.5], [0.2, 0.8]]))
        tensor([0.6931, 0.6931])
        >>> cross_entropy(torch.zeros(1, 3, 2), torch.tensor([[0, 1, -100]]), class_dim=-1)
        tensor([1.3863])
    """
    equal_shapes("cross_entropy", logits=logits)
    axis = class_axis("cross_entropy", logits.shape, class_dim)
    return expected_under("cross_entropy", labels, -precise(logits).log_softmax(axis), axis)


def squared_error(
    student: Float[Tensor, "batch row *input"], teacher: Float[Tensor, "batch row *input"]
) -> Float[Tensor, "batch"]:
    """Return the squared error per sample, Σ (s − t)², summed over all rows and inputs.

    The formula has four uses. Outputs against a teacher's: Σ_i (S_i − T_i)², the first term of the
    paper's Prop 1. Outputs against numbers: the label loss of regression. Rows of Jacobians: Σ_r ‖∇S_r − ∇T_r‖², the
    second term of Prop 1, where it has the weight σ²; this is the form that the paper derives and uses on CIFAR-100.
    Products vᵀJ or Jv in random directions with E[vvᵀ] = I: an unbiased estimate of ‖J_S − J_T‖²_F.

    Args:
        student: Outputs (batch, out), or rows (batch, row, *input).
        teacher: The teacher's, or the target values.

    Raises:
        InputError: The shapes differ.

    References:
        Srinivas & Fleuret 2018, arXiv:1803.00443, Prop 1. The paper states a remainder of O(σ⁴); in general
        it is O(σ²): see `noise_distillation`.

    Example:
        >>> squared_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]]))
        tensor([5.])
    """
    equal_shapes("squared_error", student=student, teacher=teacher)
    return (precise(student) - precise(teacher)).square().flatten(1).sum(1)


def hinton_kl(
    student: Float[Tensor, "batch *out"],
    teacher: Float[Tensor, "batch *out"],
    temperature: float = 1.0,
    class_dim: int | None = None,
) -> Float[Tensor, "batch"]:
    """Return Hinton's distillation loss, τ² Σ_i p_i (log p_i − log q_i), p = softmax(t/τ), q = softmax(s/τ), i = 1…K.

    The factor τ² keeps the size of the gradient independent of τ: for τ → ∞ the loss becomes
    Σ_i (d_i − mean_j d_j)² / (2K), d = s − t. It is invariant to a constant added to all logits of a network.
    For dense outputs it is summed over the positions.

    Args:
        student: Logits s.
        teacher: Logits t.
        temperature: τ > 0; usually 1 to 8.
        class_dim: The dimension of the K classes; needed for more than two.

    Raises:
        InputError: The shapes differ, the temperature is not above 0, or `class_dim` is missing or wrong.

    References:
        Hinton, Vinyals & Dean 2015, arXiv:1503.02531, sec. 2.

    Example:
        >>> hinton_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 0.0]]), temperature=2.0)
        tensor([0.8724])
    """
    equal_shapes("hinton_kl", student=student, teacher=teacher)
    if not temperature > 0:
        rule = "`temperature` of `hinton_kl` must be above 0."
        raise InputError(rule, got=temperature, do="Omit it for the default, 1.")
    axis = class_axis("hinton_kl", student.shape, class_dim)
    log_q = (precise(student) / temperature).log_softmax(axis)
    log_p = (precise(teacher) / temperature).log_softmax(axis)
    differences = (log_p - log_q).masked_fill(log_p == -torch.inf, 0.0)  # a class that is excluded by its logit
    return temperature**2 * (log_p.exp() * differences).flatten(1).sum(1)


def agreement(
    student: Float[Tensor, "batch *out"], teacher: Float[Tensor, "batch *out"], class_dim: int | None = None
) -> Float[Tensor, "batch"]:
    """Return 1 where student and teacher predict the same class and 0 elsewhere; a metric, without gradient.

    For dense outputs it is the mean over the positions.

    Args:
        student: Logits or probabilities.
        teacher: Those of the teacher.
        class_dim: The dimension of the classes; needed for more than two.

    Raises:
        InputError: The shapes differ, or `class_dim` is missing or wrong.

    Example:
        >>> agreement(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([[0.0, 9.0], [1.0, 0.0]]))
        tensor([1., 0.])
    """
    equal_shapes("agreement", student=student, teacher=teacher)
    axis = class_axis("agreement", student.shape, class_dim)
    same = (student.argmax(axis) == teacher.argmax(axis)).to(student.dtype)
    return same if same.dim() == 1 else same.flatten(1).mean(1)
