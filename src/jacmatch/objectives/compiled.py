"""The student's pass with its derivatives, and the losses, as one compiled graph."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from jacmatch.errors import InputError
from jacmatch.jacobian import Arguments, BatchNormPolicy, Context, Readout, preserved_buffers, run
from jacmatch.jacobian.callables import buffers_in_training
from jacmatch.jacobian.compiling import OneGraph, any_batch, reason_of
from jacmatch.jacobian.engines import parameter_gradients, traced_vjp
from jacmatch.jacobian.function import Function, replaying

Compared = tuple[Tensor, dict[str, Tensor]]
"""The student's outputs, and the terms before weighting."""
_TOLERANCE, _ROUGH = 1e-2, 0.1
"""Relative difference of gradients that counts as wrong: in float32 (10⁻⁶ is usual, 10⁻³ with TF32), in 16 bits."""


@runtime_checkable
class Comparison(Protocol):
    """The losses of an objective, as a frozen dataclass: each distinct value has its own graph."""

    def __call__(self, outputs: Tensor, values: Tensor, rows: Tensor | None, step: "Step") -> dict[str, Tensor]:
        """Return the terms before weighting, of the student's outputs, readout values and products (None: none)."""
        ...


@dataclass(frozen=True)
class Kinds:
    """The parts of a step that are not tensors: each distinct value has its own graph."""

    comparison: Comparison
    readout: Readout
    batch_norm: BatchNormPolicy


@dataclass
class Step:
    """The tensors of a step; a term whose tensor is None is not computed."""

    x: Tensor  # the inputs
    labels: Tensor | None = None  # the labels, where the label term has a weight
    partner_labels: Tensor | None = None  # the labels of the partners, at mixed pairs
    share: Tensor | None = None  # share λ of x, at mixed pairs
    targets: Tensor | None = None  # the outputs to compare with, where the output term has a weight
    v: Tensor | None = None  # directions on the output side
    rows: Tensor | None = None  # the products to compare with
    unit: Tensor | None = None  # factor of the student's products; None means 1
    unknown: Tensor | None = None  # mask of the unknown products, whose entries in `rows` are 0
    label: Tensor | None = None  # labels that a readout may use
    teacher_outputs: Tensor | None = None  # teacher outputs that a readout may use
    scale: Tensor | None = None  # factor of v before the backward pass, divided out afterwards; for fp16
    arguments: Arguments | None = None  # other arguments of the student

    def mark(self) -> None:
        """Mark the batch dimension of each tensor."""
        samples = (self.x, self.labels, self.partner_labels, self.share, self.targets, self.label, self.teacher_outputs)
        others = [] if self.arguments is None else self.arguments.of_samples
        any_batch(*((each, 0) for each in (*samples, *others)), (self.v, 1), (self.rows, 1), (self.unknown, 1))


