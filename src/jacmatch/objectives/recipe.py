"""The defaults of distillation, in one place: `Distillation` in Python and `jacmatch distill` both read them here.

What a derivative is worth depends on the amount of data: it gains most at 5 to 10 samples per class and costs accuracy
from about 500 on. So the defaults follow the number of samples per class, which is given or counted and never assumed.
"""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from jacmatch.errors import InputError
from jacmatch.jacobian import Estimator, LabelClass, LabelLogit, Loss, Readout
from jacmatch.losses import OutputLoss
from jacmatch.objectives.base import Share
from jacmatch.objectives.points import AtData, AtMixedPairs, Point
from jacmatch.objectives.schedules import WeightSchedule

Task: TypeAlias = Literal["classification", "regression"]

TEMPERATURE: Final = 4.0
"""τ of the KL divergence that is the output loss of a classification."""
SHARE: Final = 0.3
"""Share of the Jacobian term in the gradient norm, where there is such a term."""
SCARCE: Final = 30
"""Samples per class up to which networks are compared between data points (`AtMixedPairs`).

At 100 per class mixing still helps networks without normalization and already costs those with BatchNorm accuracy, on
validation images: docs/results/default-recipe.md."""
WORTHWHILE: Final = 200
"""Samples per class up to which there is a Jacobian term.

It gains up to 500 in as many steps; in the same time plain KL is as good at 300 and better at 500, on validation
images."""


@dataclass(frozen=True)
class Recipe:
    """What is minimized, and where.

    Attributes:
        output_loss: Loss of the output term.
        temperature: τ of `kl`.
        point: Where student and teacher are compared.
        jacobians: Weight of the Jacobian term; 0 where no derivative is computed.
        schedule: Factor of that weight.
    """

    output_loss: OutputLoss
    temperature: float | int
    point: Point
    jacobians: float | int
    schedule: WeightSchedule


def recipe(
    task: Task,
    samples_per_class: float | int | None = None,
    *,
    single_label: bool = False,
    derivatives: bool = False,
    output_loss: OutputLoss | None = None,
    temperature: float | int | None = None,
    point: Point | None = None,
    jacobians: float | int | None = None,
    schedule: WeightSchedule | None = None,
) -> Recipe:
    """Return the settings of a distillation; what is given stays, what is None is filled in.

    | | classification | regression |
    |---|---|---|
    | `output_loss` | `kl` at τ = 4; an explicit `kl` without a temperature has τ = 1 | `squared` |
    | `point` | mixed pairs up to 30 samples per class, unless `single_label`; else the data | the data |
    | `jacobians` | `Share(0.3)` up to 200 samples per class; else 0, and no derivative is computed | \
`Share(0.3)` |

    With `samples_per_class=None` a classification is not taken to be scarce: it has no Jacobian term unless
    `derivatives` asks for one.

    Args:
        task: Whether labels are classes or numbers.
        samples_per_class: Training samples for each class; None where that is not known, and in regression.
        single_label: Whether something needs the label of a single sample, which a mixed pair does not have.
        derivatives: Whether a setting of the Jacobian term was given, which asks for that term at any amount of data.
        output_loss: As given.
        temperature: As given.
        point: As given.
        jacobians: As given; its schedule is then constant, unless that is given too.
        schedule: As given.

    Raises:
        InputError: `samples_per_class` is not positive.

    Example:
        >>> few, many = recipe("classification", 10), recipe("classification", 5000)
        >>> few.output_loss, few.temperature, few.point, few.jacobians, many.jacobians
        ('kl', 4.0, AtMixedPairs(), Share(0.3), 0.0)
    """
    if samples_per_class is not None and not samples_per_class > 0:
        raise InputError("`samples_per_class` of `Distillation` must be positive.", got=samples_per_class)
    classes = task == "classification"
    if schedule is None:
        schedule = WeightSchedule(samples_per_class if classes and jacobians is None else None)
    if jacobians is None:
        known = samples_per_class is not None and samples_per_class <= WORTHWHILE
        jacobians = Share(SHARE) if derivatives or known or not classes else 0.0
    usual = TEMPERATURE if classes and output_loss is None else 1.0
    if output_loss is None:
        output_loss = "kl" if classes else "squared"
    if point is None:
        scarce = classes and samples_per_class is not None and samples_per_class <= SCARCE
        point = AtMixedPairs() if scarce and not single_label else AtData()
    return Recipe(output_loss, usual if temperature is None else temperature, point, jacobians, schedule)


def needs_single_label(probe: Estimator | None, *readouts: Readout | None) -> bool:
    """Whether a probe or readout needs the label of a single sample."""
    return isinstance(probe, LabelClass) or any(isinstance(readout, LabelLogit | Loss) for readout in readouts)
