"""The forms of the penalty on a network's own Jacobian, and which settings go with them."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from jacmatch.errors import InputError, unknown_name
from jacmatch.jacobian import (
    BatchNormPolicy,
    Context,
    DataPairs,
    Estimator,
    FisherRows,
    LabelClass,
    Logits,
    Loss,
    Readout,
    TopClass,
)

Form: TypeAlias = Literal["hoffman", "squared-norm", "piecewise-linear-cross-entropy", "paper-label-cross-entropy"]


@dataclass(frozen=True)
class RootProbabilities:
    """The readout rᵢ = 2√qᵢ, q = softmax of the outputs: ‖J_r‖²_F = Σᵢ qᵢ ‖∇log qᵢ‖², without a 1/q.

    Its squared norm is twice `losses.piecewise_linear_cross_entropy`, and a random row estimates it without bias.
    """

    layers: tuple[str, ...] = ()

    def __call__(
        self, outputs: Float[Tensor, "batch out"], features: Mapping[str, Tensor], context: Context
    ) -> Float[Tensor, "batch out"]:
        """Returns 2√q."""
        return 2 * (functional.log_softmax(outputs, dim=-1) / 2).exp()


FORMS: dict[str, tuple[Readout, float]] = {
    "hoffman": (Logits(), 0.5),
    "squared-norm": (Logits(), 1.0),
    "piecewise-linear-cross-entropy": (RootProbabilities(), 0.5),
    "paper-label-cross-entropy": (Loss(), 1.0),
}
"""The penalties of `Robustness` by the names of `losses.PENALTIES`: a factor times ‖J‖²_F of a readout."""

_KNOWN: Final[dict[str, Collection[str]]] = {
    "form": FORMS,
    "task": ("classification", "regression"),
    "batch_norm": get_args(BatchNormPolicy),
}


def known(**settings: str) -> None:
    """Refuses a name that is not among the known ones."""
    for name, given in settings.items():
        if given not in _KNOWN[name]:
            raise unknown_name(f"`{name}` of `Robustness`", str(given), _KNOWN[name])


def numbers(*, noise: float, scale: float | int | Sequence[float | int], **whole: int) -> None:
    """Refuses noise below 0, scales that are not positive, and counts that are not whole numbers from 1."""
    for name, given in whole.items():
        if not isinstance(given, int) or given < 1:
            raise InputError(f"`{name}` of `Robustness` must be a whole number of at least 1.", got=given)
    if not 0 <= noise < math.inf:
        raise InputError("`noise` of `Robustness` must be at least 0 and finite.", got=noise)
    scales = scale if isinstance(scale, Sequence) else [scale]
    if not scales or not all(0 < value < math.inf for value in scales):
        raise InputError("`scale` of `Robustness` must be positive and finite.", got=scale)


def go_together(form: str, probe: Estimator, task: str) -> None:
    """Refuses a probe that is none or does not estimate what the form is, and classes in a regression."""
    if isinstance(probe, type) or not callable(getattr(probe, "directions", None)):
        got = f"the class {probe.__name__}" if isinstance(probe, type) else repr(probe)
        raise InputError("`probe` of `Robustness` must be an object such as RandomOutputs(1).", got=got)
    classes = [form] if form.endswith("cross-entropy") else ["LabelClass"] if isinstance(probe, LabelClass) else []
    if task == "regression" and classes:
        do = "Use form='squared-norm' or 'hoffman', and a probe without labels."
        raise InputError("`Robustness(task='regression')` must not have settings for classes.", got=classes[0], do=do)
    single = isinstance(probe, LabelClass | TopClass) and not isinstance(FORMS[form][0], Logits)
    if single or isinstance(probe, DataPairs | FisherRows):
        rule = f"`probe` of `Robustness(form={form!r})` must estimate the norm of all rows."
        do = "Use RandomOutputs(k), RandomInputs(k), SampledRows(k), AntitheticNoise(k, sigma=...) or EveryRow()."
        raise InputError(rule, got=type(probe).__name__, do=do)
