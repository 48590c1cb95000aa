"""How an objective differentiates: the settings, the query to the teacher, and the products of the student."""

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import (
    AttentionPixel,
    BatchNormPolicy,
    Context,
    DataPairs,
    Engine,
    Estimator,
    EveryRow,
    LabelClass,
    Logits,
    NoiseAveraged,
    Products,
    Readout,
    TokenSubstitutions,
    TopClass,
    jvp_products,
    preserved_buffers,
    run,
    vjp_products,
)
from jacmatch.jacobian.arguments import Arguments
from jacmatch.jacobian.callables import buffers_in_training, copies_of, preserved_generators, replaced_buffers
from jacmatch.jacobian.engines import meets_once_differentiable
from jacmatch.jacobian.readouts import with_class_dim
from jacmatch.objectives import validation
from jacmatch.objectives.terms import AtData, AtMixedPairs, Batch, Point
from jacmatch.teachers import Answer, Question, Teacher
from jacmatch.teachers.base import query


@dataclass
class Differentiation:
    """What an objective differentiates, which products it takes, at which points, and by which engine.

    Attributes:
        probe: The estimator that draws the directions; None if the objective chooses the rows itself.
        readout: The function of the student's outputs or features that is differentiated.
        teacher_readout: The same for the teacher.
        point: Where student and teacher are compared.
        batch_norm: Policy for BatchNorm of the student in training mode.
        engine: Engine of Jv, for directions on the input side; see `jacmatch.jvp`.
        seed: Seeds all directions.
        chunk_size: Rows of the student whose graphs are in memory at the same time; None for all rows.
        fraction: Share of a batch, its first samples, whose derivatives are taken.
        caller: Name of the objective, for error messages.
        scale: Loss scale for the backward pass of the student's products in fp16; None for other types.
    """

    probe: Estimator | None
    readout: Readout = field(default_factory=Logits)
    teacher_readout: Readout = field(default_factory=Logits)
    point: Point = field(default_factory=AtData)
    batch_norm: BatchNormPolicy = "frozen"
    engine: Engine = "auto"
    seed: int = 0
    chunk_size: int | None = None
    fraction: float | int = 1.0
    caller: str = "Distillation"
    scale: Tensor | None = None

    def check(self) -> None:
        """Validate each setting, and all of them together."""
        validation.known_names(self.caller, batch_norm=self.batch_norm)
        if not 0 < self.fraction <= 1:
            raise InputError(f"`fraction` of `{self.caller}` must be above 0 and at most 1.", got=self.fraction)
        validation.are_objects(self.caller, self.probe, (self.readout, self.teacher_readout), self.point)
        validation.chunk_size(self.caller, self.probe, self.side, self.chunk_size)
        only = "reverse" if self.side == "output" else None if self.step is None else "differences"
        validation.engine(self.caller, self.probe, self.engine, only)
        pixel = any(isinstance(each, AttentionPixel) for each in (self.readout, self.teacher_readout))
        if isinstance(self.probe, NoiseAveraged) and (self.caller != "Distillation" or pixel):
            rule = f"`probe` of `{self.caller}` must not be averaged over noise{' with AttentionPixel' * pixel}."
            raise InputError(rule, got="NoiseAveraged", do=f"Use {type(self.probe.probe).__name__}, or Distillation.")

    @property
    def side(self) -> Literal["output", "input"]:
        """The side of the directions: `output` for vᵀJ, `input` for Jv."""
        return "output" if self.probe is None else self.probe.side

    @property
    def step(self) -> float | None:
        """The step size of the finite differences that the probe sets; None if it sets none."""
        return getattr(self.probe, "step", None)

    @property
    def needs_partners(self) -> bool:
        """Whether a batch needs partners from the data: for mixed pairs, and for directions between data points."""
        probe = self.probe.probe if isinstance(self.probe, NoiseAveraged) else self.probe
        return isinstance(self.point, AtMixedPairs) or isinstance(probe, DataPairs)

    def resolved_engine(self) -> Engine:
        """Return the engine of the student's derivatives, as far as the settings determine it.

        Rows vᵀJ need `reverse`, and a probe with a step needs `differences`. Otherwise `auto` remains: `jacmatch.jvp`
        chooses the engine at the first call, after it has verified the engines on the module.
        """
        if self.side == "output":
            return "reverse"
        return self.engine if self.step is None else "differences"

    def set_class_dim(self, dimension: int) -> None:
        """Set the dimension of the classes in the probe and the readouts, unless they specify their own."""
        self.probe, self.readout, self.teacher_readout = (
            with_class_dim(each, dimension) for each in (self.probe, self.readout, self.teacher_readout)
        )

    def not_compiled(self) -> str | None:
        """Return why a step with these derivatives is not compiled; None where it is."""
        if isinstance(self.probe, TokenSubstitutions):
            return "TokenSubstitutions are not compiled."
        if self.side == "input":
            return "Jv, for directions on the input side, is not compiled; vᵀJ is (probe=RandomOutputs(1))."
        if self.readout.layers or self.teacher_readout.layers:
            return "a readout of inner layers is not compiled."
        if self.fraction < 1:
            return "`fraction` below 1 is not compiled."
        if isinstance(self.probe, NoiseAveraged):
            return "an average over noise is not compiled."
        return None if self.chunk_size is None else "rows in chunks are not compiled."

    def ask(self, teacher: Teacher, batch: Batch, *, products: bool) -> Answer:
        """Return the teacher's answer about a batch: its outputs, and its products if `products`."""
        probe = self.probe
        if not (products and isinstance(probe, NoiseAveraged)):
            return query(teacher, batch.x, self.question(batch, products=products))
        plain = query(teacher, batch.x, self.question(batch, products=False))
        v = self.directions(batch, plain.values.to(batch.x.dtype) if self.side == "output" else None)
        kind = "cotangents" if self.side == "output" else "tangents"
        labels = None if batch.label is None else probe.repeated(batch.label)
        about: dict[str, Any] = {"readout": self.teacher_readout, "labels": labels, "random": True}
        about["arguments"] = _repeated(probe, batch)
        x = probe.noisy(batch.x, batch.ids, self.seed, batch.draw)
        noisy = query(teacher, x, Question(**about, **{kind: probe.repeated(v, 1)}))
        assert noisy.products is not None
        return replace(plain, products=probe.averaged(noisy.products), cotangents=v if self.side == "output" else None)

    def question(self, batch: Batch, *, products: bool) -> Question:
        """Return the query to the teacher about a batch: its outputs, and its products if `products`."""
        if products and isinstance(self.probe, NoiseAveraged):  # these are queries about other (noisy) inputs
            raise UnsupportedError("Products of `NoiseAveraged` are not cached. Use its probe without the average.")
        fixed = not products or isinstance(self.probe, EveryRow | LabelClass | TopClass)
        about: dict[str, Any] = {
            "readout": self.teacher_readout,
            "labels": batch.label,
            "arguments": batch.arguments,
            "ids": batch.ids,
            "draw": batch.draw,
            "random": not (fixed and isinstance(self.point, AtData)),
        }
        if products:
            about["rule"] = self.probe if isinstance(self.probe, Hashable) else None
        if products and self.side == "output":
            about["cotangents"] = lambda values: self.directions(batch, values.to(batch.x.dtype)).to(values.dtype)
        elif products:
            about |= {"tangents": self.directions(batch, None), "step": self.step}
        return Question(**about)

    def directions(self, batch: Batch, values: Tensor | None) -> Tensor:
        """Draw the directions of the probe for a batch; on the output side they may depend on the readout's values."""
        assert self.probe is not None
        about: dict[str, Any] = {"x": batch.x, "labels": batch.label, "ids": batch.ids, "partners": batch.partners}
        return self.probe.directions(outputs=values, seed=self.seed, draw=batch.draw, **about)

    def of_student(
        self, student: nn.Module, batch: Batch, answer: Answer | None, *, traced: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the student's outputs, and its products along the directions in the teacher's answer, if any."""
        if answer is None or answer.products is None:
            return run(student, batch.x, arguments=batch.arguments)[0], None
        pixels, readout = None, self.readout
        if isinstance(self.teacher_readout, AttentionPixel):
            pixels = self.teacher_readout.largest(answer.features)
            if isinstance(readout, AttentionPixel):
                readout = validation.SameMap(readout, answer.features[self.teacher_readout.layer].shape[2:])
        if isinstance(self.probe, NoiseAveraged):
            return self._averaged(self.probe, student, batch, answer, traced=traced)
        context = Context(batch.label, answer.outputs, pixels, batch.arguments)
        if self.side == "input":
            v: Tensor | Callable[[Tensor], Tensor] = self.directions(batch, None)
        else:

            def v(values: Tensor) -> Tensor:
                validation.same_outputs(values, answer.values, self.readout)
                assert answer.cotangents is not None
                return answer.cotangents

        result = self.products(student, batch.x, v, readout, context, traced=traced)
        validation.same_outputs(result.values, answer.values, self.readout)
        return result.outputs, result.products

    def _averaged(
        self, probe: NoiseAveraged, student: nn.Module, batch: Batch, answer: Answer, *, traced: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the student's outputs at the batch, and its products averaged over noisy inputs."""
        v = self.directions(batch, None) if self.side == "input" else answer.cotangents
        assert v is not None
        outputs, _ = run(student, batch.x, arguments=batch.arguments)
        label = None if batch.label is None else probe.repeated(batch.label)
        context = Context(label, probe.repeated(answer.outputs), None, _repeated(probe, batch))
        x = probe.noisy(batch.x, batch.ids, self.seed, batch.draw)
        with replaced_buffers(student, copies_of(buffers_in_training(student))):  # running statistics are updated once
            result = self.products(student, x, probe.repeated(v, 1), self.readout, context, traced=traced)
        validation.same_outputs(result.values[: len(answer.values)], answer.values, self.readout)
        return outputs, probe.averaged(result.products)

    def products(
        self,
        student: nn.Module,
        x: Tensor,
        v: Tensor | Callable[[Tensor], Tensor],
        readout: Readout,
        context: Context,
        *,
        traced: bool,
    ) -> Products:
        """Return vᵀJ or Jv of the student, depending on the side of the probe.

        On the output side, `v` may be a function that computes the directions from the readout's values. With `traced`,
        the student is checked for functions whose backward is not differentiable.
        """
        settings: dict[str, Any] = {"readout": readout, "context": context, "batch_norm": self.batch_norm}
        try:
            if self.side == "input":
                assert isinstance(v, Tensor)
                # without autocast: a difference of nearby values has no significant digits left in 16 bits
                with nullcontext() if self.step is None else torch.autocast(x.device.type, enabled=False):
                    return jvp_products(student, x, v, step=self.step, engine=self.engine, **settings)

            # Directions that require a gradient reveal a backward that is not differentiable.
            def directions(values: Tensor) -> Tensor:
                given = v(values) if callable(v) else v
                given = given.to(x.dtype, copy=True)
                return given.requires_grad_() if traced else given

            if traced and self.chunk_size is not None:
                self._check_one_row(student, x, directions, settings)
            return vjp_products(student, x, directions, chunk_size=self.chunk_size, scale=self.scale, **settings)
        except UnsupportedError as error:
            raise UnsupportedError(
                f"`student` of `{self.caller}` cannot be differentiated as `probe` needs: {error} To use "
                "values only, pass probe=AntitheticNoise(sigma=...); jacmatch.doctor(student, x) names the cause."
            ) from error

    def _check_one_row(
        self, student: nn.Module, x: Tensor, v: Callable[[Tensor], Tensor], settings: dict[str, Any]
    ) -> None:
        """Reject a student with a `once_differentiable` backward, which a rebuilt graph does not reveal."""
        with preserved_buffers(student), preserved_generators(x.device):
            row = vjp_products(student, x, lambda values: v(values)[:1], **settings).products
        if meets_once_differentiable(row.sum()):
            raise UnsupportedError("a backward in it is marked once_differentiable, so it has no second derivative.")


def _repeated(probe: NoiseAveraged, batch: Batch) -> Arguments | None:
    """Return the other arguments of the networks, repeated for the noisy inputs; None if there are none."""
    rows = probe.repeated(torch.arange(len(batch.x), device=batch.x.device))
    return None if batch.arguments is None else batch.arguments.part(rows)
