"""What a teacher is: a frozen function that answers about itself, once for each batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Shaped
from torch import Tensor

from jacmatch.jacobian import Context, Logits, Readout, pull, push

Cotangents = Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Question:
    """What is asked of a teacher besides its outputs.

    Attributes:
        readout: What is differentiated.
        cotangents: v of vᵀJ, (P, B, R), or a function that makes them from the teacher's values (B, R).
        tangents: v of Jv, (P, B, *input). At most one of the two is given.
        step: Length h where Jv shall be an antithetic difference.
        layers: Dotted paths of features to return.
        labels: Labels, for readouts that need them.
    """

    readout: Readout = field(default_factory=Logits)
    cotangents: Cotangents | None = None
    tangents: Tensor | None = None
    step: float | None = None
    layers: tuple[str, ...] = ()
    labels: Shaped[Tensor, "batch *out"] | None = None


@dataclass(frozen=True)
class Answer:
    """A teacher's answer; nothing in it has a gradient.

    Attributes:
        outputs: (B, K).
        values: The readout's values, (B, R).
        products: vᵀJ (P, B, *input) or Jv (P, B, R), None if neither was asked.
        features: Features of the layers asked for.
        cotangents: The v that were used, where a function made them.
    """

    outputs: Tensor
    values: Tensor
    products: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    cotangents: Tensor | None = None


@runtime_checkable
class Teacher(Protocol):
    """A frozen function that can answer about itself.

    Every teacher gives outputs and Jv; `answers_vjp` says whether it gives vᵀJ.
    """

    @property
    def answers_vjp(self) -> bool:
        """Whether vᵀJ can be asked."""
        ...

    def answer(self, x: Float[Tensor, "batch *input"], question: Question) -> Answer:
        """The outputs at x and the products asked for."""
        ...


@dataclass(frozen=True)
class Own:
    """A readout whose class index or pixel comes from the network's own outputs: the teacher's side of the readout."""

    readout: Readout

    @property
    def layers(self) -> tuple[str, ...]:
        """Those of the readout."""
        return self.readout.layers

    def __call__(self, outputs: Tensor, features: Mapping[str, Tensor], context: Context) -> Tensor:
        """The readout's values."""
        return self.readout(outputs, features, replace(context, teacher_outputs=outputs.detach()))


def kept(cotangents: Cotangents, used: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """The cotangents as a function that also puts into `used` what it returned."""

    def make(values: Tensor) -> Tensor:
        used.append(cotangents(values) if callable(cotangents) else cotangents)
        return used[-1]

    return make


def pull_readout(question: Question, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The chain rule behind the outputs: values r(y), wᵀ = vᵀ ∂r/∂y of shape (P, B, K), and the v that were used."""
    assert question.cotangents is not None
    used: list[Tensor] = []
    context = Context(labels=question.labels)
    result = pull(_identity, outputs, kept(question.cotangents, used), readout=Own(question.readout), context=context)
    return result.values, result.products, used[0]


def push_readout(question: Question, outputs: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """The chain rule behind the outputs: values r(y) and (∂r/∂y) Jv, for Jv of the outputs (P, B, K)."""
    context = Context(labels=question.labels)
    result = push(_identity, outputs, tangents, readout=Own(question.readout), context=context)
    return result.values, result.products


def values_of(question: Question, outputs: Tensor) -> Tensor:
    """The readout's values for outputs alone."""
    return Own(question.readout)(outputs, {}, Context(labels=question.labels))


def _identity(y: Tensor) -> Tensor:
    return y
