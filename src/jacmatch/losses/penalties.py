"""Penalties on the student's own Jacobian: robustness to input noise, without a teacher."""

from jaxtyping import Float, Integer
from torch import Tensor

from jacmatch.errors import InputError
from jacmatch.losses.jacobians import above_zero, flat_rows, one_per_row, squared_row_norms
from jacmatch.losses.outputs import equal_shapes, expected_under


def noise_scale(caller: str, sigma: float) -> None:
    """Reject a standard deviation that is negative or not finite."""
    if not sigma >= 0:
        rule = f"`sigma` of `{caller}` must be at least 0, the noise's standard deviation in units of the input."
        raise InputError(rule, got=sigma)


def squared_norm(rows: Float[Tensor, "batch row *input"]) -> Float[Tensor, "batch"]:
    """Return the squared norm of the rows, Σ_r ‖S_r‖².

    With all rows it is ‖J‖²_F; with products vᵀJ or Jv in directions with E[vvᵀ] = I it is an unbiased estimate of it.
    For a linear network it is weight decay; for a deep one it is not.

    Args:
        rows: Rows of the student's Jacobian, or products with it.

    Raises:
        InputError: There is no row dimension.

    References:
        Drucker & LeCun 1992 (double backpropagation); Bishop 1995 (training with noise).

    Example:
        >>> import torch
        >>> squared_norm(torch.tensor([[[1.0, 2.0], [0.0, 3.0]]]))
        tensor([14.])
    """
    equal_shapes("squared_norm", rows=rows)
    return squared_row_norms(rows).sum(1)


def hoffman(rows: Float[Tensor, "batch row *input"], outputs: int) -> Float[Tensor, "batch"]:
    """Return Hoffman's regularizer, ½ K · mean_r ‖v̂_rᵀJ‖², an unbiased estimate of ½‖J‖²_F.

    The directions v̂ have norm **one** here, hence the factor K; uniform on the sphere, signs over √K, or all K basis
    vectors, which give ½‖J‖²_F exactly. Directions with E[vvᵀ] = I (norm √K) contain this factor already: for them,
    half of `squared_norm`, divided by the number of directions, is the same.

    Args:
        rows: Products v̂ᵀJ with directions v̂ of norm 1 in output space.
        outputs: K ≥ 1, the number of the network's outputs (not of the rows).

    Raises:
        InputError: There is no row dimension, or `outputs` is below 1.

    References:
        Hoffman, Roberts & Yaida 2019, arXiv:1908.02729, the estimator by random projections.

    Example:
        >>> import torch
        >>> jacobian = torch.tensor([[[1.0, 2.0], [0.0, 3.0]]])
        >>> hoffman(jacobian, outputs=2), squared_norm(jacobian) / 2  # the rows are the projections on the basis
        (tensor([7.]), tensor([7.]))
    """
    equal_shapes("hoffman", rows=rows)
    if outputs < 1:
        raise InputError("`outputs` of `hoffman` must be at least 1, the number of the network's outputs.", got=outputs)
    return 0.5 * outputs * squared_row_norms(rows).mean(1)


def paper_label_squared(rows: Float[Tensor, "batch row *input"], sigma: float) -> Float[Tensor, "batch"]:
    """Return the paper's penalty for squared error with labels, σ² Σ_i ‖∇S_i‖², i = 1…K.

        E_ξ Σ_i (y_i − S_i(x+ξ))²  ≈  Σ_i (y_i − S_i)² + σ² Σ_i ‖∇S_i‖²,   ξ ~ N(0, σ²I)

    Paper's form. It is exact for outputs that are linear in the input. In general the remainder is not O(σ⁴) as
    printed: −σ² Σ_i (y_i − S_i) ΔS_i is missing, which vanishes where the labels are fitted. No penalty with first
    derivatives alone contains this term. For cross-entropy there is such a penalty, `piecewise_linear_cross_entropy`.

    Args:
        rows: All rows ∇S_i of the student's Jacobian, or products whose squared norm estimates ‖J‖²_F.
        sigma: σ ≥ 0, the noise's standard deviation in units of the input.

    Raises:
        InputError: There is no row dimension, or sigma is below 0.

    References:
        "Local Affine Approximators", NIPS 2017 LLD, Prop 2.

    Example:
        >>> import torch
        >>> paper_label_squared(torch.tensor([[[1.0, 2.0], [0.0, 3.0]]]), sigma=0.5)
        tensor([3.5000])
    """
    equal_shapes("paper_label_squared", rows=rows)
    noise_scale("paper_label_squared", sigma)
    return sigma**2 * squared_row_norms(rows).sum(1)


