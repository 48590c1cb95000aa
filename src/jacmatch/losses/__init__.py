"""Losses: tensors in, one number per sample out.

A loss answers the third of the four questions that any method of first-order knowledge transfer has to answer: *how*
are student and teacher compared? The compared tensors (outputs, rows of Jacobians, attention maps, responses to noise)
are computed beforehand; a loss never receives a network and never differentiates one. So every function here works in
any training loop, and all of them follow four rules:

* **Student first.** The order of arguments is (student, teacher), and the shapes must be equal: nothing is broadcast.
* **Sum inside a sample, nothing across samples.** Outputs, rows and inputs are summed, because a mean over the pixels
  of an image makes a Jacobian term a thousand times too weak to matter; the caller takes the mean over the batch. Other
  means (over draws of noise, or over rows in the normalized form) are documented as such.
* **Twice differentiable**, even at rows of zeros (dead ReLUs): squared norms, or norms with an `eps` inside.
* **The paper's form and the corrected form have separate names.** `paper_…` is the formula as printed; each docstring
  says what is exact, what is first order, and which function to use instead.

A row of a Jacobian is the gradient of one number with respect to the whole input. The rows may be those of the full
Jacobian, a few of them, or random products vᵀJ; products Jv fit too, with one row for each direction. `squared_error`
serves outputs and Jacobians alike, as the two terms of one expansion:

    E_ξ Σ_i δ_i(x+ξ)²  ≈  Σ_i δ_i(x)² + σ² Σ_i ‖∇δ_i(x)‖²,   δ = student − teacher, ξ ~ N(0, σ²I)

(`noise_distillation` says what ≈ leaves out.) The modules:

* `outputs`: labels, Hinton's distillation, squared outputs, agreement.
* `jacobians`: relative, normalized, direction and magnitude, Fisher, the paper's cross-entropy form.
* `penalties`: norms of the student's Jacobian alone, for robustness.
* `noise`: the same terms from values at noisy inputs.
* `attention`: attention maps and their distance.

The dictionaries map command-line names to functions: `OUTPUT_LOSSES` and `JACOBIAN_LOSSES` hold those called as
(student, teacher), `PENALTIES` those without a teacher.

Example:
    >>> import torch
    >>> from jacmatch.losses import JACOBIAN_LOSSES, squared_error
    >>> student, teacher = torch.zeros(2, 3, 1, 8, 8), torch.ones(2, 3, 1, 8, 8)  # 2 samples, 3 rows each
    >>> squared_error(student, teacher)
    tensor([192., 192.])
    >>> JACOBIAN_LOSSES["squared"] is squared_error
    True
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

from torch import Tensor

from jacmatch.losses.attention import attention_map, attention_transfer, match_sizes
from jacmatch.losses.jacobians import (
    bounded_error,
    direction_and_magnitude,
    fisher,
    normalized_error,
    paper_cross_entropy,
    relative_error,
)
from jacmatch.losses.noise import antithetic, centered_variance, noise_distillation
from jacmatch.losses.outputs import IGNORED, agreement, cross_entropy, hinton_kl, squared_error
from jacmatch.losses.penalties import (
    hoffman,
    label_cross_entropy,
    paper_label_cross_entropy,
    paper_label_squared,
    piecewise_linear_cross_entropy,
    squared_norm,
)

# The name of each loss is listed twice: in the type, which the command line, the validation and type checkers read,
# and in the dictionary of that type. A test compares the two.

OutputLoss: TypeAlias = Literal["squared", "kl"]
"""Names of the losses of outputs."""

OUTPUT_LOSSES: dict[str, Callable[..., Tensor]] = {"squared": squared_error, "kl": hinton_kl}
"""Losses of outputs, called as (student, teacher)."""

JacobianLoss: TypeAlias = Literal["bounded", "relative", "squared", "normalized"]
"""Names of the losses of Jacobians."""

JACOBIAN_LOSSES: dict[str, Callable[..., Tensor]] = {
    "bounded": bounded_error,
    "relative": relative_error,
    "squared": squared_error,
    "normalized": normalized_error,
}
"""Losses of rows of Jacobians, called as (student, teacher)."""

PENALTIES: dict[str, Callable[..., Tensor]] = {
    "squared-norm": squared_norm,
    "hoffman": hoffman,
    "paper-label-squared": paper_label_squared,
    "paper-label-cross-entropy": paper_label_cross_entropy,
    "label-cross-entropy": label_cross_entropy,
    "piecewise-linear-cross-entropy": piecewise_linear_cross_entropy,
}
"""Penalties on the rows of one Jacobian."""

Task: TypeAlias = Literal["classification", "regression"]
"""Whether labels are classes or numbers."""
Positions: TypeAlias = Literal["sum", "mean"]
"""How dense outputs are reduced over their positions."""

__all__ = [
    "IGNORED",
    "JACOBIAN_LOSSES",
    "OUTPUT_LOSSES",
    "PENALTIES",
    "JacobianLoss",
    "OutputLoss",
    "Positions",
    "Task",
    "agreement",
    "antithetic",
    "attention_map",
    "attention_transfer",
    "bounded_error",
    "centered_variance",
    "cross_entropy",
    "direction_and_magnitude",
    "fisher",
    "hinton_kl",
    "hoffman",
    "label_cross_entropy",
    "match_sizes",
    "noise_distillation",
    "normalized_error",
    "paper_cross_entropy",
    "paper_label_cross_entropy",
    "paper_label_squared",
    "piecewise_linear_cross_entropy",
    "relative_error",
    "squared_error",
    "squared_norm",
]
