"""Robustness without a teacher: a penalty on the network's own Jacobian, and noise on the input as its rival."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional

from jacmatch.errors import InputError
from jacmatch.jacobian import BatchNormPolicy, Context, Estimator, Loss, Module, RandomOutputs, pull, push, run
from jacmatch.losses import hoffman, squared_norm
from jacmatch.objectives.base import Objective, Output, Terms
from jacmatch.objectives.penalties import FORMS, Form, go_together, known, numbers
from jacmatch.objectives.points import AtNoise
from jacmatch.objectives.terms import exact_values, label_term, precise


class Robustness(Objective):
    """Labels and a penalty on the network's own Jacobian J, as one loss: ℓ = labels + λ · penalty.

    The penalty is a sum over rows and input elements and a mean over the batch; `form` names it:

    - `hoffman`: ½‖J‖²_F.
    - `squared-norm`: ‖J‖²_F, the paper's penalty for squared error with labels, λ in place of σ².
    - `piecewise-linear-cross-entropy`: ½ Σᵢ qᵢ ‖∇zᵢ − Σⱼ qⱼ ∇zⱼ‖², q = softmax(z): with λ = σ² what noise of standard
      deviation σ adds to the cross-entropy, to second order, where z is linear around the input. Corrected form.
    - `paper-label-cross-entropy`: Σᵢ yᵢ ‖∇qᵢ‖²/qᵢ² = ‖∇ log q_y‖². Paper's form, whose coefficient is not that of the
      noise (see `losses`); as such it is the squared gradient of the loss, or double backpropagation.

    A step with one product takes two passes where a plain one takes one, and two to three times the seconds. `noise`,
    at any weight λ, adds Gaussian noise to the input of each training step and is the rival at no cost. `state_dict`
    and `parameters` are the student's.

    Args:
        student: The network to train.
        penalty: λ, or a `Share` of the gradient norm; 0 leaves the labels alone, and costs nothing.
        form: Which penalty.
        probe: Which products estimate ‖J‖²_F; a random row of norm √K if None, which is unbiased. `EveryRow()` is
            exact, `LabelClass()` and `TopClass()` (the network's own largest output) are the paper's single row.
        noise: Standard deviation σ ≥ 0 of the noise, new for each sample and call, in units of `scale`. No clipping.
        scale: The unit of the input, one number or one for each channel. 1 is the raw input; the standard deviation of
            the data makes it the normalised input: the penalty is then that of J·scale, the noise σ·scale.
        every: The penalty is computed on each n-th call in training, with n times its weight; a
            `Share` is that of such a call.
        batch_norm: Policy for BatchNorm in training mode.
        task: Whether labels are classes (cross-entropy) or numbers (squared error).
        seed: Seeds directions and noise.
        measure_every: Calls between two measurements of the shares of the gradient norm.
        output: Selects the outputs where the network returns more than one tensor.

    Raises:
        InputError: a setting is wrong, or settings do not go together.

    References:
        "Local Affine Approximators", NIPS 2017 LLD, Prop 2, Eq. 3 and table 3; Drucker & LeCun 1992; Hoffman, Roberts &
        Yaida 2019, arXiv:1908.02729.

    Example:
        >>> objective = Robustness(nn.Linear(3, 2), penalty=0.1)
        >>> objective(torch.randn(4, 3), torch.tensor([0, 1, 1, 0])).keys()
        ['loss', 'labels', 'penalty']
    """

    needs_partners = False
    derivative_term = "penalty"
    scale: Tensor

    def __init__(
        self,
        student: nn.Module,
        *,
        penalty: float | int = 0.1,
        form: Form = "hoffman",
        probe: Estimator | None = None,
        noise: float | int = 0.0,
        scale: float | int | Sequence[float | int] = 1.0,
        every: int = 1,
        batch_norm: BatchNormPolicy = "frozen",
        task: Literal["classification", "regression"] = "classification",
        seed: int = 0,
        measure_every: int = 100,
        output: Output = None,
    ) -> None:
        weights = {"labels": 1.0, "penalty": penalty}
        super().__init__(student, None, weights, every=every, schedule=None, measure_every=measure_every, output=output)
        self.form, self.noise, self.batch_norm = form, noise, batch_norm
        self.probe: Estimator = RandomOutputs(1, law="sphere") if probe is None else probe
        self.task, self.seed = task, seed
        self.slope_scale: Tensor | None = None
        known(form=form, task=task, batch_norm=batch_norm)
        numbers(noise=noise, scale=scale, every=every, measure_every=measure_every)
        go_together(form, self.probe, task)
        values = [float(value) for value in (scale if isinstance(scale, Sequence) else [scale])]
        self.register_buffer("scale", torch.tensor(values), persistent=False)

    def forward(
        self,
        x: Float[Tensor, "batch *input"],
        y: Shaped[Tensor, "batch *out"],
        *,
        ids: Int[Tensor, "batch"] | None = None,
        draw: int | None = None,
        partners: Float[Tensor, "batch *input"] | None = None,
        partner_labels: Shaped[Tensor, "batch *out"] | None = None,
        progress: float | int = 0.0,
    ) -> Terms:
        """The terms for a batch.

        Args:
            x: Raw inputs.
            y: Labels: classes, probabilities, or numbers in regression.
            ids: A number for each sample, the same in each epoch; seeds directions and noise. Row numbers if None.
            draw: Which of the independent draws of directions and noise; None counts the calls.
            partners: Not used.
            partner_labels: Not used.
            progress: Not used.

        Raises:
            InputError: a shape is wrong.
            UnsupportedError: the student cannot be differentiated twice.
        """
        call = self._call(progress)
        draw = call.number if draw is None else draw
        ids = torch.arange(len(x), device=x.device) if ids is None else ids
        if not len(y) == len(ids) == len(x):
            got = f"{len(x)} inputs, {len(y)} labels and {len(ids)} ids"
            raise InputError("`x`, `y` and `ids` of `Robustness` must have one entry for each sample.", got=got)
        if self.noise and self.training:
            noise, _ = AtNoise(self.noise).move(torch.zeros_like(x), x, ids=ids, seed=self.seed, draw=draw)
            x = x + self._unit(x) * noise
        if call.factor > 0:
            outputs, penalty = self._penalized(x, y, ids, draw, traced=call.measured)
            unweighted = {"labels": label_term(self.task, outputs, y), "penalty": penalty}
        else:
            outputs, _ = run(self.student, x)
            unweighted = {"labels": label_term(self.task, outputs, y)}
        return self._result(call, unweighted, outputs, None)

    @property
    def _differentiable(self) -> bool:
        """For derivatives, and to add noise to the inputs."""
        return super()._differentiable or bool(self.noise)

    def scale_slopes(self, scale: Tensor | None) -> None:
        """Scales the backward pass of the products, as fp16 needs it; see `jacobian.products.pull`."""
        self.slope_scale = scale

    def _unit(self, x: Tensor) -> Tensor:
        """The scale, shaped to multiply a sample."""
        if len(self.scale) not in {1, x.shape[1]}:
            rule = f"`scale` of `Robustness` must have one number, or one for each of the {x.shape[1]} channels."
            raise InputError(rule, got=f"{len(self.scale)} numbers")
        return self.scale.to(x).view(-1, *[1] * (x.dim() - 2))

    def _penalized(self, x: Tensor, y: Tensor, ids: Tensor, draw: int, *, traced: bool) -> tuple[Tensor, Tensor]:
        """Outputs and penalty from one pass."""
        readout, factor = FORMS[self.form]
        if isinstance(readout, Loss) and y.is_floating_point():
            raise InputError(f"`y` of `Robustness(form={self.form!r})` must be class numbers.", got=str(y.dtype))

        def directions(outputs: Tensor | None) -> Tensor:
            v: Tensor = self.probe.directions(
                outputs=outputs, x=x, labels=y, ids=ids, seed=self.seed, draw=draw, partners=None
            )
            return v

        context = Context(labels=y)
        settings: dict[str, Any] = {"readout": readout, "context": context, "batch_norm": self.batch_norm}
        if self.probe.side == "input":
            step = getattr(self.probe, "step", None)
            with exact_values(x) if step is not None else nullcontext():
                result = push(self.student, x, self._unit(x) * directions(None), step=step, **settings)
            rows = precise(result.products)
        else:
            # Directions that ask for a gradient betray a backward that can be taken only once.
            result = pull(
                self.student,
                x,
                lambda values: directions(values.to(x.dtype)).to(x.dtype, copy=True).requires_grad_(traced),
                scale=self.slope_scale,
                **settings,
            )
            rows = precise(result.products) * precise(self._unit(x))
        return result.outputs, factor * squared_norm(rows.transpose(0, 1)).mean()


def jacobian_norm_penalty(
    module: Module,
    x: Float[Tensor, "batch *input"],
    *,
    probes: int = 1,
    seed: int | None = None,
    ids: Int[Tensor, "batch"] | None = None,
    batch_norm: BatchNormPolicy = "frozen",
) -> tuple[Float[Tensor, "batch *out"], Float[Tensor, ""]]:
    """Outputs y (B, K), and an unbiased estimate of ½‖J‖²_F as a mean over the batch, to be added to a loss.

    The estimate is K/2 · ‖v̂ᵀJ‖², averaged over `probes` random unit vectors v̂ on the output side; one forward pass and
    one backward pass for each.

    Args:
        module: The network.
        x: Its raw input.
        probes: Random directions for each sample, at least 1.
        seed: Seeds the directions; None draws a new seed from torch's generator at each call.
        ids: A number for each sample, which with the seed fixes its directions.
        batch_norm: Policy for BatchNorm in training mode.

    Raises:
        InputError: `probes` is below 1.

    References:
        Hoffman, Roberts & Yaida 2019, arXiv:1908.02729, equation 12 and algorithm 1.

    Example:
        >>> y, penalty = jacobian_norm_penalty(torch.nn.Linear(3, 2), torch.randn(5, 3))
        >>> y.shape, penalty.shape
        (torch.Size([5, 2]), torch.Size([]))
    """
    if probes < 1:
        raise InputError("`probes` of `jacobian_norm_penalty` must be at least 1.", got=probes)
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    ids = torch.arange(len(x), device=x.device) if ids is None else ids
    estimator = RandomOutputs(probes, law="sphere")

    def unit_vectors(values: Tensor) -> Tensor:
        v = estimator.directions(outputs=values, x=x, labels=None, ids=ids, seed=seed, draw=0, partners=None)
        return functional.normalize(v, dim=2)

    result = pull(module, x, unit_vectors, batch_norm=batch_norm)
    rows = precise(result.products.transpose(0, 1))
    return result.outputs, hoffman(rows, result.outputs.shape[1]).mean()