def paper_label_cross_entropy(
    probability_rows: Float[Tensor, "batch row *input"],
    probabilities: Float[Tensor, "batch row"],
    labels: Integer[Tensor, "batch"] | Float[Tensor, "batch row"],
    sigma: float,
) -> Float[Tensor, "batch"]:
    """Return the paper's penalty for cross-entropy with labels, σ² Σ_i y_i ‖∇q_i‖² / q_i², i = 1…K.

    Paper's form, for comparison only: **use `piecewise_linear_cross_entropy` instead.** A factor ½ is missing, and the
    Laplacian of q, which is of equal size even where the logits are linear, is left out; see `label_cross_entropy`.

    Args:
        probability_rows: Rows ∇q_i of the student's probabilities.
        probabilities: q.
        labels: Class indices, or probabilities y.
        sigma: σ ≥ 0, the noise's standard deviation in units of the input.

    Raises:
        InputError: The shapes do not match, the labels are not class indices, or sigma is below 0.

    References:
        "Local Affine Approximators", NIPS 2017 LLD, Eq. 3.

    Example:
        >>> import torch
        >>> rows, q = torch.tensor([[[0.25, 0.0], [-0.25, 0.0]]]), torch.tensor([[0.5, 0.5]])
        >>> paper_label_cross_entropy(rows, q, torch.tensor([0]), sigma=1.0)
        tensor([0.2500])
    """
    equal_shapes("paper_label_cross_entropy", probability_rows=probability_rows)
    one_per_row("paper_label_cross_entropy", probability_rows, probabilities=probabilities)
    noise_scale("paper_label_cross_entropy", sigma)
    costs = squared_row_norms(log_rows(probability_rows, probabilities))
    return sigma**2 * expected_under("paper_label_cross_entropy", labels, costs)


def label_cross_entropy(
    probability_rows: Float[Tensor, "batch row *input"],
    probabilities: Float[Tensor, "batch row"],
    laplacians: Float[Tensor, "batch row"],
    labels: Integer[Tensor, "batch"] | Float[Tensor, "batch row"],
    sigma: float,
) -> Float[Tensor, "batch"]:
    """Return the whole second order of cross-entropy with labels, σ²/2 Σ_i y_i (‖∇q_i‖²/q_i² − Δq_i/q_i), i = 1…K.

        E_ξ [−Σ_i y_i log q_i(x+ξ)]  =  −Σ_i y_i log q_i + this + O(σ⁴),   ξ ~ N(0, σ²I)

    Corrected form of `paper_label_cross_entropy` for any smooth network. It needs second derivatives with respect to
    the input and may be negative, so it is meant for studies. For locally linear logits it equals
    `piecewise_linear_cross_entropy`.

    Args:
        probability_rows: Rows ∇q_i of the student's probabilities.
        probabilities: q.
        laplacians: Δq_i, the trace of the second derivatives of each probability.
        labels: Class indices, or probabilities y.
        sigma: σ ≥ 0, the noise's standard deviation in units of the input.

    Raises:
        InputError: The shapes do not match, the labels are not class indices, or sigma is below 0.

    References:
        Corrected form of "Local Affine Approximators", NIPS 2017 LLD, Eq. 3.

    Example:
        >>> import torch
        >>> rows, q = torch.tensor([[[0.25, 0.0], [-0.25, 0.0]]]), torch.tensor([[0.5, 0.5]])
        >>> label_cross_entropy(rows, q, torch.zeros(1, 2), torch.tensor([0]), sigma=1.0)
        tensor([0.1250])
    """
    equal_shapes("label_cross_entropy", probability_rows=probability_rows)
    one_per_row("label_cross_entropy", probability_rows, probabilities=probabilities)
    one_per_row("label_cross_entropy", probability_rows, laplacians=laplacians)
    noise_scale("label_cross_entropy", sigma)
    costs = squared_row_norms(log_rows(probability_rows, probabilities)) - laplacians / above_zero(probabilities)
    return 0.5 * sigma**2 * expected_under("label_cross_entropy", labels, costs)


def piecewise_linear_cross_entropy(
    logit_rows: Float[Tensor, "batch row *input"], probabilities: Float[Tensor, "batch row"], sigma: float
) -> Float[Tensor, "batch"]:
    """Return the penalty for cross-entropy with locally linear logits, σ²/2 Σ_i q_i ‖∇z_i − Σ_j q_j ∇z_j‖².

        E_ξ [−Σ_i y_i log q_i(x+ξ)]  =  −Σ_i y_i log q_i + this + O(σ⁴),   ξ ~ N(0, σ²I), z linear around x

    Corrected form: inside one linear region of a ReLU network it is the whole second order, with first derivatives only
    and without 1/q; and it does not depend on the label. It is the variance of ∇z_i under q, so a vector added to all
    rows changes nothing, and rows of log-probabilities give the same as rows of logits.

    Args:
        logit_rows: Rows ∇z_i of the student's logits, or ∇log q_i.
        probabilities: q = softmax(z).
        sigma: σ ≥ 0, the noise's standard deviation in units of the input.

    Raises:
        InputError: The probabilities are not one for each row, or sigma is below 0.

    References:
        Corrected form of "Local Affine Approximators", NIPS 2017 LLD, Eq. 3.

    Example:
        >>> import torch
        >>> rows, q = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), torch.tensor([[0.5, 0.5]])
        >>> piecewise_linear_cross_entropy(rows, q, sigma=1.0)
        tensor([0.1250])
    """
    equal_shapes("piecewise_linear_cross_entropy", logit_rows=logit_rows)
    one_per_row("piecewise_linear_cross_entropy", logit_rows, probabilities=probabilities)
    noise_scale("piecewise_linear_cross_entropy", sigma)
    rows = flat_rows(logit_rows)
    mean = (probabilities.unsqueeze(2) * rows).sum(1, keepdim=True)
    return 0.5 * sigma**2 * (probabilities * (rows - mean).square().sum(2)).sum(1)


def log_rows(
    probability_rows: Float[Tensor, "batch row *input"], probabilities: Float[Tensor, "batch row"]
) -> Float[Tensor, "batch row entry"]:
    """Return ∇log q_i = ∇q_i / q_i."""
    return flat_rows(probability_rows) / above_zero(probabilities).unsqueeze(2)
