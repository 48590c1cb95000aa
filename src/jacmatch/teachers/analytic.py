"""A function with its own Jacobian as teacher: a simulator, a controller, a formula."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.teachers.base import Answer, Question, pull_readout, push_readout, values_of


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
        """The outputs at x, and the products asked for.

        Raises:
            InputError: the Jacobian has not the shape (B, K, *input).
            UnsupportedError: features, or antithetic differences of a given step, are asked for.
        """
        question = question or Question()
        if question.layers or question.readout.layers:
            raise UnsupportedError(
                "The teacher must answer features; AnalyticTeacher has outputs only. Use a readout of the outputs."
            )
        x = x.detach()
        with torch.no_grad():
            outputs = self.function(x.clone()).to(x.dtype)
            if question.cotangents is None and question.tangents is None:
                return Answer(outputs, values_of(question, outputs))
            j = self.jacobian(x.clone()).to(x.dtype)
            if j.shape != (*outputs.shape, *x.shape[1:]):
                raise InputError(
                    f"`jacobian` of `AnalyticTeacher` must return the shape {(*outputs.shape, *x.shape[1:])}.",
                    got=f"shape {tuple(j.shape)}",
                    do="The order is batch, outputs, input.",
                )
            if question.cotangents is not None:
                values, w, v = pull_readout(question, outputs)
                rows = torch.einsum("pbk,bki->pbi", w, j.flatten(2))
                return Answer(outputs, values, rows.view(len(w), *x.shape), cotangents=v)
            assert question.tangents is not None
            jv = torch.einsum("bki,pbi->pbk", j.flatten(2), question.tangents.to(x.dtype).flatten(2))
            values, products = push_readout(question, outputs, jv)
            return Answer(outputs, values, products)
