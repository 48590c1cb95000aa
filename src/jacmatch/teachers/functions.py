"""Networks and functions as teachers; a function has a known Jacobian (a simulator, a formula) or values only."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import Context, finite_differences, jvp_products, vjp_products
from jacmatch.jacobian.callables import layers_of, trains
from jacmatch.jacobian.features import Select, selecting
from jacmatch.jacobian.function import Function
from jacmatch.jacobian.modules import check_evaluates, set_mode, unfused_encoder
from jacmatch.jacobian.verification import errors
from jacmatch.teachers.base import (
    Answer,
    Own,
    Question,
    called,
    checked_outputs,
    fitting_tangents,
    frozen_pass,
    readout_jvp,
    readout_vjp,
    recorded,
    values_of,
)


class ModuleTeacher:
    """A frozen network that returns outputs, Jv, vᵀJ and features.

    The network is frozen permanently (`requires_grad_(False)`). It always runs in evaluation mode, outside autocast,
    and in its own floating-point dtype. It is not a submodule, so optimizers, EMA and checkpoints do not include it. It
    moves to the device of its input.

    Args:
        module: The network, which normalizes its input itself.
        dtype: Floating-point dtype in which the network runs; None for that of its parameters.
        output: Selects the outputs if the network returns more than one tensor.

    Raises:
        InputError: `module` is not an nn.Module, or `dtype` is not a floating-point dtype.

    Example:
        >>> teacher = ModuleTeacher(nn.Linear(3, 2))
        >>> answer = teacher.answer(torch.ones(4, 3), Question(cotangents=torch.ones(1, 4, 2)))
        >>> answer.outputs.shape, answer.products.shape
        (torch.Size([4, 2]), torch.Size([1, 4, 3]))
    """

    answers_vjp = True

    def __init__(self, module: nn.Module, dtype: torch.dtype | None = None, *, output: Select | None = None) -> None:
        if not isinstance(module, nn.Module):
            do = "For any other function use BlackBoxTeacher, or AnalyticTeacher if it knows its Jacobian."
            raise InputError("`module` of `ModuleTeacher` must be an nn.Module.", got=type(module).__name__, do=do)
        if dtype is not None and not dtype.is_floating_point:
            raise InputError("`dtype` of `ModuleTeacher` must be a floating-point type.", got=dtype)
        if output is not None and not callable(output):
            do = "For example output=lambda out: out[0]."
            raise InputError("`output` of `ModuleTeacher` must be callable.", got=type(output).__name__, do=do)
        check_evaluates(module, "ModuleTeacher")
        for parameter in module.parameters():  # not module.requires_grad_, which TorchScript does not support
            parameter.requires_grad_(False)
        self.module, self.output = set_mode(module, training=False), output
        if dtype is not None:
            self.module.to(dtype)

    def answer(self, x: Float[Tensor, "batch *input"], question: Question | None = None) -> Answer:
        """Return the outputs at x, and the products and features of the query, in the dtype of x."""
        question = question or Question()
        module = self.module
        if any(map(trains, layers_of(module))):  # train() may have been called on a parent
            set_mode(module, training=False)
        like = next((p for p in module.parameters() if p.is_floating_point()), x)
        if like.device != x.device:
            module.to(x.device)
        kind = x.dtype if x.is_floating_point() else like.dtype
        z = x.detach().to(like.dtype) if x.is_floating_point() else x.detach()  # tokens stay integers
        arguments = question.arguments
        if arguments is not None and z.dtype != x.dtype:
            arguments = arguments.to(z.dtype)
        readout, context = Own(question.readout), Context(question.labels, arguments=arguments)
        used: list[Tensor] = []
        with frozen_pass(x), errors(raised=False), selecting(module, self.output):
            if question.cotangents is not None:
                v = recorded(question.cotangents, used)
                result = vjp_products(module, z, v, readout=readout, context=context, layers=question.layers)
            elif question.tangents is not None:
                tangents = fitting_tangents(question, z)
                result = jvp_products(
                    module, z, tangents, readout=readout, context=context, layers=question.layers, step=question.step
                )
            else:
                function = Function(module, readout, context, question.layers, "frozen")
                with unfused_encoder():
                    values, outputs, features = function(z.clone())
                return Answer(outputs.to(kind), values.to(kind), features=_converted(features, kind))
        features, products = _converted(result.features, kind), result.products.to(kind)
        return Answer(result.outputs.to(kind), result.values.to(kind), products, features, used[0] if used else None)


def _converted(features: dict[str, Tensor], kind: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(kind) for name, value in features.items()}


class _FunctionTeacher:
    """Base class of teachers that call a function, with or without a known Jacobian."""

    _outputs: Callable[[Tensor, Question], Tensor]
    _matrix: Callable[[Tensor, Tensor, Question], Tensor]

    def answer(self, x: Float[Tensor, "batch *input"], question: Question | None = None) -> Answer:
        """Return the outputs at x and the products of the query.

        Raises:
            InputError: outputs, Jacobian or directions have a wrong shape.
            UnsupportedError: the query has features, or products that this teacher cannot compute.
        """
        question, name = question or Question(), type(self).__name__
        if question.layers or question.readout.layers:
            rule = f"The teacher must return features; {name} returns outputs only. Use a readout of the outputs."
            raise UnsupportedError(rule)
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
            if (step := self._step(x, tangents, question)) is not None:
                pairs = finite_differences.central(
                    lambda z: values_of(question, self._outputs(z, question)), x, tangents, step=step
                )
                return Answer(outputs, values_of(question, outputs), pairs)
            jv = _product("pbi,bki->pbk", tangents.flatten(2), self._matrix(x, outputs, question))
            values, products = readout_jvp(question, outputs, jv)
            return Answer(outputs, values, products)

    def _step(self, x: Tensor, tangents: Tensor, question: Question) -> float | Tensor | None:
        """Return the step of the differences; None where the Jacobian is known."""
        return question.step


class AnalyticTeacher(_FunctionTeacher):
    """A function with a known Jacobian: exact outputs, Jv and vᵀJ; finite differences if a step is given.

    Args:
        function: Takes a batch (B, *input) and returns outputs (B, K).
        jacobian: Takes the same batch and returns J (B, K, *input), Jₙₖᵢ = ∂yₙₖ/∂xₙᵢ.

    Raises:
        InputError: One of the two is not callable.

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

    def _outputs(self, x: Tensor, question: Question) -> Tensor:
        given = called(question, self.function, x.clone())
        return checked_outputs("AnalyticTeacher", given, x, "Add an output axis.")

    def _matrix(self, x: Tensor, outputs: Tensor, question: Question) -> Float[Tensor, "batch out entry"]:
        j = called(question, self.jacobian, x.clone())
        wanted = (*outputs.shape, *x.shape[1:])
        if not isinstance(j, Tensor) or j.shape != wanted:
            rule = f"`jacobian` of `AnalyticTeacher` must return the shape {wanted}."
            do = "The order is batch, outputs, input."
            raise InputError(rule, got=f"shape {tuple(j.shape)}" if isinstance(j, Tensor) else type(j).__name__, do=do)
        return j.detach().to(x).flatten(2)


