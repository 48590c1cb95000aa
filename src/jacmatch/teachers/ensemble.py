"""Several teachers as one: the mean of their outputs and of their Jacobians."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import Logits, finite_differences
from jacmatch.teachers.base import (
    Answer,
    Question,
    Teacher,
    fitting_tangents,
    frozen_pass,
    readout_jvp,
    readout_vjp,
    values_of,
)


class EnsembleTeacher:
    """The mean of the outputs of several teachers; its Jacobian is the mean of theirs.

    If output directions depend on the outputs, the members are queried twice, because the directions are computed from
    the mean of the outputs.

    Args:
        teachers: At least one teacher; all have the same number of outputs.

    Raises:
        InputError: The list is empty, or a member is not a teacher.

    Example:
        >>> from jacmatch.teachers.module import ModuleTeacher
        >>> one, two = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        >>> mean = EnsembleTeacher([ModuleTeacher(one), ModuleTeacher(two)]).answer(torch.ones(4, 3)).outputs
        >>> torch.allclose(mean, (one(torch.ones(4, 3)) + two(torch.ones(4, 3))) / 2)
        True
    """

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        if not teachers:
            raise InputError("`teachers` of `EnsembleTeacher` must not be empty.")
        for teacher in teachers:
            if not isinstance(teacher, Teacher):
                raise InputError(
                    "Each of `teachers` of `EnsembleTeacher` must be a teacher.",
                    got=type(teacher).__name__,
                    do="Wrap a network into ModuleTeacher.",
                )
        self.teachers = tuple(teachers)

    @property
    def answers_vjp(self) -> bool:
        """Whether all members answer vᵀJ."""
        return all(teacher.answers_vjp for teacher in self.teachers)

    def answer(self, x: Float[Tensor, "batch *input"], question: Question | None = None) -> Answer:
        """Return the mean outputs at x and the products of the query.

        Raises:
            InputError: the members have different numbers of outputs.
            UnsupportedError: the query has features, which members need not share.
        """
        question = question or Question()
        if question.layers or question.readout.layers:
            raise UnsupportedError(
                "Features are those of one network; EnsembleTeacher has outputs only. Use a readout of the outputs."
            )
        x = x.detach()
        with frozen_pass(x):
            if question.step is not None and question.tangents is not None:
                return self._differences(x, question)
            outputs, jv = self._mean(x, replace(question, readout=Logits(), cotangents=None))
            if question.cotangents is not None:
                values, w, v = readout_vjp(question, outputs)
                _, rows = self._mean(x, Question(cotangents=w, arguments=question.arguments))
                return Answer(outputs, values, rows, cotangents=v)
            if jv is not None:
                values, products = readout_jvp(question, outputs, jv)
                return Answer(outputs, values, products)
            return Answer(outputs, values_of(question, outputs))

    def _differences(self, x: Tensor, question: Question) -> Answer:
        """Antithetic differences of the readout of the mean; that of the members' differences is another number."""
        outputs, _ = self._mean(x, Question(arguments=question.arguments))
        products = finite_differences.central(
            lambda z: values_of(question, self._mean(z, Question(arguments=question.arguments))[0]),
            x,
            fitting_tangents(question, x),
            step=question.step,
        )
        return Answer(outputs, values_of(question, outputs), products)

    def _mean(self, x: Tensor, question: Question) -> tuple[Tensor, Tensor | None]:
        answers = [teacher.answer(x, question) for teacher in self.teachers]
        sizes = {answer.outputs.shape[1] for answer in answers}
        if len(sizes) > 1:
            raise InputError("All members of `EnsembleTeacher` must have the same outputs.", got=sorted(sizes))
        products = [answer.products for answer in answers if answer.products is not None]
        mean = torch.stack(products).mean(0) if products else None
        return torch.stack([answer.outputs for answer in answers]).mean(0), mean
