"""A network as a teacher."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.errors import InputError
from jacmatch.jacobian import Context, jvp_products, vjp_products
from jacmatch.jacobian.callables import trains
from jacmatch.jacobian.features import Select, selecting
from jacmatch.jacobian.function import Function
from jacmatch.jacobian.modules import check_evaluates, set_mode, unfused_encoder
from jacmatch.jacobian.verification import errors
from jacmatch.teachers.base import Answer, Own, Question, fitting_tangents, frozen_pass, recorded


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
        if any(map(trains, module.modules())):  # somebody may have called train() on a parent
            set_mode(module, training=False)
        like = next((p for p in module.parameters() if p.is_floating_point()), x)
        if like.device != x.device:
            module.to(x.device)
        kind = x.dtype if x.is_floating_point() else like.dtype
        z = x.detach().to(like.dtype) if x.is_floating_point() else x.detach()  # tokens stay numbers
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
                return Answer(
                    outputs.to(kind),
                    values.to(kind),
                    features={name: value.to(kind) for name, value in features.items()},
                )
        return Answer(
            result.outputs.to(kind),
            result.values.to(kind),
            result.products.to(kind),
            {name: value.to(kind) for name, value in result.features.items()},
            used[0] if used else None,
        )
