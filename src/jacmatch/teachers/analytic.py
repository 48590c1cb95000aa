"""A function with its own Jacobian as teacher: a simulator, a controller, a formula."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import finite_differences
from jacmatch.teachers.base import (
    Answer,
    Question,
    called,
    checked_outputs,
    fitting_tangents,
    frozen_pass,
    readout_vjp,
    readout_jvp,
    values_of,
)


class AnalyticTeacher:
    """A function with a known Jacobian, which answers outputs, Jv and vᵀJ exactly.

    Args:
        function: Takes a batch (B, *input) and returns outputs (B, K).
        jacobian: Takes the same batch and returns J (B, K, *input), Jₙₖᵢ = ∂yₙₖ/∂xₙᵢ.

    Raises:
        InputError: one of the two is not callable.

    Example:
        >>> teacher = AnalyticTeacher(torch.sin, lambda x: torch.diag_embed(x.cos()))
        >>> teacher.answer(torch.zeros(1, 2), Question(tangents=torch.ones(1, 1, 2))).products
        tensor([[[1., 1.]]])
    """

    answers_vjp = True

    def __init__(self, function: Callable[[Tensor], Tensor], jacobian: Callable[[Tensor], Tensor]) -> None:
        for name, given in (("function", function), ("jacobian", jacobian)):
            if not callable(given):
                raise InputError(f"`{name}` of `AnalyticTeacher` must be callable.", got=type(given).__name__)
        self.function = function
        self.jacobian = jacobian

    def answer(self, x: Float[Tensor, "batch *input"], question: Question | None = None) -> Answer:
        """The outputs at x, and the products of the query; antithetic differences where a step is given.

        Raises:
            InputError: outputs, Jacobian or directions have a wrong shape.
            UnsupportedError: the query has features.
        """
        question = question or Question()
        if question.layers or question.readout.layers:
            raise UnsupportedError(
                "The teacher must answer features; AnalyticTeacher has outputs only. Use a readout of the outputs."
            )
        x = x.detach()
        with frozen_pass(x):
            outputs = self._outputs(x, question)
            if question.cotangents is not None:
                values, w, v = readout_vjp(question, outputs)
                rows = _product("pbk,bki->pbi", w, self._matrix(x, outputs, question))
                return Answer(outputs, values, rows.view(len(w), *x.shape), cotangents=v)
            if question.tangents is None:
                return Answer(outputs, values_of(question, outputs))
            tangents = fitting_tangents(question, x)
            if question.step is not None:
                pairs = finite_differences.central(
                    lambda z: values_of(question, self._outputs(z, question)), x, tangents, step=question.step
                )
                return Answer(outputs, values_of(question, outputs), pairs)
            jv = _product("pbi,bki->pbk", tangents.flatten(2), self._matrix(x, outputs, question))
            values, products = readout_jvp(question, outputs, jv)
            return Answer(outputs, values, products)

    def _outputs(self, x: Tensor, question: Question) -> Tensor:
        given = called(question, self.function, x.clone())
        return checked_outputs("AnalyticTeacher", given, x, "Add the axis of outputs.")

    def _matrix(self, x: Tensor, outputs: Tensor, question: Question) -> Float[Tensor, "batch out entry"]:
        j = called(question, self.jacobian, x.clone())
        wanted = (*outputs.shape, *x.shape[1:])
        if not isinstance(j, Tensor) or j.shape != wanted:
            raise InputError(
                f"`jacobian` of `AnalyticTeacher` must return the shape {wanted}.",
                got=f"shape {tuple(j.shape)}" if isinstance(j, Tensor) else type(j).__name__,
                do="The order is batch, outputs, input.",
            )
        return j.detach().to(x).flatten(2)


def _product(equation: str, directions: Tensor, matrix: Float[Tensor, "batch out entry"]) -> Tensor:
    """The products of a Jacobian of which entries may be unknown (NaN): NaN where such an entry has a weight."""
    unknown = matrix.isnan()
    if not bool(unknown.any()):
        return torch.einsum(equation, directions, matrix)
    products = torch.einsum(equation, directions, matrix.masked_fill(unknown, 0.0))
    weights = torch.einsum(equation, (directions != 0).to(matrix), unknown.to(matrix))
    return products.masked_fill(weights > 0, float("nan"))
