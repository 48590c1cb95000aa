"""The interface of a teacher: a frozen function that is queried once for each batch."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from jacmatch.errors import InputError
from jacmatch.jacobian import Arguments, Context, Logits, Readout, jvp_products, vjp_products
from jacmatch.jacobian.verification import errors

Cotangents = Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Question:
    """A query to a teacher: the outputs, and optionally Jacobian products and features.

    Attributes:
        readout: What is differentiated.
        cotangents: v of vᵀJ, (P, B, R), or a function that computes them from the readout's values (B, R).
        tangents: v of Jv, (P, B, *input). At most one of `cotangents` and `tangents` is given.
        step: Step h; if given, Jv is computed as a central difference.
        layers: Dotted paths of the layers whose features are returned.
        labels: Labels, for readouts that need them.
        arguments: How the network is called at x; None if x is its only argument.
        ids: Index of each sample, for looking up stored answers; None if there is none.
        draw: Number of the independent draw of the samples' points and directions; None if draws are not counted.
        random: Whether x or the directions differ between draws. If not, a `MemoizedTeacher` looks up answers by `ids`
            alone.
        rule: Identifies the function `cotangents`, so that two queries can be compared.

    Raises:
        InputError: Both cotangents and tangents are given.
    """

    readout: Readout = field(default_factory=Logits)
    cotangents: Cotangents | None = None
    tangents: Tensor | None = None
    step: float | None = None
    layers: tuple[str, ...] = ()
    labels: Shaped[Tensor, "batch *out"] | None = None
    arguments: Arguments | None = None
    ids: Int[Tensor, "batch"] | None = None
    draw: int | None = None
    random: bool = False
    rule: Hashable | None = None

    def __post_init__(self) -> None:
        if self.cotangents is not None and self.tangents is not None:
            rule = "`Question` must have `cotangents` (for vᵀJ) or `tangents` (for Jv), not both."
            raise InputError(rule, do="Make two queries.")


@dataclass(frozen=True)
class Answer:
    """A teacher's answer. No tensor in it requires a gradient.

    Attributes:
        outputs: (B, K).
        values: The readout's values, (B, R).
        products: vᵀJ (P, B, *input) or Jv (P, B, R); None if the query has no directions.
        features: Features of the layers that the query names.
        cotangents: The v that were used, if a function computed them.
    """

    outputs: Tensor
    values: Tensor
    products: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    cotangents: Tensor | None = None


@runtime_checkable
class Teacher(Protocol):
    """Protocol of a frozen function that returns outputs and Jacobian products.

    Every teacher gives outputs and Jv; `answers_vjp` says whether it gives vᵀJ.
    """

    @property
    def answers_vjp(self) -> bool:
        """Whether the teacher answers vᵀJ."""
        ...

    def answer(self, x: Float[Tensor, "batch *input"], question: Question) -> Answer:
        """Return the outputs at x and the products of the query."""
        ...


@dataclass(frozen=True)
class Own:
    """The readout of a teacher: its class index or pixel comes from the network's own outputs."""

    readout: Readout

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers of the readout."""
        return self.readout.layers

    def __call__(self, outputs: Tensor, features: Mapping[str, Tensor], context: Context) -> Tensor:
        """The readout's values."""
        return self.readout(outputs, features, replace(context, teacher_outputs=outputs.detach()))


def query(teacher: Teacher, x: Tensor, question: Question) -> Answer:
    """Return a teacher's answer for training; outputs of shape (B,) become (B, 1)."""
    cotangents = question.cotangents

    def of_columns(values: Tensor) -> Tensor:
        assert callable(cotangents)
        return cotangents(values[:, None])[..., 0] if values.dim() == 1 else cotangents(values)

    with errors(raised=True):
        answer = teacher.answer(x, replace(question, cotangents=of_columns) if callable(cotangents) else question)
    if answer.outputs.dim() != 1:
        return answer
    columns: dict[str, Any] = {"outputs": answer.outputs, "values": answer.values, "cotangents": answer.cotangents}
    if question.tangents is not None:
        columns["products"] = answer.products
    return replace(answer, **{name: each[..., None] for name, each in columns.items() if each is not None})


@contextmanager
def frozen_pass(x: Tensor) -> Iterator[None]:
    """Run the block without recording gradients and without autocast."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield


def fitting_tangents(question: Question, x: Tensor) -> Tensor:
    """The directions of a question, in the type of x."""
    assert question.tangents is not None
    tangents = question.tangents
    if tangents.shape[1:] != x.shape:
        rule = f"`tangents` of `Question` must have the shape (probes, *{tuple(x.shape)})."
        raise InputError(rule, got=f"shape {tuple(tangents.shape)}", do="One direction for each sample.")
    return tangents.detach().to(x)


def called(question: Question, function: Callable[..., object], x: Tensor) -> object:
    """Call a function at x with the arguments of the query."""
    return function(x) if question.arguments is None else question.arguments(function, x)


def checked_outputs(teacher: str, given: object, x: Tensor, do: str, *, dense: bool = False) -> Tensor:
    """Return the result of a teacher's function, (B, K) or dense, with the dtype and on the device of x."""
    if not isinstance(given, Tensor) or given.dim() < 2 or (given.dim() > 2 and not dense) or len(given) != len(x):
        rule = f"`function` of `{teacher}` must return outputs ({len(x)}, K) for {len(x)} samples."
        got = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise InputError(rule, got=got, do=do)
    return given.detach().to(x)


def recorded(cotangents: Cotangents, used: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the cotangents as a function that also appends its result to `used`."""

    def make(values: Tensor) -> Tensor:
        used.append((cotangents(values) if callable(cotangents) else cotangents).detach())
        return used[-1]

    return make


def readout_vjp(question: Question, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The chain rule behind the outputs: values r(y), wᵀ = vᵀ ∂r/∂y of shape (P, B, K), and the v that were used."""
    assert question.cotangents is not None
    used: list[Tensor] = []
    context = Context(labels=question.labels)
    result = vjp_products(
        _identity, outputs, recorded(question.cotangents, used), readout=Own(question.readout), context=context
    )
    return result.values, result.products, used[0]


def readout_jvp(question: Question, outputs: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """The chain rule behind the outputs: values r(y) and (∂r/∂y) Jv, for Jv of the outputs (P, B, K)."""
    context = Context(labels=question.labels)
    result = jvp_products(_identity, outputs, tangents, readout=Own(question.readout), context=context)
    return result.values, result.products


def values_of(question: Question, outputs: Tensor) -> Tensor:
    """Return the readout's values for given outputs."""
    return Own(question.readout)(outputs, {}, Context(labels=question.labels))


def _identity(y: Tensor) -> Tensor:
    return y