class CompiledSteps:
    """Compile the ordinary steps of an objective: one graph from the inputs to the terms.

    The teacher's answer and the directions are inputs of the graph, and the weights of the terms are applied outside,
    so a change of these needs no new graph. Steps that measure the shares of the gradient norm, and evaluation, run
    eagerly. The gradient and the running statistics of the first compiled step of each graph are compared with the
    eager ones. If compilation fails, or a result is wrong, all further steps run eagerly, and a warning gives the
    reason.

    Args:
        backend: `inductor`, or another backend of `torch.compile`.
        cuda_graphs: Launch the kernels of a GPU as a CUDA graph.

    Attributes:
        fallback: Why the steps are eager; None while they are compiled.
        difference: Largest relative difference from an eager step so far; None before the first comparison, and if the
            student draws random numbers, which differ between the two steps.

    Example:
        >>> steps = CompiledSteps(backend="aot_eager")
        >>> steps.report()["graphs"], steps.fallback
        (0, None)
    """

    def __init__(self, *, backend: str = "inductor", cuda_graphs: bool = False) -> None:
        if cuda_graphs and not torch.cuda.is_available():
            do = "Leave it out on the CPU."
            raise InputError("`cuda_graphs` of `CompiledSteps` needs a GPU.", got="no CUDA", do=do)
        self.graph = OneGraph(_terms, backend, cuda_graphs)
        self.fallback: str | None = None
        self.difference: float | None = None
        self.checked = 0

    def report(self) -> dict[str, Any]:
        """Return graphs, compiled steps (including compared ones), the largest difference, and the fallback reason."""
        graph = self.graph
        report = {"backend": graph.backend, "cuda_graphs": graph.cuda_graphs, "graphs": graph.graphs}
        return {**report, "steps": graph.runs, "difference": self.difference, "fallback": self.fallback}

    def give_up(self, reason: str) -> None:
        """Run all further steps eagerly, and warn once."""
        if self.fallback is None:
            self.fallback = reason
            warnings.warn(f"The steps are not compiled but run eagerly: {reason}", stacklevel=2)

    def __call__(self, student: nn.Module, kinds: Kinds, step: Step, eager: Callable[[], Compared]) -> Compared | None:
        """Return the outputs and terms of a step; None if the caller must run it by `eager`, without a compiler."""
        if self.fallback is not None:
            return None
        step.mark()
        call = replaying(step.x)
        try:
            if self.graph.graphs == 0 or self.graph.graphs > self.checked:
                self._check(student, kinds, step, eager, call)
            outputs, terms = self.graph(student, kinds, step)
        except Exception as error:  # any failure of the compiler; a real error is raised again by the eager step
            self.give_up(reason_of(error))
            return None
        if self.fallback is not None:
            return None
        if self.graph.cuda_graphs:  # the next replay overwrites this memory
            return outputs.clone(), {name: term.clone() for name, term in terms.items()}
        return outputs, terms

    def _check(
        self, student: nn.Module, kinds: Kinds, step: Step, eager: Callable[[], Compared], call: Callable[[Any], Any]
    ) -> None:
        """Compare gradients and buffers of the compiled and the eager step, both from the same initial state."""

        def of(pass_: Callable[[], Compared]) -> tuple[Tensor, bool]:
            before = _random_state(step.x)
            with preserved_buffers(student):
                _, terms = pass_()
                total = torch.stack([term / term.detach().abs().clamp_min(1e-12) for term in terms.values()]).sum()
                trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
                gradients = parameter_gradients(total, trained, retain_graph=False)
                parts = [g.flatten().double() for g in gradients if g is not None]
                parts += [b.flatten().double() for b in buffers_in_training(student).values()]
                return torch.cat(parts), not torch.equal(before, _random_state(step.x))

        truth, random = call(lambda: of(eager))
        compiled, _ = call(lambda: of(lambda: self.graph(student, kinds, step)))
        self.checked = self.graph.graphs
        if random:
            return
        difference = (
            float((compiled - truth).norm() / truth.norm().clamp_min(1e-30)) if len(compiled) == len(truth) else 1.0
        )
        self.difference = max(difference, self.difference or 0.0)
        if not difference <= (_ROUGH if torch.is_autocast_enabled(step.x.device.type) else _TOLERANCE):
            self.give_up(f"the gradient of a compiled step differs by {difference:.1e} from that of an eager one.")


def _random_state(x: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(x.device).cpu() if x.device.type == "cuda" else torch.get_rng_state()


def _terms(student: nn.Module, kinds: Kinds, step: Step) -> Compared:
    """Compute the outputs and terms of a step: the function that is compiled."""
    if step.v is None:
        outputs, _ = run(student, step.x, arguments=step.arguments)
        return outputs, kinds.comparison(outputs, outputs, None, step)
    context = Context(step.label, step.teacher_outputs, arguments=step.arguments)
    function = Function(student, kinds.readout, context, (), kinds.batch_norm)
    result, written = traced_vjp(function, step.x, step.v if step.scale is None else step.v * step.scale)
    rows = result.products if step.scale is None else result.products / step.scale
    with torch.no_grad():
        for name, buffer in buffers_in_training(student).items():
            buffer.copy_(written[name])
    return result.outputs, kinds.comparison(result.outputs, result.values, rows, step)