def _product(equation: str, directions: Tensor, matrix: Float[Tensor, "batch out entry"]) -> Tensor:
    """The products of a Jacobian of which entries may be unknown (NaN): NaN where such an entry has a weight."""
    unknown = matrix.isnan()
    if not bool(unknown.any()):
        return torch.einsum(equation, directions, matrix)
    products = torch.einsum(equation, directions, matrix.masked_fill(unknown, 0.0))
    weights = torch.einsum(equation, (directions != 0).to(matrix), unknown.to(matrix))
    return products.masked_fill(weights > 0, float("nan"))


class BlackBoxTeacher(_FunctionTeacher):
    """A black box: returns outputs, and Jv by finite differences; it cannot return vᵀJ.

    Args:
        function: Takes a batch (B, *input) and returns outputs (B, K), or dense outputs (B, K, H, W).
        batch_size: Largest batch with which the function is called; None for any.
        arrays: Whether the function takes and returns `torch` tensors or `numpy` arrays.
        relative_step: Step of the differences relative to the root mean square of x, if a query gives no step. None:
            ε^⅓, where ε is the precision of x. Coarse functions (float16, quantized) need a larger step.

    Raises:
        InputError: An argument is invalid.

    Example:
        >>> teacher = BlackBoxTeacher(lambda x: np.sin(x), arrays="numpy")
        >>> x = torch.zeros(1, 2, dtype=torch.float64)
        >>> teacher.answer(x, Question(tangents=torch.ones(1, 1, 2, dtype=torch.float64))).products.round(decimals=6)
        tensor([[[1., 1.]]], dtype=torch.float64)
    """

    answers_vjp = False

    def __init__(
        self,
        function: Callable[[Any], Any],
        *,
        batch_size: int | None = None,
        arrays: Literal["torch", "numpy"] = "torch",
        relative_step: float | None = None,
    ) -> None:
        if not callable(function):
            raise InputError("`function` of `BlackBoxTeacher` must be callable.", got=type(function).__name__)
        if batch_size is not None and batch_size < 1:
            raise InputError("`batch_size` of `BlackBoxTeacher` must be at least 1.", got=batch_size)
        if arrays not in ("torch", "numpy"):
            raise InputError("`arrays` of `BlackBoxTeacher` must be 'torch' or 'numpy'.", got=repr(arrays))
        if relative_step is not None and not 0 < relative_step < 1:
            raise InputError("`relative_step` of `BlackBoxTeacher` must be between 0 and 1.", got=relative_step)
        self.function = function
        self.relative_step = relative_step
        self.batch_size = batch_size
        self.arrays = arrays
        self._dtype = torch.float64  # dtype of the last results

    def answer(self, x: Float[Tensor, "batch *input"], question: Question | None = None) -> Answer:
        """Return the outputs at x, and Jv if the query has tangents; queries with cotangents are refused."""
        if question is not None and question.cotangents is not None:
            raise UnsupportedError(
                "The teacher must answer vᵀJ for directions on the output side; BlackBoxTeacher has values only. "
                "Use probe=RandomInputs(k), or AnalyticTeacher if the Jacobian is known."
            )
        return super().answer(x, question)

    def _step(self, x: Tensor, tangents: Tensor, question: Question) -> float | Tensor:
        if question.step is not None:
            return question.step
        own = finite_differences.relative_step(x.dtype)
        share = (self.relative_step or max(own, self._step_of_results())) / own
        return share * finite_differences.step_sizes(x, tangents)

    def _step_of_results(self) -> float:
        """Return the relative step for the precision of the function's results, which may be coarser than x."""
        if not self._dtype.is_floating_point:
            rule = "`function` of `BlackBoxTeacher` must return floating-point values for finite differences."
            raise InputError(rule, got=self._dtype, do="Return scores instead of classes, or set relative_step.")
        return finite_differences.relative_step(self._dtype)

    def _outputs(self, x: Tensor, question: Question) -> Tensor:
        size, arguments = self.batch_size or len(x), question.arguments
        rows = [slice(start, start + size) for start in range(0, len(x), size)]
        parts = [replace(question, arguments=None if arguments is None else arguments.part(row)) for row in rows]
        return torch.cat([self._call(x[row], part) for row, part in zip(rows, parts, strict=True)])

    def _call(self, x: Tensor, question: Question) -> Tensor:
        # Copies on both sides: the function may write into its argument, and torch cannot wrap every array.
        given = called(question, self._given_copies, x)
        if self.arrays == "numpy":
            try:
                array = np.array(given, order="C")
            except ValueError:  # rows of different lengths
                array = np.array(None)
            native = array.dtype.newbyteorder("=")
            given = torch.from_numpy(array.astype(native)) if array.dtype.kind in "fiub" else array
        self._dtype = given.dtype if isinstance(given, Tensor) else x.dtype
        do = "Add an output axis; arrays='numpy' is for NumPy."
        return checked_outputs("BlackBoxTeacher", given, x, do, dense=True)

    def _given_copies(self, *args: Any, **named: Any) -> object:
        def copied(each: Any) -> Any:
            if not isinstance(each, Tensor):
                return each
            return each.clone() if self.arrays == "torch" else each.numpy(force=True).copy()

        return self.function(*tree_map(copied, args), **tree_map(copied, named))
