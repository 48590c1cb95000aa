"""The slopes of a student and of its teacher: what is asked, and what the student's pass gives."""

from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from jacmatch.errors import UnsupportedError
from jacmatch.jacobian import (
    AttentionPixel,
    BatchNormPolicy,
    Context,
    Engine,
    Estimator,
    Products,
    Readout,
    preserved_buffers,
    pull,
    push,
    run,
)
from jacmatch.jacobian.graph import meets_once_differentiable
from jacmatch.jacobian.readouts import with_class_dim
from jacmatch.objectives import rules
from jacmatch.objectives.points import Batch, Point
from jacmatch.objectives.terms import exact_values
from jacmatch.teachers import Answer, Question


@dataclass
class Slopes:
    """What is differentiated, which products of it are taken, where, and how.

    Attributes:
        probe: Which derivative products.
        readout: What is differentiated of the student.
        teacher_readout: What is differentiated of the teacher.
        point: Where.
        batch_norm: Policy for BatchNorm of the student in training mode.
        engine: How Jv is taken for directions on the input side.
        seed: Seeds all directions.
        chunk_size: Rows of the student whose graphs are kept at once; None keeps all.
        scale: What fp16 multiplies directions by before the backward pass of a student's product; None in other types.
    """

    probe: Estimator
    readout: Readout
    teacher_readout: Readout
    point: Point
    batch_norm: BatchNormPolicy
    engine: Engine
    seed: int
    chunk_size: int | None = None
    scale: Tensor | None = None

    def question(self, batch: Batch, *, asked: bool) -> Question:
        """What the teacher is to say about a batch: the outputs, and the products if they are asked for."""
        about: dict[str, Any] = {
            "readout": self.teacher_readout,
            "labels": batch.label,
            "ids": batch.ids,
            "draw": batch.draw,
            "random": not rules.repeatable(self.point, self.probe, asked),
        }
        if asked and self.probe.side == "output":
            about["cotangents"] = lambda values: self._directions(batch, values.to(batch.x.dtype)).to(values.dtype)
            about["rule"] = self.probe if isinstance(self.probe, Hashable) else None
        elif asked:
            about["tangents"] = self._directions(batch, None)
            about["step"] = getattr(self.probe, "step", None)
        return Question(**about)

    def set_class_dim(self, dimension: int) -> None:
        """Sets the dimension of the classes of probe and readouts, where they have none of their own."""
        self.probe, self.readout, self.teacher_readout = (
            with_class_dim(each, dimension) for each in (self.probe, self.readout, self.teacher_readout)
        )

    def not_compiled(self) -> str | None:
        """Why a step with these slopes is not compiled, None where it can be."""
        if self.probe.side == "input":
            return "Jv, for directions on the input side, is not compiled; vᵀJ is (probe=RandomOutputs(1))."
        if self.readout.layers or self.teacher_readout.layers:
            return "a readout of inner layers is not compiled."
        return None if self.chunk_size is None else "rows in chunks are not compiled."

    def of_student(
        self, student: nn.Module, batch: Batch, answer: Answer | None, *, traced: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The student's outputs, and its products for the directions of the answer, if that has any.

        Args:
            student: The network.
            batch: The inputs.
            answer: The teacher's.
            traced: Whether to look for a backward in the student that can be taken only once.

        Raises:
            UnsupportedError: the student cannot be differentiated as the probe needs.
        """
        if answer is None or answer.products is None:
            return run(student, batch.x)[0], None
        pixels, readout = None, self.readout
        if isinstance(self.teacher_readout, AttentionPixel):
            pixels = self.teacher_readout.largest(answer.features)
            if isinstance(readout, AttentionPixel):
                readout = rules.SameMap(readout, answer.features[self.teacher_readout.layer].shape[2:])
        context = Context(batch.label, answer.outputs, pixels)
        settings: dict[str, Any] = {"readout": readout, "context": context, "batch_norm": self.batch_norm}
        try:
            result = self._products(student, batch, answer, settings, traced=traced)
        except UnsupportedError as error:
            raise UnsupportedError(
                f"`student` of `Distillation` cannot be differentiated as `probe` needs: {error} Here that is "
                "probe=AntitheticNoise(sigma=...), with values only; jacmatch.doctor(student, x) names the cause."
            ) from error
        rules.same_outputs(result.values, answer.values, self.readout)
        return result.outputs, result.products

    def _products(
        self, student: nn.Module, batch: Batch, answer: Answer, settings: dict[str, Any], *, traced: bool
    ) -> Products:
        if self.probe.side == "input":
            step = getattr(self.probe, "step", None)
            with exact_values(batch.x) if step is not None else nullcontext():
                v = self._directions(batch, None)
                return push(student, batch.x, v, step=step, engine=self.engine, **settings)
        assert answer.cotangents is not None
        # Directions that ask for a gradient betray a backward that can be taken only once, where nothing else would.
        v = answer.cotangents.to(batch.x.dtype, copy=True).requires_grad_(traced)

        def checked(values: Tensor) -> Tensor:
            rules.same_outputs(values, answer.values, self.readout)
            return v

        if traced and self.chunk_size is not None:
            self._check_one(student, batch.x, v[:1], settings)
        return pull(student, batch.x, checked, chunk_size=self.chunk_size, scale=self.scale, **settings)

    def _check_one(self, student: nn.Module, x: Tensor, v: Tensor, settings: dict[str, Any]) -> None:
        """Refuses a student with a backward that can be taken only once, which in a rebuilt graph nobody would see."""
        with preserved_buffers(student):
            row = pull(student, x, v, **settings).products
        if meets_once_differentiable(row.sum()):
            raise UnsupportedError("a backward in it is marked once_differentiable, so it has no second derivative.")

    def _directions(self, batch: Batch, values: Tensor | None) -> Tensor:
        directions: Tensor = self.probe.directions(
            x=batch.x,
            outputs=values,
            labels=batch.label,
            ids=batch.ids,
            seed=self.seed,
            draw=batch.draw,
            partners=batch.partners,
        )
        return directions
