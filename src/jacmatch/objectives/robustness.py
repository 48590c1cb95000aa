"""Robustness without a teacher: a penalty on the network's own Jacobian, or noise on the input as the alternative."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from jacmatch.errors import InputError, class_axis, unknown_name
from jacmatch.jacobian import (
    BatchNormPolicy,
    Context,
    DataPairs,
    Engine,
    Estimator,
    FisherRows,
    LabelClass,
    Logits,
    Loss,
    Module,
    RandomOutputs,
    Readout,
    SubspaceInputs,
    TopClass,
    run,
    vjp_products,
)
from jacmatch.jacobian.features import class_dimension
from jacmatch.jacobian.modules import row_numbers
from jacmatch.losses import IGNORED, Positions, Task, squared_norm
from jacmatch.losses.outputs import precise
from jacmatch.objectives import validation
from jacmatch.objectives.base import Computed, Objective, Output
from jacmatch.objectives.compiled import Compared, Step
from jacmatch.objectives.differentiation import Differentiation
from jacmatch.objectives.terms import AtNoise, Batch, label_term, positions_of


@dataclass(frozen=True)
class RootProbabilities:
    """The readout rᵢ = 2√qᵢ, q = softmax of the outputs: ‖J_r‖²_F = Σᵢ qᵢ ‖∇log qᵢ‖², without a 1/q.

    Its squared norm is twice `losses.piecewise_linear_cross_entropy`, and a random row estimates it without bias.
    """

    class_dim: int | None = None  # the dimension of the classes; needed for outputs of more than two dimensions
    layers: tuple[str, ...] = ()

    def __call__(
        self, outputs: Float[Tensor, "batch *out"], features: Mapping[str, Tensor], context: Context
    ) -> Float[Tensor, "batch *out"]:
        """Return 2√q."""
        axis = class_axis("RootProbabilities", outputs.shape, self.class_dim)
        return 2 * (functional.log_softmax(outputs, dim=axis) / 2).exp()


Form: TypeAlias = Literal["hoffman", "squared-norm", "piecewise-linear-cross-entropy", "paper-label-cross-entropy"]


FORMS: dict[str, tuple[Readout, float]] = {
    "hoffman": (Logits(), 0.5),
    "squared-norm": (Logits(), 1.0),
    "piecewise-linear-cross-entropy": (RootProbabilities(), 0.5),
    "paper-label-cross-entropy": (Loss(), 1.0),
}
"""The penalties of `Robustness` by the names of `losses.PENALTIES`: a factor times ‖J‖²_F of a readout."""


@dataclass(frozen=True)
class _Comparison:
    """The losses of `Robustness`: `factor` times the squared norm of the rows."""

    task: Task
    factor: float
    class_dim: int | None
    positions: Positions = "sum"

    def __call__(self, outputs: Tensor, values: Tensor, rows: Tensor | None, step: Step) -> dict[str, Tensor]:
        """Return the terms whose tensors the step contains."""
        assert step.labels is not None
        terms = {"labels": label_term(self.task, outputs, step.labels, class_dim=self.class_dim)}
        if rows is not None:
            rows = precise(rows) if step.unit is None else precise(rows) * precise(step.unit)
            terms["penalty"] = self.factor * squared_norm(rows.transpose(0, 1)).mean()
        if self.positions == "mean":
            number = positions_of(outputs, self.class_dim)
            terms = {name: term / number for name, term in terms.items()}
        return terms


class Robustness(Objective):
    """Labels and a penalty on the network's own Jacobian J, as one loss: ℓ = labels + λ · penalty.

    The penalty is a sum over rows and input elements and a mean over the batch; `form` names it:

    - `hoffman`: ½‖J‖²_F.
    - `squared-norm`: ‖J‖²_F, the paper's penalty for squared error with labels, with λ for σ².
    - `piecewise-linear-cross-entropy`: ½ Σᵢ qᵢ ‖∇zᵢ − Σⱼ qⱼ ∇zⱼ‖², q = softmax(z). With λ = σ² it is the second-order
      increase of the cross-entropy under noise of standard deviation σ, where z is locally linear. Corrected form.
    - `paper-label-cross-entropy`: Σᵢ yᵢ ‖∇qᵢ‖²/qᵢ² = ‖∇ log q_y‖². Paper's form, whose coefficient differs from that of
      noise (see `losses`); it equals the squared gradient of the loss, known as double backpropagation.

    A step with one product takes two passes where a plain step takes one, and two to three times as long. `noise`, with
    any weight λ, adds Gaussian noise to the input of each training step, an alternative at no extra cost. `state_dict`
    and `parameters` are the student's.

    Args:
        student: The network to train.
        penalty: λ, or a `GradientShare` of the gradient norm; 0 trains on the labels alone, at no extra cost.
        form: The form of the penalty, see above.
        probe: Which products estimate ‖J‖²_F; a random row of norm √K if None, which is unbiased. `EveryRow()` is
            exact. `LabelClass()` and `TopClass()` (the network's own largest output) give the paper's single row.
        noise: Standard deviation σ ≥ 0 of the noise, in units of `scale`, drawn for each sample and call. No clipping.
        scale: The unit of the input, one number or one for each channel. 1 means the raw input; the standard deviation
            of the data means the normalized input: the penalty is then that of J·scale, and the noise σ·scale.
        task: Whether labels are classes (cross-entropy) or numbers (squared error).
        positions: Reduction of both terms over the positions of dense outputs: `sum` or `mean`.
        every, fraction, measure_every, engine, chunk_size, batch_norm, seed, output, class_dim, ignore_index: As in
            `Distillation`, for the penalty.

    Raises:
        InputError: a setting is invalid, or two settings are incompatible.

    References:
        "Local Affine Approximators", NIPS 2017 LLD, Prop 2, Eq. 3 and table 3; Drucker & LeCun 1992; Hoffman, Roberts &
        Yaida 2019, arXiv:1908.02729.

    Example:
        >>> objective = Robustness(nn.Linear(3, 2), penalty=0.1)
        >>> objective(torch.randn(4, 3), torch.tensor([0, 1, 1, 0])).keys()
        ['loss', 'labels', 'penalty']
    """

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
        fraction: float | int = 1.0,
        engine: Engine = "auto",
        chunk_size: int | None = None,
        batch_norm: BatchNormPolicy = "frozen",
        task: Task = "classification",
        seed: int = 0,
        measure_every: int = 100,
        output: Output = None,
        class_dim: int | None = None,
        positions: Positions = "sum",
        ignore_index: int = IGNORED,
    ) -> None:
        if form not in FORMS:
            raise unknown_name("`form` of `Robustness`", str(form), FORMS)
        validation.known_names("Robustness", task=task, positions=positions)
        values = [float(value) for value in (scale if isinstance(scale, Sequence) else [scale])]
        if not 0 <= noise < math.inf:
            raise InputError("`noise` of `Robustness` must be at least 0 and finite.", got=noise)
        if not values or not all(0 < value < math.inf for value in values):
            raise InputError("`scale` of `Robustness` must be positive and finite.", got=scale)
        probe = RandomOutputs(1, law="sphere") if probe is None else probe
        settings: dict[str, Any] = {"batch_norm": batch_norm, "engine": engine, "seed": seed, "fraction": fraction}
        how = Differentiation(probe, FORMS[form][0], chunk_size=chunk_size, caller="Robustness", **settings)
        calls: dict[str, Any] = {"every": every, "measure_every": measure_every, "class_dim": class_dim}
        super().__init__(student, None, {"labels": 1.0, "penalty": penalty}, how, output=output, **calls)
        _check_probe(form, probe, task)
        self.form, self.noise, self.task = form, noise, task
        self.positions, self.ignore_index = positions, ignore_index
        self.register_buffer("scale", torch.tensor(values), persistent=False)
        self._values_like: Tensor | None = None

    def _moved(self, x: Tensor, y: Tensor | None, *, draw: int, **others: Any) -> Batch:
        """Return the batch, with noise on its inputs in training."""
        batch = super()._moved(x, y, draw=draw, **others)
        if not (self.noise and self.training):
            return batch
        seed = self.differentiation.seed
        noise, _ = AtNoise(self.noise).move(torch.zeros_like(x), x, ids=batch.ids, seed=seed, draw=draw)
        return replace(batch, x=x + self._unit(x) * noise)

    @property
    def _differentiable(self) -> bool:
        """Whether the inputs must have a floating-point type: for derivatives and for added noise."""
        return super()._differentiable or bool(self.noise)

    def not_compiled(self) -> str | None:
        """Return why the steps of this objective are not compiled; None where they are."""
        if self.takes_derivatives and isinstance(self.differentiation.probe, TopClass):
            return "TopClass is not compiled: its row depends on the outputs of the same pass."
        return super().not_compiled()

    def _unit(self, x: Tensor) -> Tensor:
        """Return the scale, in a shape that broadcasts with a sample."""
        if len(self.scale) not in {1, x.shape[1]}:
            rule = f"`scale` of `Robustness` must have one number, or one for each of the {x.shape[1]} channels."
            raise InputError(rule, got=f"{len(self.scale)} numbers")
        return self.scale.to(x).view(-1, *[1] * (x.dim() - 2))

    def _terms(self, batch: Batch, count: int, *, measured: bool) -> Computed:
        how, first = self.differentiation, batch.part(slice(count)) if count else batch
        assert batch.labels is not None
        if count and isinstance(FORMS[self.form][0], Loss) and batch.labels.is_floating_point():
            got = str(batch.labels.dtype)
            raise InputError(f"`y` of `Robustness(form={self.form!r})` must be class indices.", got=got)
        if self.class_dim is None and isinstance(how.readout, RootProbabilities):
            self.class_dim = class_dimension(self.student, batch.x, batch.arguments)
            how.readout = replace(how.readout, class_dim=self.class_dim)
        step = Step(batch.x, batch.labels, label=batch.labels, arguments=batch.arguments)
        if count and how.side == "output":
            step.unit = self._unit(batch.x)

        def directions(values: Tensor) -> Tensor:
            validation.not_single(values)
            return how.directions(first, values.to(first.x.dtype))

        def derive() -> tuple[Tensor, Tensor | None]:
            if not count:
                return run(self.student, batch.x, arguments=batch.arguments)[0], None
            v = self._unit(first.x) * how.directions(first, None) if how.side == "input" else directions
            result = how.products(
                self.student, first.x, v, how.readout, Context(first.label, arguments=first.arguments), traced=measured
            )
            self._values_like = result.values.detach()[:1]
            return result.outputs, result.products

        def eager() -> Compared:
            outputs, rows = self._in_parts(self.student, batch, len(first.x), derive)
            validation.not_single(outputs)
            if outputs.dim() > 2 and self.class_dim is None and self.task == "classification":
                self._read_class_dim(batch)
            return outputs, self._comparison(outputs, outputs, rows, step)

        if count and self.compiled is not None and self.not_compiled() is None:
            if self._values_like is None:  # the number of outputs is not known yet
                outputs, terms = eager()
                return outputs, None, terms, None
            like = torch.zeros_like(self._values_like).expand(len(first.x), *self._values_like.shape[1:])
            step.v = directions(like)
        outputs, terms = self._compiled_step(step, self._comparison, how.readout, eager, count > 0, measured)
        return outputs, None, terms, None

    @property
    def _comparison(self) -> _Comparison:
        return _Comparison(self.task, FORMS[self.form][1], self.class_dim, self.positions)


def jacobian_norm_penalty(
    module: Module,
    x: Float[Tensor, "batch *input"],
    *,
    probes: int = 1,
    seed: int | None = None,
    ids: Int[Tensor, "batch"] | None = None,
    batch_norm: BatchNormPolicy = "frozen",
) -> tuple[Float[Tensor, "batch *out"], Float[Tensor, ""]]:
    """Return outputs y (B, K), and an unbiased estimate of ½‖J‖²_F as a mean over the batch, to be added to a loss.

    The estimate is K/2 · ‖v̂ᵀJ‖², averaged over `probes` random unit vectors v̂ on the output side. It takes one forward
    pass, and one backward pass for each vector.

    Args:
        module: The network.
        x: Its raw input.
        probes: Random directions for each sample, at least 1.
        seed: Seeds the directions; None draws a new seed from torch's generator at each call.
        ids: A number for each sample, which together with the seed determines its directions.
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
    ids = row_numbers(x) if ids is None else ids
    directions = partial(RandomOutputs(probes, law="sphere").directions, ids=ids, seed=seed, draw=0)
    result = vjp_products(module, x, lambda values: directions(outputs=values), batch_norm=batch_norm)
    return result.outputs, squared_norm(result.products.transpose(0, 1)).mean() / 2


def _check_probe(form: str, probe: Estimator, task: str) -> None:
    """Reject a probe that does not estimate the norm that `form` needs, and class settings in regression."""
    classes = [form] if form.endswith("cross-entropy") else ["LabelClass"] if isinstance(probe, LabelClass) else []
    if task == "regression" and classes:
        do = "Use form='squared-norm' or 'hoffman', and a probe without labels."
        raise InputError("`Robustness(task='regression')` must not have settings for classes.", got=classes[0], do=do)
    single = isinstance(probe, LabelClass | TopClass) and not isinstance(FORMS[form][0], Logits)
    if single or isinstance(probe, DataPairs | FisherRows | SubspaceInputs):
        rule = f"`probe` of `Robustness(form={form!r})` must estimate the norm of all rows."
        do = "Use RandomOutputs(k), RandomInputs(k), SampledRows(k), AntitheticNoise(k, sigma=...) or EveryRow()."
        raise InputError(rule, got=type(probe).__name__, do=do)
